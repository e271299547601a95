"""One adapter's weight change of one layer, as a module: `SpectralDelta`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import S2FTConfig
from .delta_cache import delta_cache
from .product import ProductIndex, index_product, prefers_spectrum, spectral_product
from .rearrange import Rearrangement
from .spectrum import SpectrumIndex, delta_weight, index_dtype, index_spectrum


class SpectralDelta(nn.Module):
    """One adapter's weight change of one layer: trainable coefficients, their positions and the rearrangement.

    State, for a (d, k) layer with m positions: `coefficients` (m, 2) or (m,) float; `positions` (m, 2), `row_order`
    (d,) and `column_order` (k,) int32, or int16 with the config's `inference_mode` where no side is longer than 32,767
    (there may be a hundred adapters, but process groups know no int16); `row_sign` (d,) and `column_sign` (k,) int8.

    Calling it gives the unscaled (d, k) weight change in float32 (float64 for float64 coefficients), or, with inputs
    (..., k), their product (..., d) with it. A module, so that whatever moves a module's weights around its call
    (offloading, sharding) finds it.
    """

    def __init__(self, shape: tuple[int, int], config: S2FTConfig, positions: torch.Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.norm = config.norm
        count = len(positions)
        size = (count, 2) if config.coefficients == "complex" else (count,)
        start = torch.zeros(size) if config.init_weights else torch.randn(size)
        self.coefficients = nn.Parameter(start)
        identity = Rearrangement.identity(*shape)
        dtype = index_dtype(shape) if config.inference_mode else torch.int32
        self.register_buffer("positions", positions.to(dtype))
        self.register_buffer("row_order", identity.row_order.to(dtype))
        self.register_buffer("column_order", identity.column_order.to(dtype))
        self.register_buffer("row_sign", identity.row_sign)
        self.register_buffer("column_sign", identity.column_sign)
        self._indexes: dict[type, tuple[list[tuple[torch.Tensor, int, torch.device]], Any]] | None = None

    @property
    def rearrangement(self) -> Rearrangement:
        return Rearrangement(self.row_order.int(), self.column_order.int(), self.row_sign, self.column_sign)

    @torch.no_grad()
    def place(self, positions: torch.Tensor, rearrangement: Rearrangement) -> None:
        """Set positions (m, 2) and rearrangement in place, and the coefficients to zero."""
        self.positions.copy_(positions)
        for name in ("row_order", "column_order", "row_sign", "column_sign"):
            getattr(self, name).copy_(getattr(rearrangement, name))
        self.coefficients.zero_()
        self._indexes = None

    def _indexed(self, kind: type[SpectrumIndex] | type[ProductIndex]) -> Any:
        """The index made of the buffers, kept in training until a buffer has changed or moved.

        Not in sampling: a pipeline may hold many adapters, and an index takes more room than what it is made from.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self.positions.is_inference():
            self._indexes = None
            return self._index(kind)
        state = [(buffer, buffer._version, buffer.device) for buffer in self._buffers.values()]
        indexes = self._indexes
        if indexes is None:
            indexes = self._indexes = {}
        if kind in indexes:
            seen, index = indexes[kind]
            if all(a is b and v == w and x == y for (a, v, x), (b, w, y) in zip(seen, state, strict=True)):
                return index
        index = self._index(kind)
        indexes[kind] = (state, index)
        return index

    def _index(self, kind: type[SpectrumIndex] | type[ProductIndex]) -> Any:
        if kind is SpectrumIndex:
            return index_spectrum(self.positions, self.shape), self.rearrangement
        return index_product(self.positions, self.rearrangement, self.norm, real=self.coefficients.ndim == 1)

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        coefficients = self.coefficients
        if coefficients.dtype != torch.float64:
            coefficients = coefficients.float()  # no transform exists in half precision
        if x is not None:
            return spectral_product(x, coefficients, self._indexed(ProductIndex))
        index, rearrangement = self._indexed(SpectrumIndex)
        return delta_weight(coefficients, index, rearrangement, self.norm)

    def prefers_product(self, x: torch.Tensor) -> bool:
        """Whether to multiply inputs x (..., in_features) in the spectrum, where the dense change is for them alone."""
        if torch.compiler.is_compiling():
            return False
        return prefers_spectrum(x.numel() // x.shape[-1], len(self.positions), self.shape)

    def kept(self) -> torch.Tensor:
        """The same weight change, made once and kept until something it depends on has changed."""
        sources = self.sources()
        return self() if sources is None else delta_cache.get(self, None, sources, self)

    def sources(self) -> list[torch.Tensor] | None:
        """What the weight change depends on; None where something made from it could not be kept right.

        That is while gradients are on (the coefficients are about to change), while tracing, and where hooks bring
        weights in for the call alone.
        """
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() or self._forward_pre_hooks or "forward" in self.__dict__:
            delta_cache.drop(self)
            return None
        return [*self._parameters.values(), *self._buffers.values()]

    def extra_repr(self) -> str:
        return f"shape={self.shape}, positions={len(self.positions)}, numbers={self.coefficients.numel()}"
