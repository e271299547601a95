"""What the examples share: the flags of a method, the adapter, its prior, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError  # of whichever httpx the hub's client uses
from jinja2 import TemplateError  # of chat templates
from peft import FourierFTConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, save_as_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers import TrainingArguments as Training
from transformers.trainer_utils import get_last_checkpoint

from s2ft_diffusion import S2FTConfig, attention_targets, initialize_s2ft_weights, to_lora
from s2ft_diffusion.errors import Diverged, InputError, NotPublished
from s2ft_diffusion.tuner.layer import delta_shape

RESULTS_NAME = "results.json"
RATES = {"full": 1e-4, "lora": 1e-3, "fourierft": 1e-1, "s2ft paper": 1e-1, "s2ft default": 1e-2}
RATES_HELP = (
    f"{', '.join(f'{rate:g} for {name}' for name, rate in RATES.items())}, unless given: the best of three each on "
    "sentiment ratings (docs/tasks.md), a start for other tasks"
)
TRAINING_FACTS = (  # flags of transformers and TRL that results.json has
    "learning_rate", "seed", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "world_size", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "bf16",
    "fp16", "max_length", "packing", "resume_from_checkpoint",
)  # fmt: skip
# Fields of an adapter's configuration that may differ between a checkpoint and the run that goes on from it.
NOT_COMPARED = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


@dataclass
class MethodArguments:
    """How a model is fine-tuned; the same flags in every example."""

    method: Literal["s2ft", "lora", "fourierft", "full"] = "s2ft"
    preset: Literal["default", "paper"] = field(default="default", metadata={"help": "S2FT's choices"})
    targets: Literal["qv", "attention", "blocks"] = field(default="qv", metadata={"help": "layers to adapt"})
    n_frequency: float = field(default=1000, metadata={"help": "S2FT, FourierFT: numbers a layer; S2FT: or a share"})
    scaling: float | None = field(default=None, metadata={"help": "S2FT (as the preset has it), FourierFT (150)"})
    rank: int = field(default=8, metadata={"help": "LoRA: rank; its alpha is twice that"})
    s2ft_options: str = field(default="{}", metadata={"help": 'further S2FTConfig fields, as JSON: {"gamma": 1.0}'})
    estimate: Literal["auto", "gradient", "normalized", "full"] = field(
        default="auto", metadata={"help": "S2FT's prior; auto: gradient (Eq. 4) for the paper's preset, else full"}
    )
    estimate_batches: int = field(default=32, metadata={"help": "training batches that the prior is estimated from"})
    head_learning_rate: float = field(default=1e-3, metadata={"help": "of the new head, where there is one"})
    export_lora: int | None = field(
        default=None,
        metadata={"help": "also write a LoRA of this rank to lora/; 0: of an S2FT grid's own rank, exactly"},
    )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(kinds: Sequence[type], argv: Sequence[str] | None, **defaults: Any) -> tuple[Any, ...]:
    """Flags of a script, of the method and of transformers, with other defaults where given.

    Whatever is wrong with them is an InputError. The output folder is there afterwards.
    """
    parser = _Parser(kinds)
    parser.set_defaults(learning_rate=None, logging_nan_inf_filter=False, **defaults)  # else a loss of NaN is hidden
    next(action for action in parser._actions if action.dest == "learning_rate").help = RATES_HELP
    try:
        args, method, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ImportError, ValueError, OSError) as error:
        raise InputError(" ".join(str(error).split())) from None
    if training.learning_rate is None:
        training.learning_rate = RATES[f"s2ft {method.preset}" if method.method == "s2ft" else method.method]
    check(method, training)
    with readable("--output_dir"):
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
    return args, method, training


def check(args: MethodArguments, training: Training) -> None:
    """Raise InputError for values that no method can have."""
    numbers = args.n_frequency
    if not (0 < numbers < 1 or (numbers >= 1 and numbers % 1 == 0)):
        raise InputError(f"--n_frequency is a whole number, or a share below 1, not {numbers:g}.")
    if args.method == "fourierft" and numbers < 1:
        raise InputError("--n_frequency below 1, a share, is for S2FT: FourierFT takes a whole number.")
    at_least(1, estimate_batches=args.estimate_batches, rank=args.rank)
    at_least(0, learning_rate=training.learning_rate, head_learning_rate=args.head_learning_rate)
    at_least(0, export_lora=args.export_lora)
    if args.scaling is not None and not math.isfinite(args.scaling):
        raise InputError(f"--scaling must be finite, got {args.scaling}.")
    if args.export_lora is not None and args.method == "full":
        raise InputError("--export_lora is for adapters, and --method full has none.")
    if args.export_lora is not None:
        refuse_sharded(training, "--export_lora")


def at_least(least: float, **values: float | None) -> None:
    """Raise InputError for a flag's value, where it has one, that is below `least` or not finite."""
    for name, value in values.items():
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name} must be at least {least}, got {value}.")


