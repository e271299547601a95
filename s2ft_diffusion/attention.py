"""Which layers to adapt: a model's attention projections and what stands in a block with them, found through its
attention modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Targets = Literal["qv", "attention", "blocks"]
TARGETS: tuple[Targets, ...] = get_args(Targets)

# Projection names of diffusers' and transformers' attention modules, by what they make.
_QUERY_AND_VALUE = ("to_q", "to_v", "q_proj", "v_proj", "query", "value", "add_q_proj", "add_v_proj")
_KEY_AND_OUTPUT = ("to_k", "to_out.0", "to_out", "k_proj", "out_proj", "key", "add_k_proj", "to_add_out")


def attention_targets(model: nn.Module, targets: Targets = "qv") -> list[str]:
    """Full names of a model's attention projections, for `S2FTConfig(target_modules=...)`.

    "qv" takes query and value (the paper's setting), "attention" key and output as well, "blocks" also all other linear
    layers of the blocks that attention stands in (the feed-forward part), but for those of adaptive norms. A diffusion
    model's attention modules are those with an attention processor, whatever they are called; in other models every
    module with a query and a value projection counts.

    Raises ValueError for another word, and when the model has none or has them fused into one layer.
    """
    if targets not in TARGETS:
        raise ValueError(f"targets must be one of {TARGETS}, got {targets!r}.")
    wanted = _QUERY_AND_VALUE if targets == "qv" else (*_QUERY_AND_VALUE, *_KEY_AND_OUTPUT)
    processors = getattr(model, "attn_processors", None)
    if processors is not None:
        attention_names = [name.removesuffix(".processor") for name in processors]
    else:
        attention_names = [name for name, module in model.named_modules() if _is_attention(module)]
    found = []
    for attention_name in attention_names:
        attention = model.get_submodule(attention_name)
        if getattr(attention, "fused_projections", False):
            raise ValueError(f"{attention_name} has fused projections; call unfuse_qkv_projections() first.")
        found += [f"{attention_name}.{name}" for name in wanted if _is_linear(_submodule(attention, name))]
    if targets == "blocks" and found:
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in attention_names)
        found += [name for block in blocks for name in _around_attention(model, block, attention_names)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention projections that S2FT could adapt.")
    return found


def _around_attention(model: nn.Module, block: str, attention_names: list[str]) -> Iterator[str]:
    """The linear layers of a block that belong neither to an attention module nor to a norm."""
    inside = tuple(f"{name}." for name in attention_names)
    for path, module in model.get_submodule(block).named_modules(prefix=block):
        is_inner = "base_layer" in path or path.startswith(inside)
        if not is_inner and "norm" not in path.removeprefix(block) and _is_linear(module):
            yield path


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, nn.Linear)


def _is_attention(module: nn.Module) -> bool:
    return any(_is_linear(_submodule(module, name)) for name in ("to_q", "q_proj", "query")) and any(
        _is_linear(_submodule(module, name)) for name in ("to_v", "v_proj", "value")
    )
