"""S2FT for diffusers: subject-driven fine-tuning in a sparse spectrum, as a PEFT method and pipeline verbs."""

from . import pipeline, toybox
from .adapter_file import AdapterFileError, AdapterHeader, AdapterInfo, read_adapter, read_header, write_adapter
from .attention import attention_targets
from .config import S2FTConfig
from .delta import SpectralDelta
from .layer import S2FTConv, S2FTLayer, S2FTLinear
from .model import S2FTModel
from .prior import estimate_prior, initialize_s2ft_weights, place_from_prior
from .rearrange import Rearrangement

__version__ = "0.1.0"

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
    "estimate_prior",
    "initialize_s2ft_weights",
    "pipeline",
    "place_from_prior",
    "read_adapter",
    "read_header",
    "toybox",
    "write_adapter",
]