def refuse_sharded(training: Training, flag: str) -> None:
    """Raise InputError for a flag that one process acts on alone: under FSDP it would wait for the others forever."""
    if training.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InputError(f"{flag} does not go with FSDP. Use the saved adapter afterwards, in one process.")


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Within the block, what cannot be read or found is an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, DatasetsError, HTTPError, TemplateError) as error:
        cause = error.__cause__ or error
        raise InputError(
            f"{what}: {str(cause).strip().splitlines()[0] if str(cause) else type(cause).__name__}"
        ) from None


def need_columns(columns: Sequence[str], *wanted: str | None) -> None:
    """Raise InputError for a column that is not among a data set's."""
    for name in wanted:
        if name is not None and name not in columns:
            raise InputError(f"There is no column {name!r}; the data have {', '.join(columns)}.")


def encode_labels(data: DatasetDict, training: Sequence[Any]) -> DatasetDict:
    """Column "label" as classes: those of the `training` labels, in every split; raises InputError for another one."""
    classes = sorted(set(training))
    numbers = {label: number for number, label in enumerate(classes)}
    kind = ClassLabel(names=[str(label) for label in classes])
    for name, split in data.items():
        if unknown := sorted(set(split["label"]) - set(classes)):
            raise InputError(f"The {name} split has a label that the training data have not: {unknown[0]!r}.")
        encoded = [numbers[label] for label in split["label"]]
        data[name] = split.remove_columns("label").add_column("label", encoded).cast_column("label", kind)
    return data


def check_texts(split: Dataset, columns: Mapping[str, str]) -> None:
    """Raise InputError for a row without a text or a label, and for texts that are none; columns with what they are."""
    for column, meaning in columns.items():
        if meaning != "label" and split.features[column].dtype not in ("string", "large_string"):
            raise InputError(f"Column {column!r} has no texts but {split.features[column].dtype}.")
        for number, value in enumerate(split[column]):
            if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(f"Row {number + 1} has no {column}.")


def choose_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int | None, usual: int) -> int:
    """--max_length, else the usual one or what the model takes; raises InputError for more than its positions."""
    at_least(1, max_length=length)
    most = min(getattr(model.config, "max_position_embeddings", math.inf), tokenizer.model_max_length)
    if length is not None and length > most:
        raise InputError(f"--max_length {length} is above the {most} tokens that the model takes.")
    return length or min(usual, most)


def need_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a padding token, the end's where there is none; raises InputError where there is neither."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError("The tokenizer has no padding token and no end-of-sequence token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token


def logits(predictions: EvalPrediction) -> np.ndarray:
    """The scores of what a model gives, which may be more than them."""
    found = predictions.predictions
    return found[0] if isinstance(found, tuple) else found


def head_names(model: PreTrainedModel) -> list[str]:
    """The modules around a pretrained model, trained whole: a classifier. What has attention is the model's own.

    Raises InputError where there is none.
    """
    try:
        targets = attention_targets(model)
    except ValueError:  # which `adapt` says; full fine-tuning needs none
        targets = []
    inside = {model.base_model_prefix, *(name.partition(".")[0] for name in targets)}
    heads = [
        name for name, child in model.named_children() if name not in inside and any(True for _ in child.parameters())
    ]
    if not heads:
        raise InputError(f"{type(model).__name__} has no head beside its layers with attention, to be trained whole.")
    return heads


