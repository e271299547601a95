"""What is run: tasks, methods, and the studies made of them, in the order in which they are worth having."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetuning import MethodArguments

METHODS = ("full", "lora", "fourierft", "s2ft paper", "s2ft default")
RATES = {  # as many for each method, a factor of three apart
    "full": (1e-5, 3e-5, 1e-4, 3e-4),
    "lora": (1e-4, 3e-4, 1e-3, 3e-3),
    "fourierft": (1e-2, 3e-2, 1e-1, 3e-1),
    "s2ft paper": (1e-2, 3e-2, 1e-1, 3e-1),
    "s2ft default": (1e-3, 3e-3, 1e-2, 3e-2),
}
RANK = 8  # LoRA: 12 x 512 numbers in a layer of 384 x 384
NUMBERS = {"images": {"fourierft": 1024}, "ratings": {}, "sources": {}}  # a layer, where not 512
S2FT_NUMBERS = 512
TASKS = tuple(NUMBERS)
SEEDS = (1, 2, 3, 4, 5)
EPOCH = 16  # batches of images: 1,000 at 64


@dataclass(frozen=True)
class Run:
    """One training. A rate of None is the method's best on the validation split, times `rate_factor`."""

    task: str
    study: str
    method: str
    seed: int
    split: str = "test"
    rate: float | None = None
    rate_factor: float = 1.0
    numbers: int = S2FT_NUMBERS  # a layer; of S2FT and FourierFT
    options: tuple[tuple[str, Any], ...] = ()  # S2FTConfig's
    estimate: str = "auto"
    estimate_batches: int = EPOCH

    def key(self) -> tuple[Any, ...]:
        """What tells runs apart, whatever rate they turn out to have."""
        rate = self.rate if self.split == "validation" else None
        return self.task, self.study, self.method, self.seed, self.split, rate, self.numbers, self.options, *self.prior

    @property
    def prior(self) -> tuple[str, int]:
        return self.estimate, self.estimate_batches

    def arguments(self) -> MethodArguments:
        """The flags of the example scripts that this run has."""
        from finetuning import MethodArguments  # with transformers and datasets: not needed to make a queue

        method, _, preset = self.method.partition(" ")
        return MethodArguments(
            method=method,
            preset=preset or "default",
            n_frequency=self.numbers,
            rank=RANK,
            s2ft_options=json.dumps(dict(self.options)),
            estimate=self.estimate,
            estimate_batches=self.estimate_batches,
        )

    def row(self) -> dict[str, Any]:
        return asdict(self) | {"options": dict(self.options)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Run:
        known = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        return cls(**known | {"options": tuple(row["options"].items())})


def rates(task: str, method: str) -> tuple[float, ...]:
    """The learning rates that are tried: the lowest is for images alone, where too high a one spoils a good model."""
    return RATES[method] if task == "images" else RATES[method][1:]


def main_run(task: str, method: str, seed: int, **more: Any) -> Run:
    """A method at its size in the comparison."""
    return Run(task, "comparison", method, seed, numbers=NUMBERS[task].get(method, S2FT_NUMBERS), **more)


def ablations(seed: int, task: str = "images") -> list[Run]:
    """The paper's Figure 6 and Tables 6, 7 and 9, on one task; what the comparison has already is not here."""
    found = []
    for numbers in (128, 2048, 256, 1024, 512):  # Figure 6
        for method in ("fourierft", "s2ft paper", "s2ft default"):
            run = main_run(task, method, seed)
            if numbers != run.numbers:  # a step of the same size in the weights
                factor = math.sqrt(run.numbers / numbers)
                found.append(replace(run, study="numbers", numbers=numbers, rate_factor=factor))
    for method in ("s2ft paper", "s2ft default"):
        run = main_run(task, method, seed)
        for sampling in ("random", "low_frequency"):  # Table 7
            found.append(replace(run, study="sampling", options=(("sampling", sampling),)))
        found.append(replace(run, study="order", options=(("rearrange", "none"),)))
    paper, default = (replace(main_run(task, f"s2ft {p}", seed), study="prior") for p in ("paper", "default"))
    found += [
        replace(paper, estimate="full"), replace(paper, estimate="full", estimate_batches=3 * EPOCH),
        replace(default, estimate="gradient"), replace(default, estimate_batches=3 * EPOCH),
    ]  # Table 6  # fmt: skip
    found += [replace(paper, study="gamma", options=(("gamma", gamma),)) for gamma in (0.5, 1.0, 2.0, 3.0, 5.0)]
    return found


def queue(tasks: Iterable[str] = TASKS, seeds: Sequence[int] = SEEDS, ablated: str = "images") -> list[Run]:
    """All runs, the most wanted first: rates, then seeds with all methods alike, then one task's ablations."""
    found = []
    for task in tasks:
        for place in (-2, -3, -1, -4):  # the middle ones first
            for method in METHODS:
                tried = rates(task, method)
                if -place <= len(tried):
                    found.append(main_run(task, method, 0, split="validation", rate=tried[place]))
    for seed in seeds:
        found += [main_run(task, method, seed) for task in tasks for method in METHODS]
    if ablated in tasks:
        for seed in seeds[:3]:
            found += ablations(seed, ablated)
    return found


def score(row: Mapping[str, Any]) -> float:
    """A row's score, one that is missing or not a number (a constant has no correlation) as the worst there is."""
    value = row.get("score")
    return value if value is not None and math.isfinite(value) else -1.0


def best_rate(rows: Iterable[Mapping[str, Any]], task: str, method: str) -> float | None:
    """The rate of a method's best validation row; None while not all of its rates have one."""
    tried = [r for r in rows if (r["task"], r["method"], r["split"]) == (task, method, "validation")]
    if len({row["rate"] for row in tried}) < len(rates(task, method)):
        return None
    return max(tried, key=score)["rate"]


def with_rate(run: Run, rows: Iterable[Mapping[str, Any]]) -> Run | None:
    """The run with its rate filled in; None where it is not known yet."""
    if run.rate is not None:
        return run
    rate = best_rate(rows, run.task, run.method)
    return None if rate is None else replace(run, rate=rate * run.rate_factor)
