"""The adapted layers, `S2FTLinear` and `S2FTConv`: a base layer, its adapters' delta weights, and their scales."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import S2FTConfig
from .delta import GridDelta, SpectralDelta, ThinFactors, delta_from_state, make_delta
from .fusing import Fusing
from .seeding import seeded

CONVOLUTION = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip


class S2FTLayer(nn.Module, Fusing, BaseTunerLayer):
    """A layer with S2FT adapters: what a linear layer and a convolution have in common.

    A weight change is a matrix (d, k) whose row makes one output: a convolution's has all of its kernel's entries for
    all inputs in a row. There is one `LayerDelta` per adapter.

    The base layer is called as it is, whatever it is (quantised, sharded, offloaded), and the changes' products are
    added in its output's dtype: W + delta in bfloat16 would round a small delta away. An adapter on a grid multiplies
    by three thin matrices; one at free positions by its dense change, or, on a plain float32 layer, the input is
    multiplied once, by W + delta.

    A delta weight is used times `scaling` (the config's alpha), times the weight `set_scale` gave the adapter, times
    whatever `scale_layer` has put on and `unscale_layer` not yet taken off. All three are stored as they came, so that
    taking a scale off restores exactly what was.
    """

    adapter_layer_names = ("s2ft_delta",)
    other_param_names = ("s2ft_config", "s2ft_weight", "s2ft_passing_scales", "r")

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
        self.s2ft_weight: dict[str, float] = {}
        self.s2ft_passing_scales: dict[str, list[float]] = {}
        self.r: dict[str, int] = {}  # trainable numbers; diffusers counts its entries to name the next adapter
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # diffusers, casting layer by layer, sets it to False on every adapter
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, n_frequency, config, name)

    @abstractmethod
    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the base layer does to x (rows, ..., k, or a convolution's), with another weight of the same shape."""

    @abstractmethod
    def _multiply_thin(self, x: torch.Tensor, factors: ThinFactors) -> torch.Tensor:
        """The same with the weight up (d, r1) @ table (r1, r2) @ down (r2, k), which is not made unless it is small."""

    def _as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        """A weight change (d, k) in the shape of the base layer's weight."""
        return delta.view(self._weight_shape)

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of `_as_weight`."""
        return weight.reshape(self._shape)

    def update_layer(self, adapter_name: str, n_frequency: int | float, config: S2FTConfig, name: str) -> None:
        """Add an adapter without a prior: identity order, and low frequencies (or as `sampling` says)."""
        try:
            delta = make_delta(self._shape, config, n_frequency)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        delta.draw_later(config, seeded(config.seed, name), name)
        self.s2ft_delta[adapter_name] = delta
        self.s2ft_config[adapter_name] = config
        self.s2ft_weight[adapter_name] = 1.0
        self.r[adapter_name] = delta.coefficients.numel()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # This one alone: `set_adapter` goes over all of them, and there may be a hundred.
        trained = adapter_name in self.active_adapters and not config.inference_mode
        delta.requires_grad_(trained)
        if trained:
            delta.draw()

    def take_state(self, adapter_name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Put a state (`LayerDelta`'s) in the place of an adapter's, of whatever sizes and types it is."""
        replaced = self.s2ft_delta[adapter_name]
        delta = delta_from_state(self._shape, self.s2ft_config[adapter_name], state)
        self.s2ft_delta[adapter_name] = delta.requires_grad_(replaced.coefficients.requires_grad)
        self.r[adapter_name] = delta.coefficients.numel()
        self.s2ft_delta[adapter_name].to(self.get_base_layer().weight.device)
        if adapter_name in self._active():
            self.prepare()

    def prepare(self) -> None:
        """Make what the active adapters' forward passes need, and let go of what others' needed."""
        base = self.get_base_layer()
        dtype, device = compute_dtype(base), base.weight.device
        active = self._active()
        for name, delta in self.s2ft_delta.items():
            if name in active and device.type != "meta":
                delta.prepare(dtype, device)
            elif name not in active:
                delta.forget()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's `set_adapter`, but that adapters which a pipeline has loaded stay frozen while their config says
        `inference_mode`; what adapters that are no longer active have made is let go."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for name, delta in self.s2ft_delta.items():
            if delta.loaded and self.s2ft_config[name].inference_mode:
                delta.requires_grad_(False)
        self.prepare()

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
        scale = self.s2ft_config[adapter].scaling * self.s2ft_weight[adapter]
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
        """The scaled delta weight of an adapter, of the base weight's shape, in float32 (float64 for float64
        coefficients). Raises KeyError for an adapter that is not there."""
        return self._as_weight(self.s2ft_delta[adapter].dense() * self.effective_scale(adapter))

    def lora_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """B (d, r) and A (r, k), float32, with B @ A the scaled delta weight of an adapter on a grid, exactly.

        Raises TypeError for an adapter at free positions, which is not of low rank, and KeyError for none.
        """
        delta = self.s2ft_delta[adapter]
        if not isinstance(delta, GridDelta):
            raise TypeError(f"{adapter!r} has free positions: its weight change is not of low rank.")
        b, a = delta.factors()
        return b * self.effective_scale(adapter), a

    def _scales(self) -> dict[str, float]:
        """The adapters that count at this moment, with their scales."""
        active = self._active_adapter
        scales = {}
        for name in [active] if isinstance(active, str) else active:
            if name in self.s2ft_config and (scale := self.effective_scale(name)) != 0:
                scales[name] = scale
        return scales

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output with the active adapters' changes, or, with `adapter_names` (one for each row of the
        batch; "__base__" for none), each row with its own adapter's."""
        # Called some thousand times an image: attributes of modules are looked up no more often than needed.
        base = self._modules["base_layer"]
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return base(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        scales = self._scales()
        if self.merged_adapters:  # what is in the weight is not added again; what is active beside it is
            scales = {name: scale for name, scale in scales.items() if name not in self.merged_adapters}
        if not scales:
            return base(x, *args, **kwargs)
        deltas = self.s2ft_delta._modules
        free = {name: scale for name, scale in scales.items() if isinstance(deltas[name], SpectralDelta)}
        if free and self._is_plain(base, x):
            weight = base._parameters["weight"]
            for name, scale in free.items():
                weight = weight + self._as_weight(deltas[name](scale))
            result = self._multiply(x, weight, base._parameters["bias"])
        else:
            result = base(x, *args, **kwargs)
            if free:
                result = result + self._free_product(x.to(result.dtype), free)
        for name, scale in scales.items():
            if name not in free:
                result = result + self._multiply_thin(x.to(result.dtype), deltas[name](scale, result.dtype))
        return result

    def _free_product(self, x: torch.Tensor, scales: Mapping[str, float]) -> torch.Tensor:
        deltas = [self.s2ft_delta[name](scale) for name, scale in scales.items()]
        total = sum(deltas[1:], start=deltas[0])  # before it is rounded
        return self._multiply(x, self._as_weight(total.to(x.dtype)), None)

    def _mixed_batch_forward(
        self, x: torch.Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            scale = self.effective_scale(name) if name in self.s2ft_delta else 0.0
            if scale == 0:
                continue
            rows = torch.tensor([row for row, wanted in enumerate(adapter_names) if wanted == name], device=x.device)
            part = x.index_select(0, rows).to(result.dtype)
            delta = self.s2ft_delta[name]
            if isinstance(delta, SpectralDelta):
                product = self._free_product(part, {name: scale})
            else:
                product = self._multiply_thin(part, delta(scale, result.dtype))
            result = result.index_add(0, rows, product)
        return result

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
        """What moves a module, and may change its dtype: what is needed now is made if it was not moved with it."""
        result = super()._apply(*args, **kwargs)
        self.prepare()
        return result

    def __repr__(self) -> str:
        return "s2ft." + super().__repr__()


class S2FTLinear(S2FTLayer):
    """A linear layer with S2FT adapters; also transformers' `Conv1D`, which holds its weight transposed."""

    base_layer_types = (nn.Linear, Conv1D)

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, weight.T if isinstance(self.get_base_layer(), Conv1D) else weight, bias)

    def _multiply_thin(self, x: torch.Tensor, factors: ThinFactors) -> torch.Tensor:
        return F.linear(F.linear(F.linear(x, factors.down), factors.table), factors.up)

    def _as_weight(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return self._as_weight(weight)

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

    def _multiply_thin(self, x: torch.Tensor, factors: ThinFactors) -> torch.Tensor:
        """r2 fixed filters, then convolutions of kernel size 1: two, or with groups, where each would have all r1
        functions of its own, one. Many groups, each with its own copy of the filters, take one convolution with the
        dense change (d, k), which is smaller than the copies."""
        layer, (up, table, down) = self.get_base_layer(), factors
        groups, ones = layer.groups, (1,) * len(layer.kernel_size)
        if groups > 1 and groups * len(down) > len(up):
            return layer._conv_forward(x, self._as_weight(up @ (table @ down)), None)
        pointwise = (F.conv1d, F.conv2d, F.conv3d)[len(ones) - 1]
        filters = down.view(len(down), *self._weight_shape[1:]).repeat(groups, *(1,) * (1 + len(ones)))
        found = layer._conv_forward(x, filters, None)
        if groups > 1:
            up = up @ table
        else:
            found = pointwise(found, table.view(*table.shape, *ones))
        return pointwise(found, up.view(*up.shape, *ones), groups=groups)


LAYER_TYPES: tuple[type[S2FTLayer], ...] = (S2FTLinear, S2FTConv)


def layer_type(module: nn.Module | None) -> type[S2FTLayer] | None:
    """The kind of S2FT layer that adapts a module (or what other adapters on it wrap); None if there is none."""
    return next((kind for kind in LAYER_TYPES if isinstance(innermost(module), kind.base_layer_types)), None)


def innermost(module: nn.Module | None) -> nn.Module | None:
    """A module without the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that a layer computes in: its weight's, or for a quantised or packed one what its library says."""
    stated = getattr(layer, "compute_dtype", None)  # bitsandbytes' 4-bit layers
    for dtype in (stated, layer.weight.dtype):
        if dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            return dtype
    return torch.float32


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a linear layer's or convolution's weight, also where the weight itself is packed by quantisation."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, Conv1D):
        return tuple(layer.weight.shape)
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def delta_shape(layer: nn.Module) -> tuple[int, int]:
    """The shape (d, k) of the weight change of a linear layer or a convolution, as a matrix."""
    d, *rest = weight_shape(layer)
    if isinstance(layer, Conv1D):
        return rest[0], d
    return d, math.prod(rest)
