"""Checkpoints: accelerate's own state, the adapter as a file of ours, complete or not there at all."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from ..adapters.file import WEIGHTS_NAME, Adapter, AdapterFileError, collect_adapter, read_adapter, write_adapter
from ..adapters.names import name_in
from ..errors import InputError, NotWritten
from .settings import CheckpointSettings

logger = logging.getLogger("train_dreambooth_s2ft")
ADAPTER = "default"
STATE_NAME = "training_state.json"
# Flags that a resumed run may change: what is written, shown or kept, not what is trained.
FREE_FLAGS = frozenset(
    (
        "instance_dir", "class_data_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
        "checkpointing_steps", "checkpoints_total_limit", "max_train_steps", "num_train_epochs", "validation_prompt",
        "num_validation_images", "validation_epochs", "sample_batch_size", "prior_generation_precision", "report_to",
        "logging_dir", "push_to_hub", "hub_model_id", "adapter_dtype", "allow_tf32", "local_rank", "prompt_was_given",
        "save_lora", "pre_compute_text_embeddings", "estimate", "estimate_draws", "subject", "offload",
        "shard", "skip_memory_check", "dry_run",
    )
)  # fmt: skip


@dataclass
class TrainingState:
    """What a checkpoint knows beside accelerate's state: steps done, losses so far, the flags of the run, and when it
    was written (seconds since 1970)."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    flags: dict[str, object] = field(default_factory=dict)
    written: float = 0.0


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of an output folder, those written first first.

    Not by their steps: a run that goes on from an early checkpoint leaves later ones behind, which are older.
    """
    if not output_dir.is_dir():
        return []
    numbered = [(path.name.removeprefix("checkpoint-"), path) for path in output_dir.glob("checkpoint-*")]
    return [path for *_, path in sorted((_when_written(p), int(n), p) for n, p in numbered if n.isdigit())]


def _when_written(path: Path) -> float:
    try:
        return read_state(path).written
    except InputError:
        return 0.0


def prepare_output_dir(output_dir: Path, settings: CheckpointSettings, flags: Mapping[str, object]) -> Path | None:
    """Make the output folder and say which checkpoint to resume from, if any; `flags` are those of this run.

    Raises InputError for a folder that cannot be written, one with another run's checkpoints and neither
    --resume_from_checkpoint nor --overwrite_output_dir, and a checkpoint that is not there or of a different run.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"The output folder {output_dir} cannot be written: {error.strerror}.") from None
    present = list_checkpoints(output_dir)
    if settings.resume_from is None:
        if present and not settings.overwrite:
            raise InputError(
                f"{output_dir} has another run's checkpoints ({present[-1].name}): go on with it by "
                "--resume_from_checkpoint latest, or start anew with --overwrite_output_dir."
            )
        return None
    if settings.resume_from == "latest":
        if not present:
            logger.info("There is no checkpoint in %s yet: starting from the beginning.", output_dir)
            return None
        path = present[-1]
    else:
        path = Path(settings.resume_from)
        path = path if path.is_dir() else output_dir / path
    if not (path / STATE_NAME).is_file():
        raise InputError(f"{settings.resume_from}: there is no checkpoint.")
    then = read_state(path).flags
    different = [name for name, value in flags.items() if name not in FREE_FLAGS and then.get(name) != value]
    if "images" in different:
        before, now = (set(str(images).split(", ")) for images in (then.get("images"), flags["images"]))
        changed = ", ".join(sorted({entry.rpartition(" ")[0] for entry in before ^ now}))
        raise InputError(f"{path} is a checkpoint of a run on other photos: {changed} differ.")
    if different:
        changes = ", ".join(f"--{name} {flags[name]} (was {then.get(name)})" for name in different)
        raise InputError(f"{path} is a checkpoint of a run with other flags: {changes}.")
    return path


