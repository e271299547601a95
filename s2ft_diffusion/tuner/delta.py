"""One adapter's weight change of one layer, as a module: `SpectralDelta`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import S2FTConfig
from .cuda_graphs import GraphedTransform, current_stream, graphs_apply
from .delta_cache import delta_cache
from .product import ProductIndex, index_product, prefers_spectrum, spectral_product
from .rearrange import Rearrangement
from .spectrum import SpectrumIndex, index_dtype, index_spectrum, inverse_transform


class SpectralDelta(nn.Module):
    """One adapter's weight change of one layer: trainable coefficients, their positions and the rearrangement.

    State, for a (d, k) layer with m positions: `coefficients` (m, 2) or (m,) float; `positions` (m, 2), `row_order`
    (d,) and `column_order` (k,) int32, or int16 with the config's `inference_mode` where no side is longer than 32,767
    (there may be a hundred adapters, but process groups know no int16); `row_sign` (d,) and `column_sign` (k,) int8.

    Calling it gives the (d, k) weight change times `scale`, in `dtype` or float32 (float64 for float64 coefficients),
    or, with inputs (..., k), their product (..., d) with it. A module, so that whatever moves a module's weights around
    its call (offloading, sharding) finds it.
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
        self._graphed: dict[torch.dtype, GraphedTransform | tuple[SpectrumIndex, int] | None] = {}

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
        self.forget_indexes()

    def forget_indexes(self) -> None:
        """Let go of everything made for training."""
        self._indexes = None
        self._graphed.clear()

    def _indexed(self, kind: type[SpectrumIndex] | type[ProductIndex]) -> Any:
        """The index made of the buffers, kept in training until a buffer has changed or moved.

        Training is where there are gradients, or would be. Not in sampling: a pipeline may hold many adapters, and an
        index takes more room than what it is made from.
        """
        training = torch.is_grad_enabled() or self.coefficients.requires_grad
        if torch.compiler.is_compiling() or not training or self.positions.is_inference():
            self.forget_indexes()
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
        make = index_spectrum if kind is SpectrumIndex else index_product
        return make(self.positions, self.rearrangement, self.norm, real=self.coefficients.ndim == 1)

    def forward(
        self, x: torch.Tensor | None = None, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        coefficients = self.coefficients
        if coefficients.dtype != torch.float64:
            coefficients = coefficients.float()  # no transform exists in half precision
        if x is None and graphs_apply(coefficients, self.shape) and not getattr(self, "_is_replica", False):
            graphed = self._graph(dtype or coefficients.dtype)
            if graphed is not None:
                return graphed(coefficients, scale)
        if scale != 1.0:  # here, where there are the fewest numbers
            coefficients = coefficients * scale
        if x is not None:
            return spectral_product(x, coefficients, self._indexed(ProductIndex))
        return inverse_transform(coefficients, self._indexed(SpectrumIndex), dtype)

    def _graph(self, dtype: torch.dtype) -> GraphedTransform | None:
        """The transform as a graph, from the second time on that it is wanted of the same index on the same stream."""
        index, stream = self._indexed(SpectrumIndex), current_stream(self.coefficients.device)
        known = self._graphed.get(dtype)
        if isinstance(known, GraphedTransform) and known.index is index and known.stream == stream:
            return known
        if isinstance(known, tuple) and known[0] is index and known[1] == stream:
            self._graphed[dtype] = known = GraphedTransform(self.coefficients, index, dtype, stream)
            return known
        self._graphed[dtype] = (index, stream)
        return None

    def prefers_product(self, x: torch.Tensor) -> bool:
        """Whether to multiply inputs x (..., in_features) in the spectrum, where the dense change is for them alone."""
        if torch.compiler.is_compiling():
            return False
        return prefers_spectrum(x.numel() // x.shape[-1], len(self.positions), self.shape, x.device.type)

    def kept(self, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The same weight change, made once and kept until what it depends on has changed; then scaled and cast.

        It may be what is kept itself: not to be changed in place.
        """
        sources = self.sources()
        if sources is None:
            return self(scale=scale, dtype=dtype)
        delta = delta_cache.get(self, None, sources, self)
        return (delta if scale == 1.0 else delta * scale).to(dtype or delta.dtype)

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
