"""The adapted layers, `S2FTLinear` and `S2FTConv`: a base layer, its adapters' delta weights, and their scales."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import S2FTConfig
from .delta import SpectralDelta
from .delta_cache import delta_cache
from .fusing import Fusing
from .seeding import seeded
from .spectrum import count_positions, sample_positions

CONVOLUTION = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip


class S2FTLayer(nn.Module, Fusing, BaseTunerLayer):
    """A layer with S2FT adapters: what a linear layer and a convolution have in common.

    A weight change is a matrix (d, k) whose row makes one output: a convolution's has all of its kernel's entries for
    all inputs in a row. There is one `SpectralDelta` per adapter.

    On a plain float32 layer the input is multiplied once, by W + delta. In every other case - low precision, autocast,
    quantised weights, other adapters or hooks on the base layer - the base layer is called as it is and the delta's
    product added in the compute dtype: W + delta in bfloat16 would round a small delta away.

    A delta weight is used times `scaling` (the config's alpha), times the weight `set_scale` gave the adapter, times
    whatever `scale_layer` has put on and `unscale_layer` not yet taken off. All three are stored as they came, so that
    taking a scale off restores exactly what was.
    """

    adapter_layer_names = ("s2ft_delta",)
    other_param_names = ("s2ft_config", "s2ft_scaling", "s2ft_weight", "s2ft_passing_scales")

    base_layer_types: ClassVar[tuple[type[nn.Module], ...]]
    rearranges_columns: ClassVar[bool] = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        n_frequency: int | float,
        config: S2FTConfig,
        name: str,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        layer = self.get_base_layer()
        if not isinstance(layer, self.base_layer_types):
            raise TypeError(f"{type(self).__name__} does not adapt a {type(layer).__name__}.")
        self._shape = delta_shape(layer)  # one object for all adapters: there may be a hundred
        self.out_features, self.in_features = self._shape
        self._weight_shape = weight_shape(layer)
        self.s2ft_delta = nn.ModuleDict()
        self.s2ft_config: dict[str, S2FTConfig] = {}
        self.s2ft_scaling: dict[str, float] = {}
        self.s2ft_weight: dict[str, float] = {}
        self.s2ft_passing_scales: dict[str, list[float]] = {}
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # diffusers, casting layer by layer, sets it to False on every adapter
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, n_frequency, config, name)

    @abstractmethod
    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the base layer does to x, with another weight of the same shape."""

    def _prefers_spectrum(self, x: torch.Tensor, scales: dict[str, float]) -> bool:
        """Whether to multiply x in the spectrum, adapter by adapter, instead of making a dense delta."""
        return False

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

    def _drop_passing_scales(self) -> None:
        """diffusers' fuse_lora(scale) puts a scale on every PEFT layer and never takes it off."""
        for passing in self.s2ft_passing_scales.values():
            passing.clear()

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.s2ft_delta]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The scaled delta weight of an adapter, of the base weight's shape, in float32."""
        delta = self.s2ft_delta[adapter].kept() * self.effective_scale(adapter)
        return delta.view(self._weight_shape)

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
        deltas = self.s2ft_delta
        for name, scale in scales.items():
            if torch.is_grad_enabled():
                weight = weight + deltas[name].kept(scale).view(self._weight_shape)
            else:  # of what may be kept, scaling and adding in one pass
                weight = torch.add(weight, deltas[name].kept().view(self._weight_shape), alpha=scale)
        return weight

    def _active_delta(self, scales: dict[str, float], dtype: torch.dtype) -> torch.Tensor:
        if len(scales) > 1:  # summed before they are rounded
            deltas = [self.s2ft_delta[name].kept(scale) for name, scale in scales.items()]
            return sum(deltas[1:], start=deltas[0]).to(dtype)
        ((name, scale),) = scales.items()
        return self.s2ft_delta[name].kept(scale, dtype)

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
        if torch.is_grad_enabled() and self._prefers_spectrum(x, scales):
            delta_cache.drop(self)
            result = base(x, *args, **kwargs)
            for name, scale in scales.items():
                result = result + self.s2ft_delta[name](x, scale).to(result.dtype)
            return result
        if self._is_plain(base, x):
            weight = base._parameters["weight"]
            fused = self._kept(scales, weight, None, lambda: self._fused_weight(weight, scales))
            return self._multiply(x, fused, base._parameters["bias"])
        result = base(x, *args, **kwargs)
        dtype = result.dtype
        delta = self._kept(scales, None, dtype, lambda: self._active_delta(scales, dtype))
        return result + self._multiply(x.to(dtype), delta.view(self._weight_shape), None)

    def _is_plain(self, base: nn.Module, x: torch.Tensor) -> bool:
        """Whether calling `base` is nothing but a product in float32: no other adapter, no hook, no cast in between."""
        if type(base) not in self.base_layer_types or "forward" in base.__dict__:
            return False
        if base._forward_hooks or base._forward_pre_hooks:
            return False
        weight, dtype = base._parameters["weight"], x.dtype
        return (
            type(weight) in (nn.Parameter, torch.Tensor)
            and weight.dtype == dtype
            and (dtype == torch.float32 or dtype == torch.float64)
            and weight.device == x.device
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _apply(self, *args: Any, **kwargs: Any) -> S2FTLayer:
        """What moves a module: what was kept of it lies where it was, in the type that it was."""
        delta_cache.drop(self)
        for delta in self.s2ft_delta.values():
            delta_cache.drop(delta)
            delta.forget_indexes()
        return super()._apply(*args, **kwargs)

    def __repr__(self) -> str:
        return "s2ft." + super().__repr__()


class S2FTLinear(S2FTLayer):
    """A linear layer with S2FT adapters.

    In training, one that sees few tokens multiplies them in the spectrum, and no dense delta is made at all
    (`product.py`).
    """

    base_layer_types = (nn.Linear,)

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def _prefers_spectrum(self, x: torch.Tensor, scales: dict[str, float]) -> bool:
        return all(self.s2ft_delta[name].prefers_product(x) for name in scales)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class S2FTConv(S2FTLayer):
    """A convolution of one, two or three dimensions with S2FT adapters, with its stride, padding, dilation and groups.

    Its weight change is a matrix of one row for each output channel: (out, in / groups * kernel). Rows alone are
    rearranged: there are up to thousands of columns, whose order would take more of the file than the coefficients, and
    positions reach more of the change with neighbours in the kernel left together.
    """

    base_layer_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    rearranges_columns = False

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        for name in CONVOLUTION:  # a LoRA around this one asks it for them
            setattr(self, name, getattr(self.get_base_layer(), name))

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.get_base_layer()._conv_forward(x, weight, bias)  # which knows how the layer pads


LAYER_TYPES: tuple[type[S2FTLayer], ...] = (S2FTLinear, S2FTConv)


def layer_type(module: nn.Module | None) -> type[S2FTLayer] | None:
    """The kind of S2FT layer that adapts a module (or what other adapters on it wrap); None if there is none."""
    return next((kind for kind in LAYER_TYPES if isinstance(innermost(module), kind.base_layer_types)), None)


def innermost(module: nn.Module | None) -> nn.Module | None:
    """A module without the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a linear layer's or convolution's weight, also where the weight itself is packed by quantisation."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def delta_shape(layer: nn.Module) -> tuple[int, int]:
    """The shape (d, k) of the weight change of a linear layer or a convolution, as a matrix."""
    d, *rest = weight_shape(layer)
    return d, math.prod(rest)
