"""Run by test_prior under torchrun: estimates on two processes, and writes down what each rank has at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn

from s2ft_diffusion import S2FTConfig, estimate_prior

Part = tuple[int, torch.Tensor]


class Branches(nn.Module):
    """Two layers whose order, and whether the second takes part at all, depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = (nn.Linear(10, 10) for _ in range(3))

    def forward(self, x: torch.Tensor, kind: int) -> torch.Tensor:
        if kind == 0:
            return self.last(self.two(self.one(x).tanh()).tanh())
        return self.last(self.one(self.two(x).tanh()).tanh()) if kind == 1 else self.last(self.one(x).tanh())


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Branches(), S2FTConfig(target_modules=["one", "two", "last"], n_frequency=20))


def branching(model: nn.Module) -> Callable[[Part], torch.Tensor]:
    return lambda part: model(part[1], part[0]).square().mean()


def data(rank: int) -> list[Part]:
    """Batches of a process: which branch, and inputs."""
    generator = torch.Generator().manual_seed(rank)
    kinds = ([0, 1, 2, 2], [0, 0, 1, 2])[rank]
    return [(kind, torch.randn(4, 10, generator=generator)) for kind in kinds]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {}
    for estimate in ("gradient", "normalized", "scaled", "full"):
        model = new_model()
        prior = estimate_prior(model, branching(model), data(dist.get_rank()), estimate=estimate)
        found[estimate] = dict(prior.items())
    torch.save(found, f"{sys.argv[1]}/rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
