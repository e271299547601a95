"""A resumable training loop, and the parts that every network's training has."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

LOG_EVERY = 100


class Stage:
    """A resumable training loop over `parts` (whatever has `state_dict` and `load_state_dict`).

    State is saved in `folder`/NAME.pt every `every` steps and at the end, records in NAME.jsonl. A step that takes all
    that is random from its number makes an interrupted stage end as an uninterrupted one does.
    """

    def __init__(self, name: str, folder: Path, parts: dict[str, Any], every: int = 500) -> None:
        self.name, self.parts, self.every = name, parts, every
        self.path = folder / f"{name}.pt"
        self.log_path = folder / f"{name}.jsonl"
        self.start, self.seconds = 0, 0.0
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            self.start, self.seconds = saved["step"], saved["seconds"]
            for key, part in parts.items():
                part.load_state_dict(saved[key])

    def run(self, steps: int, step: Callable[[int], float | torch.Tensor]) -> None:
        """Call `step(i)`, which returns a loss, for every step that is not done yet."""
        begun, total, count = time.time() - self.seconds, 0.0, 0
        for i in range(self.start, steps):
            loss = step(i)
            total, count = total + (loss.detach() if isinstance(loss, torch.Tensor) else loss), count + 1
            if (i + 1) % LOG_EVERY == 0 or i + 1 == steps:
                self._log(i + 1, float(total) / count, time.time() - begun)
                total, count = 0.0, 0
            if (i + 1) % self.every == 0 or i + 1 == steps:
                self.seconds = time.time() - begun
                self._save(i + 1)

    def _log(self, step: int, loss: float, seconds: float) -> None:
        record = {"step": step, "loss": loss, "seconds": round(seconds, 1)}
        print(self.name, json.dumps(record), flush=True)
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")

    def _save(self, step: int) -> None:
        state = {key: part.state_dict() for key, part in self.parts.items()}
        temporary = self.path.with_suffix(".tmp")
        torch.save({"step": step, "seconds": self.seconds, **state}, temporary)
        temporary.replace(self.path)


class Training:
    """A network with AdamW, a moving average of its weights, and a rate: warm-up, constant, then down to a hundredth.

    The rate falls over the last 45 % of the steps.
    """

    def __init__(
        self, network: nn.Module, rate: float, steps: int, *, warmup: int, decay: float, weight_decay: float = 0.0
    ) -> None:
        self.network, self.rate, self.steps, self.warmup = network, rate, steps, warmup
        self.average = EMAModel(network.parameters(), decay=decay, foreach=True)
        self.average.to(next(network.parameters()).device)
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )

    @property
    def parts(self) -> dict[str, Any]:
        """What a `Stage` saves."""
        return {"network": self.network, "average": self.average, "optimizer": self.optimizer}

    def update(self, loss: torch.Tensor, i: int) -> None:
        """One step down the gradient of `loss`."""
        left = (1 - i / self.steps) / 0.45
        set_rate(self.optimizer, self.rate * min(1.0, (i + 1) / self.warmup) * max(0.01, min(1.0, left)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.network.parameters())

    def finish(self) -> None:
        """Leave the network with its averaged weights, frozen."""
        self.average.copy_to(self.network.parameters())
        self.network.requires_grad_(False).eval()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def step_generator(stage: int, step: int, device: torch.device) -> torch.Generator:
    """All randomness of one step of one stage."""
    return torch.Generator(device).manual_seed(stage * 1_000_000_007 + step)
