"""The adapted projection: `S2FTLinear` around an `nn.Linear`, and the delta weight it adds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from .config import S2FTConfig
from .delta_cache import delta_cache
from .product import ProductIndex, index_product, prefers_spectrum, spectral_product
from .rearrange import Rearrangement
from .seeding import seeded
from .spectrum import (
    SpectrumIndex,
    count_positions,
    delta_weight,
    index_dtype,
    index_spectrum,
    sample_positions,
)

# A fused change that its own rounding alters by more than this share is worth a warning.
FUSE_ROUNDING_LIMIT = 0.05


class SpectralDelta(nn.Module):
    """One adapter's weight change of one layer: trainable coefficients, their positions and the rearrangement.

    State, for a (d, k) layer with m positions: `coefficients` (m, 2) or (m,) float; `positions` (m, 2), `row_order`
    (d,) and `column_order` (k,) int16, or int32 where a side is longer than 32,767; `row_sign` (d,) and `column_sign`
    (k,) int8.

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
        identity, dtype = Rearrangement.identity(*shape), index_dtype(shape)
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
        if self._indexes is None:
            self._indexes = {}
        if kind in self._indexes:
            seen, index = self._indexes[kind]
            if all(a is b and v == w and x == y for (a, v, x), (b, w, y) in zip(seen, state, strict=True)):
                return index
        index = self._index(kind)
        self._indexes[kind] = (state, index)
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


