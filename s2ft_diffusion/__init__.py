"""S2FT for diffusers: subject-driven fine-tuning in a sparse spectrum, as a PEFT method and pipeline verbs.

Importing the package enters S2FT into PEFT's mappings and gives every diffusers pipeline its verbs, where those
libraries are installed. Everything else is imported when it is first used, so that `s2ft_diffusion.tuner` needs torch
and peft alone.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import toybox
    from .adapters import convert
    from .adapters.file import AdapterFileError, AdapterHeader, AdapterInfo, read_adapter, read_header, write_adapter
    from .adapters.peft_lora import to_lora
    from .pipelines import verbs as pipeline
    from .pipelines.targets import attention_targets
    from .tuner.config import S2FTConfig
    from .tuner.delta import SpectralDelta
    from .tuner.layer import S2FTConv, S2FTLayer, S2FTLinear
    from .tuner.model import S2FTModel
    from .tuner.prior import estimate_prior, initialize_s2ft_weights, place_from_prior
    from .tuner.rearrange import Rearrangement

__version__ = "0.2.0"

__all__ = [
    "AdapterFileError",
    "AdapterHeader",
    "AdapterInfo",
    "Rearrangement",
    "S2FTConfig",
    "S2FTConv",
    "S2FTLayer",
    "S2FTLinear",
    "S2FTModel",
    "SpectralDelta",
    "attention_targets",
    "convert",
    "estimate_prior",
    "initialize_s2ft_weights",
    "pipeline",
    "place_from_prior",
    "read_adapter",
    "read_header",
    "to_lora",
    "toybox",
    "write_adapter",
]

_HOMES = {
    "adapters.file": (
        "AdapterFileError", "AdapterHeader", "AdapterInfo", "read_adapter", "read_header", "write_adapter",
    ),
    "adapters.peft_lora": ("to_lora",),
    "pipelines.targets": ("attention_targets",),
    "tuner.config": ("S2FTConfig",),
    "tuner.delta": ("SpectralDelta",),
    "tuner.layer": ("S2FTConv", "S2FTLayer", "S2FTLinear"),
    "tuner.model": ("S2FTModel",),
    "tuner.prior": ("estimate_prior", "initialize_s2ft_weights", "place_from_prior"),
    "tuner.rearrange": ("Rearrangement",),
}  # fmt: skip
_MODULES = {"convert": "adapters.convert", "pipeline": "pipelines.verbs", "toybox": "toybox"}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(f".{_MODULES[name]}", __name__)
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _enter() -> None:
    """Enter S2FT into PEFT and diffusers, where they are."""
    if not (find_spec("torch") and find_spec("peft")):
        return
    try:
        importlib.import_module(".tuner.model", __name__)  # enters S2FT into PEFT's mappings
        if find_spec("diffusers"):
            importlib.import_module(".pipelines.verbs", __name__)  # gives pipelines their verbs
    except ImportError as error:  # releases that do not fit: files can still be read, which ComfyUI's node does
        warnings.warn(
            f"s2ft_diffusion: PEFT or diffusers cannot be imported as needed ({error}); adapter files can be read, "
            "pipelines have no S2FT verbs.",
            stacklevel=2,
        )


_enter()
