"""Adapters as low-rank changes: exactly where positions are on a grid, by the best approximation where they are free.

Needs torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from .reading import Adapter, AdapterInfo
from .weights import GridWeights, LayerWeights

T = TypeVar("T")
Progress = Callable[[Sequence[T], str], Iterable[T]]  # goes through a sequence, whose work it names
Kernels = Mapping[str, Mapping[str, tuple[int, ...]]]  # of convolutions, by component and layer


def silent(items: Sequence[T], doing: str) -> Iterable[T]:
    """No progress shown."""
    return items


@dataclass
class LoraLayer:
    """A weight change `up @ down` of one layer, its scale included: `up` (d, r), `down` (r, k).

    `kernel` is a convolution's, () for a linear layer; then k is in / groups * prod(kernel).
    """

    up: torch.Tensor
    down: torch.Tensor
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> torch.Tensor:
        """The weight change (d, k), float32."""
        return self.up.float() @ self.down.float()

    def norm(self) -> float:
        """The Frobenius norm of the weight change, without making it."""
        up, down = self.up.double(), self.down.double()
        return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))

    def to(self, dtype: torch.dtype) -> LoraLayer:
        """The same in another type. Raises ValueError for entries that are not finite in it."""
        up, down = self.up.to(dtype), self.down.to(dtype)
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise ValueError(f"factors that are not finite in {str(dtype).removeprefix('torch.')}")
        return LoraLayer(up, down, self.kernel)

    def balanced(self) -> LoraLayer:
        """The same change with factors of one magnitude, so that half precision has room for both.

        The factor is a power of two, which rounds nothing.
        """
        up, down = float(self.up.abs().max()), float(self.down.abs().max())
        if not (up > 0 and down > 0 and math.isfinite(up) and math.isfinite(down)):
            return self
        factor = 2.0 ** round(math.log2(down / up) / 2)
        return LoraLayer(self.up * factor, self.down / factor, self.kernel)


@dataclass
class Lora:
    """A LoRA apart from any model and any tool's names: layers by component, and what is known about it."""

    layers: dict[str, dict[str, LoraLayer]]
    info: AdapterInfo = field(default_factory=AdapterInfo)

    @property
    def numbers(self) -> int:
        return sum(x.up.numel() + x.down.numel() for layers in self.layers.values() for x in layers.values())

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest."""
        ranks = [layer.rank for layers in self.layers.values() for layer in layers.values()]
        return min(ranks), max(ranks)


@dataclass
class Errors:
    """How far a conversion is from the weight change: ||error|| and ||change|| (Frobenius) by component and layer."""

    layers: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def relative(self, place: tuple[str, str]) -> float:
        error, change = self.layers[place]
        return error / change if change else float(error > 0)

    @property
    def total(self) -> float:
        """The error of all layers together, relative to the whole change."""
        change = math.hypot(*(change for _, change in self.layers.values()))
        return math.hypot(*(error for error, _ in self.layers.values())) / change if change else 0.0

    @property
    def worst(self) -> tuple[tuple[str, str], float]:
        """The layer with the largest relative error, and that error."""
        place = max(self.layers, key=self.relative)
        return place, self.relative(place)


def low_rank(layer: LayerWeights, scaling: float, *, rank: int | None = None, error: float | None = None) -> LoraLayer:
    """A layer's weight change times `scaling` as two factors, float32.

    On a grid exactly, unless `rank` or `error` asks for less; at free positions the best approximation of a `rank`, or
    of the smallest rank whose relative error is at most `error`. Raises ValueError at free positions without either.
    """
    exact = None
    if isinstance(layer, GridWeights):
        up, down = layer.factors()
        exact = LoraLayer(up * scaling, down)
        if error is None and (rank is None or rank >= exact.rank):
            return exact.balanced()
    elif rank is None and error is None:
        raise ValueError("its positions are free, so a LoRA only approximates it: give a rank or an error")
    return truncate(exact.delta() if exact else layer.delta() * scaling, rank=rank, error=error)


def truncate(delta: torch.Tensor, *, rank: int | None = None, error: float | None = None) -> LoraLayer:
    """The nearest change to `delta` (d, k) of a rank, or of the smallest rank within a relative error (Eckart-Young).

    By the eigenvectors of the smaller Gram matrix in float64. Singular values below 1e-6 of the largest, which are a
    float32 matrix's rounding, are left out.
    """
    wide = delta.double()
    transposed = wide.shape[0] < wide.shape[1]
    if transposed:
        wide = wide.T
    power, vectors = torch.linalg.eigh(wide.T @ wide)
    power, vectors = power.flip(0).clamp(min=0), vectors.flip(1)
    count = len(power) if rank is None else min(rank, len(power))
    if error is not None:
        rest = power.flip(0).cumsum(0).flip(0)  # of the values from here on
        enough = (rest <= error**2 * rest[0]).nonzero()
        count = min(count, int(enough[0]) if len(enough) else len(power))
    count = max(1, min(count, int((power > power[0] * 1e-12).sum())))
    right = vectors[:, :count]
    left = wide @ right
    up, down = (right, left.T) if transposed else (left, right.T)
    return LoraLayer(up.float().contiguous(), down.float().contiguous()).balanced()


def to_lora(
    adapter: Adapter,
    *,
    rank: int | None = None,
    error: float | None = None,
    dtype: torch.dtype = torch.float32,
    kernels: Kernels | None = None,
    progress: Progress = silent,
) -> tuple[Lora, Errors]:
    """An adapter as a LoRA, its scaling included, and how far that is from it (rounding to `dtype` counts).

    `kernels` are those of convolutions, which the tensors need that tools read. Raises ValueError, naming the layer, as
    `low_rank` and `LoraLayer.to` do.
    """
    places = [(component, name) for component, layers in adapter.layers.items() for name in layers]
    lora, errors = Lora({c: {} for c in adapter.layers}, adapter.info), Errors()
    for component, name in progress(places, "convert"):
        layer, scaling = adapter.layers[component][name], adapter.configs[component].scaling
        try:
            found = low_rank(layer, scaling, rank=rank, error=error)
            found.kernel = tuple((kernels or {}).get(component, {}).get(name, ()))
            stored = found.to(dtype)
        except ValueError as problem:
            raise ValueError(f"{component}.{name}: {problem}.") from None
        lora.layers[component][name] = stored
        errors.layers[component, name] = _error(layer, scaling, stored)
    return lora, errors


def _error(layer: LayerWeights, scaling: float, stored: LoraLayer) -> tuple[float, float]:
    if not isinstance(layer, GridWeights):
        wanted = layer.delta() * scaling
        return float((wanted - stored.delta()).norm()), float(wanted.norm())
    up, down = layer.factors()
    exact = LoraLayer(up * scaling, down)
    return difference(exact, stored), exact.norm()


def difference(first: LoraLayer, second: LoraLayer) -> float:
    """The Frobenius norm of the difference of two changes, without making them."""
    up = torch.cat([first.up.double(), -second.up.double()], dim=1)
    # By an orthonormal basis of the columns: from squares of nearly equal numbers nothing would be left.
    _, small = torch.linalg.qr(up)
    return float((small @ torch.cat([first.down.double(), second.down.double()])).norm())


def add_loras(parts: Sequence[tuple[Lora, float]]) -> Lora:
    """The weighted sum of LoRAs of one base as one, exactly: factors side by side, ranks added.

    Raises ValueError for layers of one name and different shapes.
    """
    total = Lora({}, parts[0][0].info if len(parts) == 1 else _joint_info([lora.info for lora, _ in parts]))
    for lora, weight in parts:
        for component, layers in lora.layers.items():
            into = total.layers.setdefault(component, {})
            for name, layer in layers.items():
                scaled = LoraLayer(layer.up.float() * weight, layer.down.float(), layer.kernel)
                if name not in into:
                    into[name] = scaled
                    continue
                other = into[name]
                if (other.shape, other.kernel) != (scaled.shape, scaled.kernel):
                    raise ValueError(
                        f"{component}.{name} is {other.shape[0]}x{other.shape[1]} in one adapter and "
                        f"{scaled.shape[0]}x{scaled.shape[1]} in another: they are not for one base."
                    )
                up, down = torch.cat([other.up, scaled.up], dim=1), torch.cat([other.down, scaled.down])
                into[name] = LoraLayer(up, down, other.kernel)
    return total


def _joint_info(infos: Sequence[AdapterInfo]) -> AdapterInfo:
    bases = {info.base_model for info in infos}
    prompts = [info.instance_prompt for info in infos if info.instance_prompt]
    subjects = [info.subject for info in infos if info.subject]
    return AdapterInfo(
        base_model=bases.pop() if len(bases) == 1 else None,
        instance_prompt=", ".join(dict.fromkeys(prompts)) or None,
        subject=" + ".join(dict.fromkeys(subjects)) or None,
    )