class S2FTLayer(BaseTunerLayer):
    """What any S2FT layer has: one `SpectralDelta` per adapter, and the scales.

    A delta weight is used times `scaling` (the config's alpha), times the weight `set_scale` gave the adapter, times
    whatever `scale_layer` has put on and `unscale_layer` not yet taken off. All three are stored as they came, so that
    taking a scale off restores exactly what was.
    """

    adapter_layer_names = ("s2ft_delta",)
    other_param_names = ("s2ft_config", "s2ft_scaling", "s2ft_weight", "s2ft_passing_scales")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        linear = self.get_base_layer()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"S2FT adapts torch.nn.Linear, not {type(linear).__name__}.")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._shape = (linear.out_features, linear.in_features)  # one object for all adapters: there may be a hundred
        self.s2ft_delta = nn.ModuleDict()
        self.s2ft_config: dict[str, S2FTConfig] = {}
        self.s2ft_scaling: dict[str, float] = {}
        self.s2ft_weight: dict[str, float] = {}
        self.s2ft_passing_scales: dict[str, list[float]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unfused_weight: torch.Tensor | None = None
        self._fused_scales: dict[str, float] = {}

    @property
    def r(self) -> dict[str, int]:
        """Adapters and their trainable numbers: diffusers counts `r`'s entries to name the next adapter."""
        return {name: delta.coefficients.numel() for name, delta in self.s2ft_delta.items()}

    def update_layer(self, adapter_name: str, n_frequency: int | float, config: S2FTConfig, name: str) -> None:
        """Add an adapter without a prior: identity order, positions near frequency zero (or as `sampling` says).

        With the config's `inference_mode`, positions are left to whoever loads the adapter's state.
        """
        shape = self._shape
        try:
            count = count_positions(n_frequency, shape, config.coefficients)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if config.inference_mode:
            positions = torch.zeros(count, 2, dtype=torch.int32)  # about to be loaded; drawing them would take seconds
        else:
            positions = sample_positions(
                count,
                shape,
                kind=config.coefficients,
                sampling="low_frequency" if config.sampling in ("power", "top") else config.sampling,
                generator=seeded(config.seed, name),
                name=name,
            )
        self.s2ft_delta[adapter_name] = SpectralDelta(shape, config, positions)
        self.s2ft_config[adapter_name] = config
        self.s2ft_scaling[adapter_name] = config.scaling
        self.s2ft_weight[adapter_name] = 1.0
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # This one alone: `set_adapter` goes over all of them, and there may be a hundred.
        trained = adapter_name in self.active_adapters and not config.inference_mode
        self.s2ft_delta[adapter_name].requires_grad_(trained)

    # Scales

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's weight; its delta weight is used `scale` times alpha."""
        if adapter not in self.s2ft_delta:
            return
        passing = self.s2ft_passing_scales.get(adapter, [])
        if passing and passing[-1] == 0 and scale == 1.0:
            passing.pop()  # diffusers takes a passing scale of 0 off by setting the scale to 1
            return
        passing.clear()
        self.s2ft_weight[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters by `scale` until `unscale_layer`."""
        if scale == 1.0:
            return
        for adapter in self._active():
            self.s2ft_passing_scales.setdefault(adapter, []).append(float(scale))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take off the latest scale that `scale_layer` put on; without an argument, all of them."""
        if scale == 1.0:
            return
        for adapter in self._active():
            passing = self.s2ft_passing_scales.get(adapter, [])
            if scale is None:
                passing.clear()
            elif passing:
                passing.pop()

    def effective_scale(self, adapter: str) -> float:
        """What an adapter's unscaled delta weight is multiplied by at this moment."""
        scale = self.s2ft_scaling[adapter] * self.s2ft_weight[adapter]
        for passing in self.s2ft_passing_scales.get(adapter, ()):
            scale *= passing
        return scale

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.s2ft_delta]


class S2FTLinear(nn.Module, S2FTLayer):
    """A linear layer with S2FT adapters.

    On a plain float32 `nn.Linear` the input is multiplied once, by W + delta. In every other case - low precision,
    autocast, quantised weights, other adapters or hooks on the base layer - the base layer is called as it is and the
    delta's product added in the compute dtype: W + delta in bfloat16 would round a small delta away. In training, a
    layer that sees few tokens multiplies them in the spectrum, and no dense delta is made at all (`product.py`).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        n_frequency: int | float,
        config: S2FTConfig,
        name: str,
    ) -> None:
        super().__init__()
        S2FTLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, n_frequency, config, name)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The scaled delta weight (out_features, in_features) of an adapter, in float32."""
        return self.s2ft_delta[adapter].kept() * self.effective_scale(adapter)

    def _scales(self) -> dict[str, float]:
        """The adapters that count at this moment, with their scales."""
        active = self._active_adapter
        scales = {}
        for name in [active] if isinstance(active, str) else active:
            if name in self.s2ft_scaling and (scale := self.effective_scale(name)) != 0:
                scales[name] = scale
        return scales

    def _kept(
        self, scales: dict[str, float], weight: torch.Tensor | None, kind: object, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """What `make` makes of the active deltas (and of `weight`), kept while all it depends on stays as it is."""
        if torch.compiler.is_compiling():
            return make()
        sources = [] if weight is None else [weight]
        deltas = self.s2ft_delta._modules
        for name in scales:
            if (found := deltas[name].sources()) is None:
                delta_cache.drop(self)
                return make()
            sources += found
        return delta_cache.get(self, (kind, *scales.items()), sources, make)

    def _fused_weight(self, weight: torch.Tensor, scales: dict[str, float]) -> torch.Tensor:
        for name, scale in scales.items():
            delta = self.s2ft_delta[name].kept()
            # Adding in one pass where no graph needs the product.
            weight = weight + delta * scale if torch.is_grad_enabled() else torch.add(weight, delta, alpha=scale)
        return weight

    def _active_delta(self, scales: dict[str, float], dtype: torch.dtype) -> torch.Tensor:
        deltas = [self.s2ft_delta[name].kept() * scale for name, scale in scales.items()]
        return sum(deltas[1:], start=deltas[0]).to(dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Called some thousand times an image: attributes of modules are looked up no more often than needed.
        base = self._modules["base_layer"]
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return base(x, *args, **kwargs)
        scales = {} if self.merged_adapters else self._scales()
        if not scales:
            return base(x, *args, **kwargs)
        if torch.is_grad_enabled() and all(self.s2ft_delta[name].prefers_product(x) for name in scales):
            result = base(x, *args, **kwargs)
            for name, scale in scales.items():
                result = result + (self.s2ft_delta[name](x) * scale).to(result.dtype)
            return result
        if _is_plain(base, x):
            weight = base._parameters["weight"]
            fused = self._kept(scales, weight, None, lambda: self._fused_weight(weight, scales))
            return F.linear(x, fused, base._parameters["bias"])
        result = base(x, *args, **kwargs)
        dtype = result.dtype
        delta = self._kept(scales, None, dtype, lambda: self._active_delta(scales, dtype))
        return result + F.linear(x.to(dtype), delta)

    # Merging: PEFT's word for fusing

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, *, scale: float = 1.0) -> None:
        """Add the delta weights of the active (or the named) adapters to the base weight, `scale` times.

        The weight as it was is kept on the CPU, so that `unmerge` restores it bit for bit; that costs one copy of every
        adapted weight. With `safe_merge`, raises ValueError and changes nothing if the sum is not finite.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.s2ft_delta]
        scales = {name: self.effective_scale(name) * scale for name in adapter_names}
        self._drop_passing_scales()
        if not adapter_names:
            return
        weight = self.get_base_layer().weight
        full = weight.dtype.is_floating_point and weight.shape == self._shape
        if not full or type(weight.data) is not torch.Tensor:
            kind = weight.dtype if type(weight.data) is torch.Tensor else type(weight.data).__name__
            raise TypeError(f"An S2FT adapter cannot be fused into a {kind} weight; use it unfused.")
        unfused = self._unfused_weight
        if unfused is None:
            unfused = weight.data.detach().to("cpu")  # there, the very same memory: the sum gets memory of its own
        with torch.no_grad():
            fused = self._add_deltas(weight.data, scales)
        if safe_merge and not torch.isfinite(fused).all():
            raise ValueError(f"The weights fused with {adapter_names} are not finite; nothing was changed.")
        self._warn_of_rounding(weight.data, fused, scales)
        self._unfused_weight = unfused
        weight.data = fused
        delta_cache.drop(self)  # it holds on to the weight as it was
        self._fused_scales.update(scales)
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Restore the base weight to what it was before merging, bit for bit (in the type it has by now).

        If something else (a fused LoRA) has changed the weight since, the delta weights are subtracted instead, which
        leaves a rounding error.
        """
        self._drop_passing_scales()
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        unfused = self._unfused_weight.to(weight.device)
        with torch.no_grad():
            fused = self._add_deltas(unfused, self._fused_scales)
            # Rounding apart: the pipeline may have moved to another device or type since.
            epsilon = 4 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
            slack = epsilon * float((fused.float() - unfused.float()).abs().max())
            if torch.allclose(weight.float(), fused.float(), rtol=epsilon, atol=slack):
                weight.data = unfused.to(weight.dtype)
            else:
                weight.data = self._add_deltas(weight.data, {n: -s for n, s in self._fused_scales.items()})
        self._unfused_weight = None
        self._fused_scales.clear()
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; fused adapters are unfused first."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        super().delete_adapter(adapter_name)

    def _drop_passing_scales(self) -> None:
        """diffusers' fuse_lora(scale) puts a scale on every PEFT layer and never takes it off."""
        for passing in self.s2ft_passing_scales.values():
            passing.clear()

    def _add_deltas(self, weight: torch.Tensor, scales: dict[str, float]) -> torch.Tensor:
        result = weight
        for name, scale in scales.items():
            delta = self.s2ft_delta[name]().to(weight.device)
            result = torch.add(result.to(delta.dtype), delta, alpha=scale, out=delta).to(weight.dtype)
        return result

    def _warn_of_rounding(self, before: torch.Tensor, after: torch.Tensor, scales: dict[str, float]) -> None:
        if before.dtype in (torch.float32, torch.float64):
            return
        with torch.no_grad():
            wanted = sum(self.s2ft_delta[name]() * scale for name, scale in scales.items()).to(before.device)
        if (lost := ((after.float() - before.float()) - wanted).norm()) > FUSE_ROUNDING_LIMIT * wanted.norm():
            warnings.warn(
                f"Fusing into {before.dtype} rounds an adapter's change by {float(lost / wanted.norm()):.0%} in some "
                "layers. Use it unfused, or fuse in float32 and convert the pipeline afterwards.",
                stacklevel=4,
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def __repr__(self) -> str:
        return "s2ft." + super().__repr__()


def _is_plain(base: nn.Module, x: torch.Tensor) -> bool:
    """Whether calling `base` is nothing but `F.linear` in float32: no other adapter, no hook, no cast in between."""
    if type(base) is not nn.Linear or "forward" in base.__dict__ or base._forward_hooks or base._forward_pre_hooks:
        return False
    weight, dtype = base._parameters["weight"], x.dtype
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.dtype == dtype
        and (dtype == torch.float32 or dtype == torch.float64)
        and weight.device == x.device
        and not torch.is_autocast_enabled(x.device.type)
    )
