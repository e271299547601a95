"""Trains small models many at a time: each step is recorded as a CUDA graph, and graphs run beside each other.

Models, adapters, priors and losses are those of the example scripts; the loop is their Trainer's (AdamW without decay,
gradients clipped to a norm of 1, warm-up and a cosine), without what a Trainer does between steps. On a CPU the same
steps run one by one.
"""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from finetuning import adapt, head_names
from safetensors.torch import load_file
from scipy.stats import pearsonr
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from s2ft_diffusion import initialize_s2ft_weights

from .data import SIDE
from .runs import Run

MEAN, STD = 0.449, 0.226  # of grey ImageNet pixels
WARM_UP = 0.1  # of the steps
SMALL, SMALL_LENGTH = {"train": 400, "validation": 300, "test": 600}, 16  # texts of at most so many tokens
SMALL_IMAGES, SMALL_EPOCHS = {"train": 200, "validation": 1000, "test": 2000}, 16
RECORDINGS = 2  # steps before a graph is recorded, so that libraries have their plans and workspaces


@dataclass
class Task:
    """A model to start from, data on a device, and how they are trained and scored."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    batch_size: int
    epochs: int
    head_rate: float
    measure: str
    pad: int = 0

    def batch(self, split: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model is called with for some rows of a split."""
        inputs, labels = self.inputs[split].index_select(0, rows), self.labels[split].index_select(0, rows)
        if inputs.ndim == 2:
            hidden = (inputs == self.pad)[:, None, None].float() * torch.finfo(torch.float32).min
            return {"input_ids": inputs, "attention_mask": hidden, "labels": labels}
        pixels = F.interpolate(inputs[:, None].float() / 255, size=(SIDE, SIDE), mode="bilinear")
        return {"pixel_values": ((pixels - MEAN) / STD).expand(-1, 3, -1, -1), "labels": labels}

    def score(self, predictions: torch.Tensor, labels: torch.Tensor) -> float:
        """Accuracy, or Pearson's r for ratings."""
        if self.measure == "pearson":
            return float(pearsonr(labels.numpy(), predictions.squeeze(-1).numpy()).statistic)
        return float((predictions.argmax(-1) == labels).float().mean())


def load_task(
    name: str, data: Path, models: Path, device: torch.device, epochs: float = 1.0, small: bool = False
) -> Task:
    """A task by name from packed data and unpacked models.

    `epochs` is a factor, for a trial. `small` is for a CPU: fewer images and epochs, fewer and shorter texts (`SMALL`).
    """
    images = name == "images"
    kind = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    place = models / ("dinov2" if images else "minilm")
    config = AutoConfig.from_pretrained(place)
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, dropout, 0.0)
    config.num_labels = {"images": 10, "ratings": 1, "sources": 3}[name]
    config.problem_type = "regression" if name == "ratings" else "single_label_classification"
    model = kind.from_pretrained(place, config=config, attn_implementation="eager").to(device)
    held = load_file(data / ("images.safetensors" if images else "texts.safetensors"))
    prefix = "" if images else f"{name}_"
    splits = ("train", "validation", "test")
    inputs = {split: held[prefix + split].to(device) for split in splits}
    labels = {split: held[f"{prefix}{split}_labels"].to(device) for split in splits}
    if not images:
        inputs = {split: tokens.long() for split, tokens in inputs.items()}
    if name != "ratings":
        labels = {split: classes.long() for split, classes in labels.items()}
    batch_size, count = (64, 100) if images else (32, 5)
    if small and images:
        batch_size, count = 16, SMALL_EPOCHS
        for split, size in SMALL_IMAGES.items():
            inputs[split], labels[split] = inputs[split][:size], labels[split][:size]
    elif small:
        batch_size, count = 16, 3
        for split, size in SMALL.items():
            short = (inputs[split][:, SMALL_LENGTH:] == (config.pad_token_id or 0)).all(1).nonzero()[:size, 0]
            inputs[split], labels[split] = inputs[split][short, :SMALL_LENGTH], labels[split][short]
    return Task(
        model,
        inputs,
        labels,
        batch_size,
        max(1, round(count * epochs)),
        head_rate=1e-3,
        measure="pearson" if name == "ratings" else "accuracy",
        pad=getattr(config, "pad_token_id", 0) or 0,
    )