def adapt(model: PreTrainedModel, args: MethodArguments, *, seed: int, heads: Sequence[str] = ()) -> nn.Module:
    """The model with the method's adapter in its attention layers; the model itself for "full"."""
    if args.method == "full":
        return model
    n_frequency = args.n_frequency if args.n_frequency < 1 else int(args.n_frequency)
    common: dict[str, Any] = {"modules_to_save": list(heads) or None}
    try:
        common["target_modules"] = attention_targets(model, args.targets)
        config: PeftConfig
        if args.method == "lora":
            config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, **common)
        elif args.method == "fourierft":
            config = FourierFTConfig(  # from zero, as the others: PEFT's default start is random coefficients
                n_frequency=n_frequency,
                scaling=150.0 if args.scaling is None else args.scaling,
                random_loc_seed=seed,
                init_weights=True,
                **common,
            )
        else:
            options = json.loads(args.s2ft_options)
            if args.scaling is not None:
                options["scaling"] = args.scaling
            config = S2FTConfig.from_preset(args.preset, n_frequency=n_frequency, seed=seed, **common, **options)
        if args.export_lora == 0 and getattr(config, "positions", None) != "grid":
            raise InputError("--export_lora 0 is for S2FT with positions on a grid; give a rank.")
        adapted = get_peft_model(model, config)
        check_rank(adapted, args.export_lora)
        return adapted
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"--method {args.method}: {error}") from None


def check_rank(model: nn.Module, rank: int | None) -> None:
    """Raise InputError for an --export_lora above the rank that a layer's change can have."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and (most := min(delta_shape(module.get_base_layer()))) < (rank or 0):
            raise InputError(f"--export_lora {rank} is more than the {most} that {name} has room for.")


class HeadTrainer(Trainer):
    """transformers' Trainer with a learning rate of its own for the head, as FourierFT's experiments have it."""

    def __init__(self, *args: Any, heads: Sequence[str] = (), head_learning_rate: float = 1e-3, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.heads, self.head_learning_rate = set(heads), head_learning_rate
        # Classifiers accept any argument, yet average over their own batch whatever number of items they are told.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The usual optimizer, the head's parameters in groups of their own."""
        optimizer = super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        in_head = {id(parameter) for name, parameter in named if self.heads & set(name.split("."))}
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in in_head]
            if moved:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in in_head]
                optimizer.add_param_group({**group, "params": moved, "lr": self.head_learning_rate})
        return optimizer


def estimate_prior(trainer: Trainer, args: MethodArguments) -> None:
    """Order and positions of an S2FT adapter from the first training batches, with the trainer's own loss."""
    estimate = args.estimate if args.estimate != "auto" else "gradient" if args.preset == "paper" else "full"
    model = trainer.model.train(trainer.args.gradient_checkpointing)  # without dropout, unless that costs the memory
    batches = list(islice(trainer.get_train_dataloader(), args.estimate_batches))
    quiet = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    bar = tqdm(batches, desc="prior", disable=quiet)
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        model.to(trainer.args.device)  # the Trainer leaves it to others under FSDP and with --bf16_full_eval

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        return trainer.compute_loss(model, trainer._prepare_inputs(batch))

    try:
        initialize_s2ft_weights(model, loss, bar, estimate=estimate, progress=not quiet)
    except ValueError as error:
        raise InputError(f"The prior cannot be estimated: {error}") from None


class StopDiverged(TrainerCallback):
    """Ends a run whose loss is not finite: it would train on to the end, and save an adapter of NaN."""

    def on_log(self, args: Training, state: Any, control: Any, logs: dict[str, Any], **others: Any) -> None:
        if bad := [name for name, value in logs.items() if name.endswith("loss") and not math.isfinite(value)]:
            raise Diverged(f"{bad[0]} is not finite at step {state.global_step}; try a lower --learning_rate.")


