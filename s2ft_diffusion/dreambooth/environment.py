"""What the environment says beside the flags, accelerate's configuration above all: the run does it, or refuses."""

from __future__ import annotations

import logging
import os
import re
from datetime import UTC, date, datetime

import torch

from ..errors import InputError

logger = logging.getLogger("train_dreambooth_s2ft")
PRECISIONS = ("no", "fp16", "bf16")
PROCESSES = (  # set by torchrun and accelerate, or by MPI
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
    *(f"{of}_{what}" for of in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD") for what in ("SIZE", "RANK", "LOCAL_RANK")),
)  # fmt: skip
FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_TP": "tensor parallelism",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism of several dimensions",
}
# Options of theirs that the run does not have: their values, and what to do instead.
FSDP_OPTIONS = {
    "FSDP_OFFLOAD_PARAMS": (("true",), "keeps weights in host memory; use --offload, without FSDP"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("true",), "checkpoints activations; use --gradient_checkpointing"),
    "FSDP_RESHARD_AFTER_FORWARD": (("false",), "keeps gathered weights; use plain data parallelism"),
}
DEEPSPEED_OPTIONS = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": (("3",), "shares out the base; use --shard, or FSDP 2"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (("cpu", "nvme"), "keeps a few MB elsewhere; leave it out"),
}


def run_date() -> date:
    """The day that the adapter's file gives as its own: today, or that of SOURCE_DATE_EPOCH (in UTC, anywhere).

    Raises InputError for an epoch that is no time.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return date.today()
    try:
        return datetime.fromtimestamp(int(epoch), UTC).date()
    except (ValueError, OverflowError, OSError):
        raise InputError(f"SOURCE_DATE_EPOCH must be seconds since 1970, got {epoch!r}.") from None


def process_count() -> int:
    """How many processes the run has, by what started them; an empty variable is as one that is not set.

    Raises InputError for one of theirs that is no whole number: accelerate reads them all.
    """
    for name in PROCESSES:
        said = os.environ.get(name)
        if said is None:
            continue
        if not said.strip():
            del os.environ[name]
        elif not re.fullmatch(r"-?[0-9]+", said.strip()):
            raise InputError(f"{name} must be a whole number, got {said!r}; unset it, or use accelerate launch.")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 1:
        raise InputError(f"WORLD_SIZE must be at least 1, got {count}; unset it, or use accelerate launch.")
    return count


def mixed_precision(flag: str | None) -> str:
    """The run's precision: the flag's, else that of accelerate's configuration; raises InputError for no known one."""
    said = flag or os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"
    if said not in PRECISIONS:
        raise InputError(f"accelerate is set to {said!r}; choose a --mixed_precision of {', '.join(PRECISIONS)}.")
    if said == "fp16" and (not torch.accelerator.is_available() or _is_on("ACCELERATE_USE_CPU")):
        where = "--mixed_precision" if flag else "ACCELERATE_MIXED_PRECISION"
        raise InputError(f"{where} fp16 needs a GPU; use bf16 or no on a CPU.")
    return said


def sharding_asked() -> bool:
    """Whether accelerate's configuration asks for FSDP 2, which is then what `--shard` does.

    Raises InputError for FSDP 1 and for options that `--shard` does not have.
    """
    if not _is_on(FSDP):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("accelerate's configuration asks for FSDP 1; set fsdp_version to 2.")
    _refuse(FSDP_OPTIONS)
    if os.environ.get("FSDP_IGNORED_MODULES", "none").lower() not in ("", "none"):
        raise InputError("accelerate's configuration has fsdp_ignored_modules, which are not left out.")
    return True


def take_environment(accumulation: int, max_grad_norm: float) -> None:
    """Take from the environment what the run does by itself, before accelerate reads it, and say so.

    Accelerate's FSDP and DeepSpeed would take the adapter to pieces, which is a megabyte: the recipe leaves it whole,
    as in plain data parallelism. FSDP 2 shares out the base (`sharding_asked`); in ZeRO's stages 1 and 2 there is
    nothing to share out. Raises InputError for what the run would not do, or not say.
    """
    _same("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "--gradient_accumulation_steps", accumulation)
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # accelerate reads no "auto"; the flag says it
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise InputError(
            f"accelerate's environment asks for the dynamo backend {backend}, which training does not use."
        )
    for name, kind in REFUSED.items():
        if _is_on(name):
            raise InputError(
                f"accelerate's configuration asks for {kind}. Several processes train with plain data parallelism, and "
                "with --shard they share out the base."
            )
    if sharding_asked():
        logger.info("accelerate's configuration has FSDP 2: several processes share out the base, by its blocks.")
        os.environ[FSDP] = "false"
    if _is_on(DEEPSPEED):
        if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
            raise InputError("accelerate's configuration names a file of DeepSpeed's, which training does not read.")
        _refuse(DEEPSPEED_OPTIONS)
        _same("ACCELERATE_GRADIENT_CLIPPING", "--max_grad_norm", max_grad_norm)
        logger.info("Plain data parallelism in the place of DeepSpeed: the optimizer's state is a few MB.")
        os.environ[DEEPSPEED] = "false"


def _same(name: str, flag: str, ours: float) -> None:
    said = os.environ.get(name, "auto")
    try:
        same = said.lower() in ("auto", "none") or float(said) == ours
    except ValueError:
        same = False
    if not same:
        raise InputError(
            f"{name} is {said} in accelerate's environment, {flag} is {ours:g}; give both the same number."
        )


def _refuse(options: dict[str, tuple[tuple[str, ...], str]]) -> None:
    for name, (values, advice) in options.items():
        if (value := os.environ.get(name, "").lower()) in values:
            option = name.removeprefix("ACCELERATE_DEEPSPEED_").lower()
            raise InputError(f"accelerate's configuration has {option}: {value}, which {advice}.")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on", "y", "t")
