"""What the examples share: the flags of a method, the adapter, its prior, and what a run leaves behind."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from datasets.exceptions import DatasetsError
from peft import FourierFTConfig, LoraConfig, PeftConfig, get_peft_model, save_as_lora
from torch import nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from s2ft_diffusion import S2FTConfig, S2FTLayer, attention_targets, initialize_s2ft_weights
from s2ft_diffusion.dreambooth.errors import InputError

RESULTS_NAME = "results.json"


@dataclass
class MethodArguments:
    """How a model is fine-tuned; the same flags in every example."""

    method: Literal["s2ft", "lora", "fourierft", "full"] = "s2ft"
    preset: Literal["default", "paper"] = field(default="default", metadata={"help": "S2FT's choices"})
    targets: Literal["qv", "attention", "blocks"] = field(default="qv", metadata={"help": "layers to adapt"})
    n_frequency: float = field(default=1000, metadata={"help": "S2FT, FourierFT: numbers a layer; below 1, a share"})
    scaling: float | None = field(default=None, metadata={"help": "S2FT (as the preset has it), FourierFT (150)"})
    rank: int = field(default=8, metadata={"help": "LoRA: rank; its alpha is twice that"})
    s2ft_options: str = field(default="{}", metadata={"help": 'further S2FTConfig fields, as JSON: {"gamma": 1.0}'})
    estimate: Literal["auto", "gradient", "normalized", "full"] = field(
        default="auto", metadata={"help": "S2FT's prior; auto: gradient (Eq. 4) for the paper's preset, else full"}
    )
    estimate_batches: int = field(default=32, metadata={"help": "training batches that the prior is estimated from"})
    head_learning_rate: float | None = field(default=None, metadata={"help": "of the new head, where there is one"})
    export_lora: int | None = field(
        default=None,
        metadata={"help": "also write a LoRA of this rank to lora/; 0: of an S2FT grid's own rank, exactly"},
    )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(kinds: Sequence[type], argv: Sequence[str] | None, **defaults: Any) -> tuple[Any, ...]:
    """Flags into dataclasses, with other defaults where given; whatever is wrong with them is an InputError."""
    parser = _Parser(kinds)
    parser.set_defaults(**defaults)
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ImportError, ValueError) as error:
        raise InputError(str(error)) from None


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Within the block, what cannot be read or found is an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ or error
        raise InputError(
            f"{what}: {str(cause).strip().splitlines()[0] if str(cause) else type(cause).__name__}"
        ) from None


def need_columns(columns: Sequence[str], *wanted: str | None) -> None:
    """Raise InputError for a column that is not among a data set's."""
    for name in wanted:
        if name is not None and name not in columns:
            raise InputError(f"There is no column {name!r}; the data have {', '.join(columns)}.")


def head_names(model: PreTrainedModel) -> list[str]:
    """The modules around a pretrained model: a classifier, trained whole."""
    children = model.named_children()
    return [
        name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


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
                scaling=args.scaling or 150.0,
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
        return get_peft_model(model, config)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"--method {args.method}: {error}") from None


class HeadTrainer(Trainer):
    """transformers' Trainer with a learning rate of its own for the head, as FourierFT's experiments have it."""

    def __init__(self, *args: Any, heads: Sequence[str] = (), head_learning_rate: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.heads, self.head_learning_rate = set(heads), head_learning_rate
        # Classifiers accept any argument, yet average over their own batch whatever number of items they are told.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The usual optimizer, the head's parameters in groups of their own."""
        optimizer = super().create_optimizer(model)
        if self.head_learning_rate is None:
            return optimizer
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
    bar = tqdm(batches, desc="prior", disable=not trainer.is_world_process_zero())

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        return trainer.compute_loss(model, trainer._prepare_inputs(batch))

    try:
        initialize_s2ft_weights(model, loss, bar, estimate=estimate, progress=True)
    except ValueError as error:
        raise InputError(f"The prior cannot be estimated: {error}") from None


def train(trainer: Trainer, args: MethodArguments) -> dict[str, Any]:
    """Estimate the prior, train (or go on), save; returns what a report says about it."""
    resume = trainer.args.resume_from_checkpoint
    folder = Path(trainer.args.output_dir)
    if resume == "latest":
        resume = get_last_checkpoint(folder) if folder.is_dir() else None
        if resume is None:
            raise InputError(f"--resume_from_checkpoint latest: there is no checkpoint in {folder}.")
    elif resume and not Path(resume).is_dir():
        raise InputError(f"--resume_from_checkpoint: {resume} is not a folder.")
    counted = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    heads = [p for name, p in trainer.model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    facts: dict[str, Any] = {
        **asdict(args),
        "learning_rate": trainer.args.learning_rate,
        "seed": trainer.args.seed,
        "trainable": sum(p.numel() for p in counted),
        "trainable_head": sum(p.numel() for p in heads),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seconds": {},
    }
    if args.method == "s2ft" and not resume:  # else order and positions are the checkpoint's
        begun = time.perf_counter()
        estimate_prior(trainer, args)
        facts["seconds"]["prior"] = round(time.perf_counter() - begun, 3)
    output = trainer.train(resume_from_checkpoint=resume or None)
    facts["steps"] = output.global_step
    facts["epochs"] = trainer.state.epoch
    facts["train_loss"] = output.training_loss
    facts["seconds"]["train"] = output.metrics["train_runtime"]
    facts["peak_memory_gb"] = peak_memory() / 1e9
    trainer.save_model()
    if args.export_lora is not None and args.method != "full" and trainer.is_world_process_zero():
        grids = [module for module in trainer.model.modules() if isinstance(module, S2FTLayer)]
        rank = args.export_lora or max(len(module.lora_factors("default")[1]) for module in grids)
        save_as_lora(folder / "lora", trainer.model, rank=rank)
        facts["lora_rank"] = rank
    return facts


def report(trainer: Trainer, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the results beside the adapter, and upload both where asked."""
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / RESULTS_NAME
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(facts["metrics"]))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return facts


def peak_memory() -> int:
    """Bytes: of the accelerator at its fullest where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