def find_checkpoint(trainer: Trainer) -> str | None:
    """The folder to go on from, if any; raises InputError where it is none, or another adapter's."""
    resume, folder = trainer.args.resume_from_checkpoint, Path(trainer.args.output_dir)
    if not resume:
        return None
    if resume == "latest":
        resume = get_last_checkpoint(folder)
        if resume is None:
            raise InputError(f"--resume_from_checkpoint latest: there is no checkpoint in {folder}.")
    state, saved = Path(resume, "trainer_state.json"), Path(resume, "adapter_config.json")
    if not state.is_file():
        raise InputError(f"--resume_from_checkpoint: {resume} is no folder with a checkpoint.")
    with readable("--resume_from_checkpoint"):
        done = json.loads(state.read_text(encoding="utf-8"))
        there = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
    configs = getattr(trainer.model, "peft_config", {})
    here = configs["default"].to_dict() if configs else {}
    if bool(there) != bool(here):
        raise InputError(f"--resume_from_checkpoint: {resume} was trained with another --method.")
    for name in sorted(there.keys() & here.keys() - {*NOT_COMPARED}, key=lambda name: (name != "peft_type", name)):
        then, now = (sorted(v) if isinstance(v, list | set) else v for v in (there[name], here[name]))
        if then != now:
            raise InputError(f"--resume_from_checkpoint: {resume} was trained with another {name}: {then}, not {now}.")
    steps, epochs = trainer.args.max_steps, trainer.args.num_train_epochs
    finished = done["global_step"] >= steps if steps > 0 else done["epoch"] >= epochs
    if finished and (folder / RESULTS_NAME).is_file():
        raise InputError(f"--resume_from_checkpoint: the run has ended; {folder / RESULTS_NAME} has its results.")
    return resume


def train(trainer: Trainer, args: MethodArguments, script: Any) -> dict[str, Any]:
    """Estimate the prior, train (or go on), save; returns what a report says about it and about the flags."""
    resume = find_checkpoint(trainer)
    folder = Path(trainer.args.output_dir)
    trainer.add_callback(StopDiverged)
    counted = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    heads = [p for name, p in trainer.model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    facts: dict[str, Any] = {
        **asdict(script),
        **asdict(args),
        **{name: getattr(trainer.args, name) for name in TRAINING_FACTS if hasattr(trainer.args, name)},
        "train_rows": len(trainer.train_dataset),
        "trainable": sum(p.numel() for p in counted),
        "trainable_head": sum(p.numel() for p in heads),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seconds": {},
    }
    if args.method == "s2ft" and not resume:  # else order and positions are the checkpoint's
        begun = time.perf_counter()
        estimate_prior(trainer, args)
        facts["seconds"]["prior"] = round(time.perf_counter() - begun, 3)
    output = trainer.train(resume_from_checkpoint=resume)
    facts["steps"] = output.global_step
    facts["epochs"] = trainer.state.epoch
    facts["train_loss"] = output.training_loss
    facts["seconds"]["train"] = output.metrics["train_runtime"]
    facts["peak_memory_gb"] = peak_memory() / 1e9
    trainer.save_model(_internal_call=True)  # without an upload: there are no results yet
    if args.export_lora is not None and trainer.is_world_process_zero():
        facts["lora_rank"] = export_lora(folder / "lora", trainer.model, args.export_lora)
    return facts


def export_lora(folder: Path, model: PeftModel, rank: int) -> int:
    """Write an adapter as a LoRA: the nearest of a rank, or, with 0, exactly; returns the (largest) rank."""
    if rank:
        save_as_lora(folder, model, rank=rank)
        return rank
    config, tensors = to_lora(model)
    config.save_pretrained(folder)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return max(len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))


def write(trainer: Trainer, facts: dict[str, Any]) -> None:
    """Write the results beside the adapter."""
    # A correlation with a constant is not a number, which JSON does not have.
    facts["metrics"] = {n: v if math.isfinite(v) else None for n, v in facts["metrics"].items()}
    if trainer.is_world_process_zero():
        text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
        Path(trainer.args.output_dir, RESULTS_NAME).write_text(text, encoding="utf-8")


def report(trainer: Trainer, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the results, print the metrics, and upload all where asked; raises NotPublished where that fails."""
    write(trainer, facts)
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        print(json.dumps(facts["metrics"]))
    if trainer.args.push_to_hub:
        try:
            trainer.push_to_hub()
        except (OSError, ValueError, HTTPError) as error:
            reason = " ".join(str(error).split())
            raise NotPublished(f"The upload failed: {reason}. All is in {folder}.") from None
    return facts


def peak_memory() -> int:
    """Bytes: of the accelerator at its fullest where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
