"""Layers' names: one in every adapter file, whatever the installed libraries call the layer.

Files name layers as the base's checkpoint files do. For CLIP's text encoder that is `text_model.encoder.layers. ...`;
transformers 5.6 and later build it without the outer `text_model`.
"""

from __future__ import annotations

from torch import nn

CLIP_LAYERS = "encoder.layers."
CLIP_WRAPPER = "text_model."


def module_name(name: str) -> str:
    """A layer's name in the base model: without the `base_layer` steps of other adapters around it."""
    return name.replace(".base_layer", "")


def canonical_name(component: str, name: str) -> str:
    """A layer's name in a file, from its name in a component (with or without adapters around it)."""
    name = module_name(name)
    clip = component.startswith("text_encoder") and name.startswith(CLIP_LAYERS)
    return CLIP_WRAPPER + name if clip else name


def name_in(model: nn.Module, canonical: str) -> str:
    """A layer's name in a model, from its name in a file; unchanged where the model has no such layer."""
    inner = canonical.removeprefix(CLIP_WRAPPER)
    if _has(model, canonical) or not _has(model, inner):
        return canonical
    return inner


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
