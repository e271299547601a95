"""`S2FTConfig`: everything about an S2FT adapter but its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from peft import PeftConfig

from .rearrange import Distance
from .spectrum import CoefficientKind, Norm, Sampling


class S2FTType(str, Enum):  # noqa: UP042
    """The name under which PEFT knows the method (a str, and an Enum because transformers reads `.value`)."""

    S2FT = "S2FT"


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "n_frequency": 8000,
        "positions": "free",
        "scaling": 100.0,  # the paper does not say; measured
        "coefficients": "real",
        "norm": "backward",
        "sampling": "power",
        "gamma": 1.5,
        "distance": "euclidean",
        "signs": False,
        "refine": None,
    },
    "default": {},
}


@dataclass
class S2FTConfig(PeftConfig):
    """Configuration of an S2FT adapter (Zhang et al., CVPR 2026).

    Args:
        target_modules: names of the linear layers and convolutions to adapt, or a regular expression, or "all-linear",
            as in PEFT. `s2ft_diffusion.attention_targets` lists a diffusion model's attention projections, or more.
        exclude_modules: names of, or a regular expression for, layers to leave alone.
        n_frequency: at most so many real trainable numbers in each layer; an int, or a float below 1 for a share of
            the layer's d * k.
        n_frequency_pattern: layer names or regular expressions to their own `n_frequency`.
        scaling: the factor alpha of Eq. 3, applied to every delta weight.
        positions: "grid" (a table between row and column frequency functions; three thin products, exactly a LoRA) or
            "free" (anywhere in the spectrum, as in the paper; a dense weight change in every step).
        oversampling: on a grid, places of the table for each trained number: 1 trains them all; with more, `sampling`
            draws those that are trained.
        coefficients: at free positions, "complex" (half plane, two numbers a position) or "real" (full plane, one
            number; the paper).
        norm: at free positions, the inverse transform's normalisation: "ortho" (1 / sqrt(d * k)) or "backward"
            (1 / (d * k); the paper). A grid's functions are orthonormal.
        sampling: how positions are chosen: "power" (drawn by Eq. 7), "top" (the prior's largest), "low_frequency" or
            "random". A grid's functions are the prior's strongest for both of the first two. Without a prior, as after
            plain construction, these draw as "low_frequency" does until `initialize_s2ft_weights` has been called.
        gamma: exponent of the sampling probability (Eq. 7; 1.5 in the paper).
        rearrange: "nearest_neighbor" (Alg. 1; of convolutions rows alone) or "none" (the identity, FourierFT's).
        distance: between rows and between columns: "cosine" or "euclidean" (the paper).
        signs: let rows and columns be negated where that brings them nearer to their neighbours.
        refine: "2opt" shortens the greedy path afterwards; None leaves it as it is (the paper).
        seed: of starting points and positions.
        init_weights: True starts at a delta weight of zero, False at random coefficients (for tests).
        modules_to_save: further modules to train and save whole.
        layers_to_transform: restrict to layers by index, as in PEFT.
        layers_pattern: the name of the list that the indexes are of, as in PEFT.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    n_frequency: int | float = 8000
    n_frequency_pattern: dict[str, int | float] = field(default_factory=dict)
    scaling: float = 1.0
    positions: Literal["grid", "free"] = "grid"
    oversampling: int = 1
    coefficients: CoefficientKind = "complex"
    norm: Norm = "ortho"
    sampling: Sampling = "power"
    gamma: float = 2.0
    rearrange: Literal["nearest_neighbor", "none"] = "nearest_neighbor"
    distance: Distance = "cosine"
    signs: bool = True
    refine: Literal["2opt"] | None = "2opt"
    seed: int = 0
    init_weights: bool = True
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = S2FTType.S2FT
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        choices = {
            "positions": ("grid", "free"),
            "coefficients": ("complex", "real"),
            "norm": ("ortho", "backward"),
            "sampling": ("power", "top", "low_frequency", "random"),
            "rearrange": ("nearest_neighbor", "none"),
            "distance": ("cosine", "euclidean"),
            "refine": ("2opt", None),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if not isinstance(self.n_frequency_pattern, dict):
            raise ValueError(f"n_frequency_pattern must be a dict, got {self.n_frequency_pattern!r}.")
        pattern = {f"n_frequency_pattern[{name!r}]": value for name, value in self.n_frequency_pattern.items()}
        for name, value in {"n_frequency": self.n_frequency, **pattern}.items():
            share = isinstance(value, float) and 0 < value < 1  # which nan is not
            if not share and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an int of at least 1 or a share above 0 and below 1, got {value!r}.")
        for name in ("scaling", "gamma"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}.")
        if self.gamma < 0:
            raise ValueError(f"gamma must not be negative, got {self.gamma}.")
        if not isinstance(self.signs, bool) or isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"signs must be a bool and seed an int, got {self.signs!r} and {self.seed!r}.")
        if isinstance(self.oversampling, bool) or not isinstance(self.oversampling, int) or self.oversampling < 1:
            raise ValueError(f"oversampling must be an int of at least 1, got {self.oversampling!r}.")
        if self.positions == "grid" and (self.coefficients, self.norm) != ("complex", "ortho"):
            raise ValueError('coefficients and norm are choices of positions="free"; a grid has orthonormal functions.')
        if self.positions == "free" and self.oversampling != 1:
            raise ValueError('oversampling is a choice of positions="grid".')
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform.")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """PEFT's door for what it has loaded; a config of a release that had no grids says nothing of `positions`."""
        if "positions" not in kwargs:
            kwargs["positions"] = "free"
            kwargs.pop("bias", None)  # it was always "none"
        return super().from_peft_type(**kwargs)

    @classmethod
    def from_preset(cls, preset: str, **options: Any) -> S2FTConfig:
        """The "paper" or the "default" preset, with `options` on top.

        "paper" is the paper in every choice it states; "default" has this package's additions. The presets do not
        choose `target_modules`: `attention_targets(model, "qv")` is the paper's choice.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {tuple(PRESETS)}, got {preset!r}.")
        return cls(**{**PRESETS[preset], **options})