def clear_checkpoints(output_dir: Path) -> None:
    """Remove the checkpoints of an earlier run, half-written ones too."""
    for path in list_checkpoints(output_dir):
        _remove(path)
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Take a checkpoint away, if it is there: renamed first, so that what is half removed is none."""
    gone = path.with_name(f".{path.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    if path.exists():
        path.rename(gone)
        if gone.is_symlink():  # kept on another disk, for example: what the link leads to is not ours to remove
            gone.unlink()
        else:
            shutil.rmtree(gone)


def read_state(path: Path) -> TrainingState:
    """What a checkpoint knows; raises InputError if it is damaged."""
    try:
        return TrainingState(**json.loads((path / STATE_NAME).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the checkpoint is damaged ({error}).") from None


class Checkpoints:
    """Saves and restores a run; `components` are the adapted models, unwrapped."""

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        components: Mapping[str, nn.Module],
        limit: int | None,
    ) -> None:
        self.accelerator, self.output_dir, self.components, self.limit = accelerator, output_dir, components, limit
        accelerator.register_save_state_pre_hook(self._save_adapter)
        accelerator.register_load_state_pre_hook(self._load_adapter)

    def _save_adapter(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # the base is frozen: only the adapter is written
        if self.accelerator.is_main_process:
            write_adapter(Path(folder) / WEIGHTS_NAME, collect_adapter(self.components, ADAPTER))

    def _load_adapter(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        restore_adapter(self.components, read_checkpoint_adapter(Path(folder)))

    def save(self, state: TrainingState) -> Path:
        """Write `checkpoint-<step>`: beside its place first, then renamed; older ones beyond the limit go.

        Raises NotWritten.
        """
        final = self.output_dir / f"checkpoint-{state.step}"
        temporary = self.output_dir / f".{final.name}.tmp"
        if self.accelerator.is_main_process:
            for unfinished in self.output_dir.glob(".checkpoint-*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(temporary), safe_serialization=True)
            if self.accelerator.is_main_process:
                text = json.dumps(asdict(replace(state, written=time.time())))
                (temporary / STATE_NAME).write_text(text, encoding="utf-8")
        except (OSError, RuntimeError, SafetensorError) as error:  # torch has no OSError for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            reason = str(error).strip().splitlines()[0]
            raise NotWritten(f"{final} cannot be written: {reason}. {self.complete()}") from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _remove(final)
            temporary.rename(final)
            if self.limit:
                for path in list_checkpoints(self.output_dir)[: -self.limit]:
                    _remove(path)
        self.accelerator.wait_for_everyone()
        return final

    def load(self, path: Path) -> TrainingState:
        """Restore adapter, optimizer, scheduler and generators; order and positions are the checkpoint's.

        Raises InputError if it is damaged.
        """
        try:
            self.accelerator.load_state(str(path))
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{path}: the checkpoint is damaged ({error}).") from None
        return read_state(path)

    def complete(self) -> str:
        """A sentence for someone whose disk is full: what a run can go on from."""
        present = list_checkpoints(self.output_dir)
        if not present:
            return "There is no checkpoint yet."
        return f"{present[-1]} is complete: make room, and go on with --resume_from_checkpoint latest."

    def last_good(self) -> str:
        """A sentence for someone whose run has failed: what can still be used."""
        present = list_checkpoints(self.output_dir)
        if not present:
            return "There is no checkpoint yet; try a lower --learning_rate."
        return f"The last good checkpoint, {present[-1]}, has an adapter that loads; try a lower --learning_rate."


def read_checkpoint_adapter(path: Path) -> Adapter:
    """The adapter of a checkpoint; raises InputError if it is damaged."""
    try:
        return read_adapter(path / WEIGHTS_NAME)
    except AdapterFileError as error:
        raise InputError(f"The checkpoint is damaged: {error}") from None


@torch.no_grad()
def restore_adapter(components: Mapping[str, nn.Module], adapter: Adapter) -> None:
    """Put a read adapter into layers that carry one of the same form; positions keep their sequence.

    The optimizer's state goes by sequence, and positions are sorted both in a layer and in a file.
    """
    for component, layers in adapter.layers.items():
        for name, weights in layers.items():
            model = components[component]
            layer = model.get_submodule(name_in(model, name))
            layer.s2ft_delta[ADAPTER].load_state_dict(weights.state())
            layer.prepare()
