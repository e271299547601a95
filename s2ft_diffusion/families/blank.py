"""A family without weights, to see how much memory a step takes: tensors with sizes and types but nothing in them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from .family import Configs, Family
from .quantization import Quantization, quantizable

# Bytes for each number of a packed weight: 4 bits, an 8-bit scale for 64 and a 32-bit one for 16,384 of them; 8 bits.
PACKED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / 64 / 256, "int8": 1.0, "float8": 1.0}
ALLOCATION = 512  # bytes that PyTorch's allocators round up to


class AllocationTracker(TorchDispatchMode):
    """Bytes of the tensors that were made within the block: `now`, and at most (`peak`).

    Within `FakeTensorMode` nothing is computed. (`torch.distributed._tools.MemTracker` wants hooks on all parameters,
    also on the frozen ones, where there can be none.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None):
        result = function(*args, **(kwargs or {}))
        # A view of what was there before the block, such as a transposed weight, is nothing new.
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            self.now += self._alive[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)


class GPUPasses(TorchFunctionMode):
    """What passes on a GPU do otherwise than on a CPU, where fake tensors must be: attention that keeps no table of
    scores, and, with an `autocast` type, CUDA's lists of what is computed in which type."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None):
        kwargs = dict(kwargs or {})
        if self.autocast is not None:
            wanted = self.autocast if function in _IN_HALF else torch.float32 if function in _IN_FLOAT32 else None
            if wanted is not None:
                args, kwargs = tree_map(lambda x: _cast(x, wanted), (args, kwargs))
        if function is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :]))[:3]
            return _Attention.apply(query, key, value)
        result = function(*args, **kwargs)
        if function is torch.Tensor.sum and not args[0].is_floating_point() and result.ndim == 1:
            # A mask's tokens, counted to know a length: as many as there can be.
            result.tolist = lambda most=args[0].shape[-1]: [most] * len(result)
        return result


_IN_HALF = {
    F.linear, F.scaled_dot_product_attention, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d,
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm, torch.addmm, torch.mm,
    torch.einsum,
}  # fmt: skip
_IN_FLOAT32 = {
    F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm, F.mse_loss, torch.pow, torch.Tensor.pow,
    torch.rsqrt, torch.exp, F.interpolate,
}  # fmt: skip


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return value.to(dtype)
    return value


class _Attention(torch.autograd.Function):
    """Flash attention's memory: inputs, output and a float32 number for each query are kept."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class PackedLinear(nn.Linear):
    """Takes the memory that a packed layer takes, in its weight and in its passes."""

    def __init__(self, layer: nn.Linear, kind: Quantization, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.compute_dtype = kind, dtype
        size = round(layer.weight.numel() * PACKED_BYTES[kind])
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.compute_dtype)
        if self.kind == "float8":  # torchao leaves it to autograd, which keeps the weight that it multiplied by
            return F.linear(x, _unpacked(x, self), self.bias)
        product = _PackedProduct.apply(x, self)
        return product if self.bias is None else product + self.bias


def _unpacked(x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
    return x.new_empty(layer.out_features, layer.in_features)


class _PackedProduct(torch.autograd.Function):
    """bitsandbytes': the weight is unpacked for each pass and let go; int8 keeps its input in float16."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.kept = x.to(torch.float16, copy=True) if layer.kind == "int8" else None
        return x @ _unpacked(x, layer).T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ _unpacked(gradient, ctx.layer), None


def pack_blank(model: nn.Module, kind: Quantization, dtype: torch.dtype) -> None:
    """`quantize_model` for a model on "meta": the same layers, to the same sizes."""
    for name in quantizable(model):
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, PackedLinear(model.get_submodule(name), kind, dtype))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each rounded up as PyTorch's allocators do."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(-(-t.numel() * t.element_size() // ALLOCATION) * ALLOCATION for t in tensors)


def fill_blank(model: nn.Module) -> None:
    """Put fake tensors in the place of a model's tensors on "meta"; to be called within `FakeTensorMode`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                blank = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def blank_family(family: type[Family], configs: Configs, components: Mapping[str, nn.Module]) -> Family:
    """A family around models of which the rest of its pipeline is missing: `predict` and `moments` work."""
    held = {"components": dict(components), "__init__": lambda self: None}
    pipeline = type("Blank", (getattr(diffusers, family.pipeline_class),), held)()
    pipeline.__dict__.update(components, vae_scale_factor=family.scale(configs))
    return family(pipeline, guidance=1.0, device=torch.device("cpu"))
