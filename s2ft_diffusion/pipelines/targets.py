"""Which layers to adapt: attention projections and what surrounds them, found through a model's attention modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from diffusers.models.attention_processor import Attention
from torch import nn

from ..tuner.layer import innermost, layer_type

Targets = Literal["qv", "attention", "blocks", "all"]
TARGETS: tuple[Targets, ...] = get_args(Targets)

# Projection names of diffusers' and transformers' attention modules, by what they make.
_QUERY_AND_VALUE = ("to_q", "to_v", "q_proj", "v_proj", "query", "value", "add_q_proj", "add_v_proj")
_KEY_AND_OUTPUT = ("to_k", "to_out.0", "to_out", "k_proj", "out_proj", "key", "add_k_proj", "to_add_out")


def attention_targets(model: nn.Module, targets: Targets = "qv") -> list[str]:
    """Full names of a model's attention projections and of layers around them, for `S2FTConfig(target_modules=...)`.

    "qv" takes query and value (the paper's setting), "attention" key and output as well. "blocks" takes also all other
    layers of the blocks that attention stands in (the feed-forward part), "all" every linear layer and convolution of
    the stacks of blocks (residual blocks, resampling, input and output projections), both but for those of norms and
    time embeddings. A diffusion model's attention modules are those with an attention processor, whatever
    they are called; in other models every module with a query and a value projection counts.

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
        if has_fused_projections(attention):
            raise ValueError(f"{attention_name} has fused projections; call unfuse_qkv_projections() first.")
        found += [f"{attention_name}.{name}" for name in wanted if _is_linear(_submodule(attention, name))]
    if targets in ("blocks", "all") and found:
        split = str.rpartition if targets == "blocks" else str.partition
        parents = dict.fromkeys(split(name, ".")[0] for name in attention_names)
        found += [name for parent in parents for name in _around(model, parent, attention_names)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention projections that S2FT could adapt.")
    return found


def _around(model: nn.Module, parent: str, attention_names: Sequence[str]) -> Iterator[str]:
    """The layers within a module that S2FT can adapt, but for those of attention modules, norms and time embeddings."""
    inside = tuple(f"{name}." for name in attention_names)
    for path, module in model.get_submodule(parent).named_modules(prefix=parent):
        is_inner = "base_layer" in path or path.startswith(inside)
        conditions = any(word in path.removeprefix(parent) for word in ("norm", "time_emb"))
        if not is_inner and not conditions and layer_type(module) is not None:
            yield path


def has_fused_projections(module: nn.Module) -> bool:
    """Whether an attention module uses a copy of its projections, fused into one, instead of them."""
    if not getattr(module, "fused_projections", False):
        return False
    # diffusers' older attention class is never told that they are used no more: its processor is another one then.
    return not isinstance(module, Attention) or type(module.processor).__name__.startswith("Fused")


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(innermost(module), nn.Linear)


def _is_attention(module: nn.Module) -> bool:
    return any(_is_linear(_submodule(module, name)) for name in ("to_q", "q_proj", "query")) and any(
        _is_linear(_submodule(module, name)) for name in ("to_v", "v_proj", "value")
    )
