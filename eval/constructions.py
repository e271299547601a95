"""Ways from a prior to a layer's rearrangement and positions, one change at a time from the paper's to the default."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from s2ft_diffusion.tuner.config import S2FTConfig
from s2ft_diffusion.tuner.delta import make_delta
from s2ft_diffusion.tuner.grid import Grid
from s2ft_diffusion.tuner.prior import rearrangement_for
from s2ft_diffusion.tuner.rearrange import Rearrangement
from s2ft_diffusion.tuner.seeding import seeded
from s2ft_diffusion.tuner.spectrum import Sampling

from . import energy

PriorName = Literal["gradient", "normalized", "full", "full, three times", "true change"]
# How each prior is estimated: the recipe's --estimate and --estimate_draws.
PRIORS: dict[str, tuple[str, int]] = {
    "gradient": ("gradient", 8),
    "normalized": ("normalized", 8),
    "full": ("full", 8),
    "full, three times": ("full", 24),
}


@dataclass(frozen=True)
class Construction:
    """A prior's name and the options of `S2FTConfig` that matter before training."""

    name: str
    prior: PriorName
    config: S2FTConfig

    def rearrangement(self, prior: torch.Tensor, layer: str) -> Rearrangement:
        """The rearrangement of a layer's prior (d, k)."""
        return rearrangement_for(prior, self.config, seeded(self.config.seed, layer))

    def share_reached(
        self,
        truth: torch.Tensor,
        prior: torch.Tensor,
        rearrangement: Rearrangement,
        layer: str,
        sampling: Sampling,
        n_frequency: int | float,
    ) -> float:
        """The share of a true change's energy that a budget of real numbers reaches, placed by the prior."""
        delta = make_delta(tuple(prior.shape), self.config, n_frequency)
        config = replace(self.config, sampling=sampling)
        chosen = delta.choose(config, rearrangement.invert(prior), seeded(config.seed, layer, "positions"), layer)
        if self.config.positions == "free":
            return energy.share_reached(truth, chosen["positions"], rearrangement, self.config.coefficients)
        return energy.share_on_grid(truth, Grid(**{"places": None, **chosen}), rearrangement)


def constructions(seed: int = 0) -> list[Construction]:
    """From no rearrangement to the paper's, step by step to the default, and what the true change itself would give."""
    paper = S2FTConfig.from_preset("paper", seed=seed)
    default = S2FTConfig.from_preset("default", seed=seed)
    free = replace(default, positions="free")
    steps = [
        Construction("no rearrangement", "gradient", replace(paper, rearrange="none")),
        Construction("paper: nearest neighbour, real", "gradient", paper),
    ]
    for name, change in {
        "+ complex": {"coefficients": "complex"},
        "+ cosine distance": {"distance": "cosine"},
        "+ signs": {"signs": True},
        "+ 2-opt": {"refine": "2opt", "norm": default.norm, "scaling": default.scaling},
    }.items():
        steps.append(Construction(name, "gradient", replace(steps[-1].config, **change)))
    return [
        *steps,
        Construction("+ normalised prior", "normalized", steps[-1].config),
        Construction("+ prior of 48 steps of full fine-tuning", "full", steps[-1].config),
        Construction(f"+ γ = {free.gamma:g}", "full", free),
        Construction("default: on a grid", "full", default),
        Construction("default, three times the steps", "full, three times", default),
        Construction("paper, ordered by the true change", "true change", paper),
        Construction("default, ordered by the true change", "true change", default),
    ]
