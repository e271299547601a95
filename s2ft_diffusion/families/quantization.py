"""Frozen linear layers in 4 or 8 bits: bitsandbytes' nf4 and int8, torchao's float8.

Models are packed layer by layer once they are loaded, on any device: diffusers' own loader, which packs while it loads,
wants a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn

from ..errors import InputError

Quantization = Literal["nf4", "int8", "float8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
_PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "float8": "torchao"}


def check_quantization(kind: Quantization) -> None:
    """Raise InputError for an unknown kind, and where the package that packs it is not installed."""
    if kind not in QUANTIZATIONS:
        raise InputError(f"--quantize must be one of {', '.join(QUANTIZATIONS)}, got {kind!r}.")
    package = _PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"--quantize {kind} needs {package}: pip install {package}.")


def quantizable(model: nn.Module) -> list[str]:
    """Names of a model's linear layers but for those that its library keeps in float32 and those that make logits.

    Convolutions, embeddings and norms stay as they are; so does what is packed already.
    """
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    logits = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and type(module.weight) is nn.Parameter  # torchao packs weights within their layers
        and module is not logits
        and not kept & set(name.split("."))
    ]


def quantize_model(
    model: nn.Module, kind: Quantization, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[str]:
    """Pack a model's linear layers in place, each on `device`, where it stays; returns their names.

    They compute in `dtype`. Raises InputError as `check_quantization` does, and for a model without linear layers.
    """
    check_quantization(kind)
    names = quantizable(model)
    if not names:
        raise InputError(f"--quantize {kind}: {type(model).__name__} has no linear layers that could be packed.")
    pack = {"nf4": _nf4, "int8": _int8, "float8": _float8}[kind]
    for name in names:
        parent, _, attribute = name.rpartition(".")
        layer = model.get_submodule(name).requires_grad_(False)
        setattr(model.get_submodule(parent), attribute, pack(layer, dtype, torch.device(device)))
    return names


def parameter_count(model: nn.Module) -> int:
    """A model's numbers: of a packed layer those that it stands for."""
    return sum(
        module.in_features * module.out_features
        if isinstance(module, nn.Linear) and name == "weight"
        else parameter.numel()
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    )


def _nf4(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """QLoRA's 4-bit floats in blocks of 64, with packed scales (Dettmers et al., 2023)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    packed = _around(layer, Linear4bit, compute_dtype=dtype, quant_type="nf4")
    packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=packed)
    return packed.to(device)


def _int8(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """LLM.int8(), a scale a row (Dettmers et al., 2022)."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    packed = _around(layer, Linear8bitLt, has_fp16_weights=False)
    # bitsandbytes packs what comes from host memory
    packed.weight = Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    return packed.to(device)


def _float8(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """Weights in float8_e4m3fn with a scale a row; products in the compute type."""
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(layer.to(device), Float8WeightOnlyConfig(), filter_fn=lambda module, _: module is layer)
    return layer.requires_grad_(False)


def _around(layer: nn.Linear, kind: Callable[..., nn.Linear], **options: object) -> nn.Linear:
    """A layer of another kind with this one's bias, its weight still to be given."""
    with torch.device("meta"):
        packed = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
    packed.bias = layer.bias
    return packed.train(layer.training)
