"""What the recipe's flags must be, alone and together; all of it before anything is loaded."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import toybox
from ..errors import InputError
from ..families.loading import check_offload
from ..families.quantization import check_quantization
from ..text import as_argument
from .folders import check_apart, check_outside
from .publish import check_nothing_is_lost

TRACKERS = ("tensorboard", "wandb", "comet_ml")
MAX_SCALING = 1e6  # the paper's is 100; gradients go with it, and far above their squares overflow


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError, in one line, for the first thing that is wrong with parsed and completed flags."""
    _check_numbers(args)
    _check_together(args)
    _check_folders(args)
    _check_names(args)
    _check_packages(args)


def _check_numbers(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} must be a finite number, got {value}.")
    positive = (
        "num_class_images", "sample_batch_size", "train_batch_size", "gradient_accumulation_steps",
        "checkpointing_steps", "num_validation_images", "validation_epochs", "lr_num_cycles",
    )  # fmt: skip
    optional = (
        "resolution", "max_train_steps", "num_train_epochs", "checkpoints_total_limit", "tokenizer_max_length",
        "estimate_draws",
    )  # fmt: skip
    for name in positive + tuple(name for name in optional if getattr(args, name) is not None):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    for name in ("learning_rate", "scaling", "max_grad_norm", "adam_epsilon", "snr_gamma", "logit_std", "lr_power"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name} must be above 0, got {getattr(args, name)}.")
    for name in ("adam_weight_decay", "prior_loss_weight", "lr_warmup_steps", "guidance_scale"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            raise InputError(f"--{name} must not be negative, got {getattr(args, name)}.")
    if args.scaling is not None and args.scaling > MAX_SCALING:
        raise InputError(f"--scaling must be at most {MAX_SCALING:g}, got {args.scaling:g}.")
    if args.save_lora is not None and args.save_lora < 0:
        raise InputError(f"--save_lora takes a rank of at least 1, got {args.save_lora}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 0 and below 1, got {getattr(args, name)}.")


def _check_together(args: argparse.Namespace) -> None:
    if args.max_train_steps is not None and args.num_train_epochs is not None:
        raise InputError("--max_train_steps and --num_train_epochs contradict each other; give one.")
    if args.with_prior_preservation and not (args.class_data_dir and args.class_prompt):
        raise InputError("--with_prior_preservation needs --class_data_dir and --class_prompt.")
    if not args.with_prior_preservation and (args.class_data_dir or args.class_prompt):
        raise InputError("--class_data_dir and --class_prompt do nothing without --with_prior_preservation.")
    if args.train_text_encoder and args.pre_compute_text_embeddings:
        raise InputError("--train_text_encoder and --pre_compute_text_embeddings contradict each other.")
    if args.resume_from_checkpoint and args.overwrite_output_dir:
        raise InputError("--resume_from_checkpoint and --overwrite_output_dir contradict each other.")
    if args.offload:
        check_offload(args.quantize)
    if args.shard and (args.quantize or args.offload):
        other = "--quantize" if args.quantize else "--offload"
        raise InputError(
            f"--shard (or FSDP in accelerate's configuration) and {other} contradict each other; give one."
        )
    if args.shard and args.processes == 1:
        raise InputError(
            "--shard shares the base out over processes, and there is one: accelerate launch --num_processes 2 …"
        )
    if args.estimate == "full" and (args.quantize or args.offload or args.shard):
        raise InputError(
            "--estimate full trains the base's weights; --quantize, --offload and --shard (FSDP) leave it no room."
        )


def _check_folders(args: argparse.Namespace) -> None:
    """Raise InputError where the run would write over what it reads, or take it away with old checkpoints."""
    if args.class_data_dir and Path(args.class_data_dir).exists() and not Path(args.class_data_dir).is_dir():
        raise InputError(f"--class_data_dir {args.class_data_dir} is no folder.")
    output_dir, photos = Path(args.output_dir), {"--instance_dir": Path(args.instance_dir)}
    classes = {"--class_data_dir": Path(args.class_data_dir) if args.class_data_dir else None}
    logs = {"--logging_dir": output_dir / args.logging_dir}
    # Decoded by now, since it also names the base in the adapter; here it is a path again, in whatever locale.
    base = {"--pretrained_model_name_or_path": Path(as_argument(toybox.resolve(args.pretrained_model_name_or_path)))}
    resumed = Path(args.resume_from_checkpoint or "latest")
    checkpoint = {"--resume_from_checkpoint": resumed if resumed.is_dir() else None}
    written = {"--output_dir": output_dir, "the folder of sample images": output_dir / "validation", **logs, **classes}
    check_apart({**photos, **classes, **checkpoint}, written)
    check_outside({"--output_dir": output_dir, **logs, **classes}, base)
    check_nothing_is_lost(output_dir, lora=args.save_lora is not None)
    for name in ("checkpoint-*", ".checkpoint-*"):  # the latter while one is written
        check_outside({**photos, **classes, **base}, {"the checkpoints of --output_dir": output_dir / name})


def _check_names(args: argparse.Namespace) -> None:
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or Path(args.output_dir).resolve().name)
        except HFValidationError as error:
            raise InputError(f"--push_to_hub: choose another --hub_model_id: {error}") from None
    if args.report_to not in (*TRACKERS, "all", "none"):
        raise InputError(f"--report_to must be one of {(*TRACKERS, 'all', 'none')}, got {args.report_to!r}.")


def _check_packages(args: argparse.Namespace) -> None:
    """Raise InputError for a package that a flag needs and that is not here."""
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.")
    if args.quantize:
        check_quantization(args.quantize)
    if args.enable_xformers_memory_efficient_attention and importlib.util.find_spec("xformers") is None:
        raise InputError("--enable_xformers_memory_efficient_attention needs xformers: pip install xformers.")
    if args.report_to in TRACKERS and importlib.util.find_spec(args.report_to) is None:
        raise InputError(f"--report_to {args.report_to} needs the package of that name, or choose --report_to none.")
