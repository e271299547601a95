"""The methods of a comparison: what each puts into a denoiser, at sizes that are fixed in relation to S²FT's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import FourierFTConfig, LoraConfig, OFTConfig, PeftConfig, WaveFTConfig
from torch import nn

from s2ft_diffusion.dreambooth.arguments import S2FT_OPTIONS
from s2ft_diffusion.dreambooth.batches import ESTIMATE_SHARE, FULL_DRAWS
from s2ft_diffusion.dreambooth.settings import AdapterSettings, EstimateSettings
from s2ft_diffusion.tuner.layer import delta_shape
from s2ft_diffusion.tuner.prior import Estimate

FOURIER_NUMBERS = 1 / 0.8  # of FourierFT and WaveFT, for each of S²FT's
LORA_NUMBERS = 12.0

Kind = Literal["drawn", "base", "full", "lora", "lora-bytes", "oft", "fourierft", "waveft", "s2ft"]


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    `rate` is where the search for its learning rate begins; `adapter` and `estimate` are S²FT's settings, for methods
    of that kind.
    """

    name: str
    title: str
    kind: Kind
    rate: float = 0.0
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    estimate: EstimateSettings = field(default_factory=EstimateSettings)

    @property
    def trains(self) -> bool:
        return self.kind not in ("drawn", "base")

    def definition(self) -> dict[str, Any]:
        """What the method is at this moment, presets resolved: results of another definition are no results of it."""
        return {"kind": self.kind, **(self._options() if self.kind == "s2ft" else {})}

    def _options(self) -> dict[str, Any]:
        config = self.adapter.config(["any"], 0)
        options = {name: getattr(config, name) for name in S2FT_OPTIONS if name != "n_frequency"}
        if "n_frequency" in self.adapter.options:  # its own size instead of the comparison's
            options["n_frequency"] = config.n_frequency
        draws = self.estimate.draws
        if draws is None:  # then by a rule, which is part of what the method is
            draws = [ESTIMATE_SHARE, *FULL_DRAWS]
        return {**options, "estimate": self.estimate.kind, "estimate_draws": draws}


def s2ft(
    name: str,
    title: str,
    rate: float,
    preset: str = "default",
    *,
    estimate: Estimate | None = None,
    estimate_draws: int | None = None,
    **options: Any,
) -> Method:
    """S²FT by a preset, with fields of its config, or another estimate, instead of the preset's."""
    adapter = AdapterSettings(preset, options=options)
    return Method(name, title, "s2ft", rate, adapter, EstimateSettings.of(preset, estimate, estimate_draws))


# Not to be trained: what the others are beside. DRAWN is what they aim at, where a subject can be drawn.
DRAWN = Method("drawn", "the subject, drawn", "drawn")
BASE = Method("base", "base, nothing trained", "base")
REFERENCES = (DRAWN, BASE)
METHODS = (
    Method("full", "DreamBooth, full", "full", 1e-5),
    Method("lora", "LoRA", "lora", 1e-4),
    Method("lora-bytes", "LoRA, nearest in bytes", "lora-bytes", 3e-4),
    Method("oft", "OFT", "oft", 1e-3),
    Method("fourierft", "FourierFT", "fourierft", 1e-2),
    Method("waveft", "WaveFT", "waveft", 1e-4),
    s2ft("s2ft-paper", "S²FT, paper", 1e-2, "paper"),
    s2ft("s2ft-default", "S²FT, default", 1e-3),
)


def numbers(n_frequency: int | float, layer: nn.Module, factor: float = 1.0) -> int:
    """Real trainable numbers of a layer: `n_frequency` as the trainer reads it, times a factor."""
    each = n_frequency * layer.weight.numel() if isinstance(n_frequency, float) else n_frequency
    return min(round(factor * each), layer.weight.numel())


def lora_rank(denoiser: nn.Module, targets: Sequence[str], n_frequency: int | float) -> int:
    """The least rank at which LoRA has at least `LORA_NUMBERS` times the numbers of S²FT, on the same layers."""
    layers = [denoiser.get_submodule(name) for name in targets]
    wanted = LORA_NUMBERS * sum(numbers(n_frequency, layer) for layer in layers)
    return math.ceil(wanted / sum(sum(delta_shape(layer)) for layer in layers))


def lora_rank_of_equal_bytes(denoiser: nn.Module, targets: Sequence[str], n_frequency: int | float) -> int:
    """The greatest rank at which LoRA's numbers take no more bytes than S²FT's file, and 1 if there is none.

    S²FT's file holds, beside its numbers, both orders and signs of every layer.
    """
    layers = [denoiser.get_submodule(name) for name in targets]
    sides = [side for layer in layers for side in delta_shape(layer)]
    bits = sum(16 * numbers(n_frequency, layer) for layer in layers)
    bits += sum(side * (math.ceil(math.log2(max(side, 2))) + 1) for side in sides)
    return max(1, bits // (16 * sum(sides)))


def oft_block_size(denoiser: nn.Module, targets: Sequence[str], n_frequency: int | float) -> int:
    """The greatest power of two at which OFT's blocks have at most as many numbers as LoRA has in the comparison.

    A block of b inputs has b (b - 1) / 2 numbers; no linear layer's inputs may leave a rest.
    """
    inputs = [layer.in_features for layer in _linear(denoiser, targets).values()]
    layers = [denoiser.get_submodule(name) for name in targets]
    allowed = lora_rank(denoiser, targets, n_frequency) * sum(sum(delta_shape(layer)) for layer in layers)
    size = 2
    while all(k % (2 * size) == 0 for k in inputs) and sum(k * (2 * size - 1) / 2 for k in inputs) <= allowed:
        size *= 2
    return size


def _linear(denoiser: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    layers = {name: denoiser.get_submodule(name) for name in targets}
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}


def peft_config(
    kind: Kind, denoiser: nn.Module, targets: Sequence[str], n_frequency: int | float, seed: int
) -> PeftConfig:
    """PEFT's configuration of a method that it has: its own defaults but for the size, LoRA as diffusers' script.

    FourierFT starts at zero, as all others do: its default start, random coefficients, spoils a diffusion model. It and
    WaveFT adapt no convolutions, and PEFT's OFT changes what a convolution gives before it is trained: where there are
    some among the targets, the linear layers have their numbers too.
    """
    if kind in ("lora", "lora-bytes"):
        rank = (lora_rank if kind == "lora" else lora_rank_of_equal_bytes)(denoiser, targets, n_frequency)
        return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
    linear = _linear(denoiser, targets)
    if kind == "oft":
        size = oft_block_size(denoiser, targets, n_frequency)
        return OFTConfig(r=0, oft_block_size=size, target_modules=list(linear))
    spread = sum(numbers(n_frequency, denoiser.get_submodule(name)) for name in targets)
    spread /= sum(numbers(n_frequency, layer) for layer in linear.values())
    pattern = {name: numbers(n_frequency, layer, FOURIER_NUMBERS * spread) for name, layer in linear.items()}
    config = {"fourierft": FourierFTConfig, "waveft": WaveFTConfig}[kind]
    sizes = {"n_frequency": max(pattern.values()), "n_frequency_pattern": pattern}
    return config(init_weights=True, random_loc_seed=seed, target_modules=list(linear), **sizes)
