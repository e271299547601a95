"""Small models, batches and losses that the tests of the estimates share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from s2ft_diffusion import S2FTConfig, estimate_prior

STEP = 0.05


def adapted(model: nn.Module, targets=("first", "second")) -> nn.Module:
    return get_peft_model(model, S2FTConfig(target_modules=list(targets), n_frequency=20))


def batches(count: int = 6, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return list(torch.randn(count, 4, 12, generator=torch.Generator().manual_seed(3)).to(dtype))


def loss_of(model: nn.Module):
    return lambda batch: model(batch).float().square().mean()


def full(model: nn.Module, data, **options) -> dict[str, torch.Tensor]:
    found = estimate_prior(model, loss_of(model), data, estimate="full", **options)
    return {name.removeprefix("base_model.model."): matrix for name, matrix in found.items()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