class Training:
    """One run, ready to step: the model with its adapter, placed by its prior."""

    def __init__(self, task: Task, run: Run) -> None:
        self.task, self.run = task, run
        self.device = next(task.model.parameters()).device
        torch.manual_seed(run.seed)  # LoRA's start
        generator = torch.Generator().manual_seed(run.seed)
        self.model = self._model(generator)
        self.seconds: dict[str, float] = {}
        rows = self._rows(generator)
        if run.method.startswith("s2ft"):
            begun = time.perf_counter()
            self._place(rows)
            self.seconds["prior"] = round(time.perf_counter() - begun, 3)
        self.rows = rows.to(self.device)
        self.steps = len(rows)
        self.done = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.schedule = torch.zeros(self.steps, device=self.device)  # all zeros until `begin`
        self.optimizer = self._optimizer()
        self.model.train()

    def _model(self, generator: torch.Generator) -> nn.Module:
        model = copy.deepcopy(self.task.model)
        self.heads = head_names(model)
        for name in self.heads:
            for parameter in model.get_submodule(name).parameters():
                fresh = torch.zeros(parameter.shape)
                if parameter.ndim > 1:
                    nn.init.normal_(fresh, std=0.02, generator=generator)
                parameter.data.copy_(fresh)
        model = adapt(model, self.run.arguments(), seed=self.run.seed, heads=self.heads)
        for module in model.modules():  # PEFT's FourierFT keeps its positions in host memory, to copy in every pass
            if isinstance(indices := getattr(module, "indices", None), dict):
                indices.update({name: value.to(self.device) for name, value in indices.items()})
        return model

    def _rows(self, generator: torch.Generator) -> torch.Tensor:
        """(steps, batch size): every training row once an epoch, epochs one after the other; a rest is left out."""
        count, size = len(self.task.labels["train"]), self.task.batch_size
        drawn = torch.cat([torch.randperm(count, generator=generator) for _ in range(self.task.epochs)])
        return drawn[: len(drawn) // size * size].view(-1, size)

    def _place(self, rows: torch.Tensor) -> None:
        arguments = self.run.arguments()
        estimate = arguments.estimate
        if estimate == "auto":
            estimate = "gradient" if arguments.preset == "paper" else "full"
        self.model.eval()
        batches = [chosen.to(self.device) for chosen in rows[: arguments.estimate_batches]]
        initialize_s2ft_weights(
            self.model, lambda chosen: self.model(**self.task.batch("train", chosen)).loss, batches, estimate=estimate
        )

    def _optimizer(self) -> torch.optim.AdamW:
        heads, others = [], []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (heads if set(self.heads) & set(name.split(".")) else others).append(parameter)
        self.numbers = sum(parameter.numel() for parameter in others)
        # Rates in tensors, so that a recorded step reads the schedule's of the moment.
        groups = [
            {"params": parameters, "lr": torch.zeros((), device=self.device), "peak": peak}
            for parameters, peak in ((others, self.run.rate), (heads, self.task.head_rate))
        ]
        return torch.optim.AdamW(groups, weight_decay=0.0, fused=True, capturable=self.device.type == "cuda")

    def step(self) -> None:
        """One training step, all of it on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(**self.task.batch("train", self.rows.index_select(0, self.done)[0])).loss.backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        part = self.schedule.index_select(0, self.done)[0]
        for group in self.optimizer.param_groups:
            group["lr"].copy_(part * group["peak"])
        self.optimizer.step()
        self.done.add_(1)

    def begin(self) -> None:
        """Forget steps made at a rate of zero, and fill in the schedule."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.done.zero_()
        warm = max(1, round(WARM_UP * self.steps))
        parts = [(n + 1) / warm for n in range(warm)]
        rest = self.steps - warm
        parts += [(1 + math.cos(math.pi * n / rest)) / 2 for n in range(rest)]
        self.schedule.copy_(torch.tensor(parts))

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """The step as a graph, recorded on the stream where it is to run: libraries' workspaces go by stream."""
        for _ in range(RECORDINGS):
            self.step()
        torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        return graph

    @torch.no_grad()
    def score(self) -> float:
        """On the run's split."""
        self.model.eval()
        labels = self.task.labels[self.run.split]
        chunks = torch.arange(len(labels), device=self.device).split(500)
        found = [self.model(**self.task.batch(self.run.split, rows)).logits.float().cpu() for rows in chunks]
        return self.task.score(torch.cat(found), labels.cpu())


def train_together(
    task: Task, runs: Sequence[Run], streams: Sequence[torch.cuda.Stream | None], until: float
) -> Iterator[dict[str, Any]]:
    """Train runs beside each other, one on each stream, and yield their rows; a run that fails has its error in one.

    Yields nothing more once `until` (of `time.time`) has passed.
    """
    ready: list[tuple[Training, Any, Any, str | None]] = []
    for run, stream in zip(runs, streams, strict=False):
        place = nullcontext() if stream is None else torch.cuda.stream(stream)
        try:
            with place:
                training, step, recorded = Training(task, run), None, None
                if stream is not None:
                    try:
                        step = training.record(stream).replay
                    except RuntimeError as error:  # then step by step, and the row says so
                        recorded = f"{type(error).__name__}: {error}"[:500]
                        torch.cuda.synchronize()
                training.begin()
            ready.append((training, step or training.step, place, recorded))
        except Exception:
            yield run.row() | {"error": traceback.format_exc()[-2000:]}
    if any(stream is not None for stream in streams):
        torch.cuda.synchronize()
    for number in range(max((training.steps for training, *_ in ready), default=0)):
        for training, step, place, _ in ready:
            if number < training.steps:
                with place:
                    step()
        if number % 50 == 49:
            for stream in streams:  # or the host would run ahead of what it has to stop
                if stream is not None:
                    stream.synchronize()
            if time.time() > until:
                return
    for training, _, place, recorded in ready:
        try:
            with place:
                found = training.score()
            more = {"recording_error": recorded} if recorded else {}
            yield training.run.row() | {
                "score": found,
                "measure": task.measure,
                "trained_numbers": training.numbers,
                "steps": training.steps,
                "seconds": training.seconds,
                "device": torch.cuda.get_device_name() if training.device.type == "cuda" else "cpu",
                **more,
            }
        except Exception:
            yield training.run.row() | {"error": traceback.format_exc()[-2000:]}
