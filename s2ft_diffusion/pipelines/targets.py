"""Which layers to adapt: attention projections and what surrounds them, found through a model's attention modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from diffusers.models.attention_processor import Attention
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..tuner.layer import innermost, layer_type

Targets = Literal["qv", "attention", "blocks", "all"]
TARGETS: tuple[Targets, ...] = get_args(Targets)

# Layers of a denoiser's last block whose results it throws away: those that only words would be read from.
_DISCARDED = {
    "SD3Transformer2DModel": ("attn.add_q_proj",),
    "QwenImageTransformer2DModel": ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"),
}
_CONDITIONS = re.compile(r"norm|time_emb|adaLN|modulation|_mod(\.|$)")

# Projection names of diffusers' and transformers' attention modules, by what they make.
_QUERY = ("to_q", "q_proj", "query", "query_proj", "q_lin", "q")
_VALUE = ("to_v", "v_proj", "value", "value_proj", "v_lin", "v")
# Query, key and value made by one layer; in FLUX.2's single blocks what feeds the gated feed-forward part, too.
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "to_qkv_mlp_proj")
_QUERY_AND_VALUE = (*_QUERY, *_VALUE, *_FUSED, "add_q_proj", "add_v_proj")
_KEY_AND_OUTPUT = (
    "to_k", "to_out.0", "to_out", "k_proj", "out_proj", "o_proj", "key", "key_proj", "k_lin", "out_lin", "k", "o",
    "c_proj", "dense", "proj", "Wo", "add_k_proj", "to_add_out",
)  # fmt: skip


def attention_targets(model: nn.Module, targets: Targets = "qv", *, reachable: bool = True) -> list[str]:
    """Full names of a model's attention projections and of layers around them, for `S2FTConfig(target_modules=...)`.

    "qv" takes query and value (the paper's setting), "attention" key and output as well. "blocks" takes also all other
    layers of the blocks that attention stands in (the feed-forward part), "all" every linear layer and convolution of
    the stacks of blocks (residual blocks, resampling, input and output projections), both but for those of norms and
    time embeddings. A diffusion model's attention modules are those with an attention processor, whatever
    they are called; in other models every module with a query and a value projection counts, or with one layer that
    makes query, key and value together (GPT-2's `c_attn`), which is adapted whole. With `reachable`, layers that cannot
    change what the model predicts are left out (`unreachable`).

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
        # BERT's attention.self is one module deeper in its block than attention is elsewhere.
        parents = dict.fromkeys(split(name.removesuffix(".self"), ".")[0] for name in attention_names)
        found += [name for parent in parents for name in _around(model, parent, attention_names)]
    if reachable:
        lost = set(unreachable(model))
        found = [name for name in found if name not in lost]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention projections that S2FT could adapt.")
    return found


def unreachable(model: nn.Module) -> list[str]:
    """Names of layers that cannot change what a denoiser predicts: an adapter there has a prior of zero."""
    last = len(getattr(model, "transformer_blocks", ())) - 1
    ends = tuple(f"transformer_blocks.{last}.{name}" for name in _DISCARDED.get(type(model).__name__, ()))
    return [name for name, _ in model.named_modules() if name.startswith(ends)] if ends else []


def _around(model: nn.Module, parent: str, attention_names: Sequence[str]) -> Iterator[str]:
    """The layers within a module that S2FT can adapt, but for those of attention modules, norms and times."""
    inside = tuple(f"{name}." for name in attention_names)
    for path, module in model.get_submodule(parent).named_modules(prefix=parent):
        is_inner = "base_layer" in path or path.startswith(inside)
        conditions = _CONDITIONS.search(path.removeprefix(parent))
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
    return isinstance(innermost(module), nn.Linear | Conv1D)  # Conv1D: GPT-2's linear layer, its weight transposed


def _is_attention(module: nn.Module) -> bool:
    return any(all(_has_linear(module, names) for names in parts) for parts in ((_QUERY, _VALUE), (_FUSED,)))


def _has_linear(module: nn.Module, names: Sequence[str]) -> bool:
    return any(_is_linear(_submodule(module, name)) for name in names)
