"""What differs between base models, a file each, chosen by the class that `model_index.json` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..dreambooth.errors import InputError
from .family import Conditions, Configs, Family, Sampling
from .flux import Flux
from .flux2 import Flux2, Flux2Klein
from .pixart_sigma import PixArtSigma
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .z_image import ZImage

__all__ = ["FAMILIES", "Conditions", "Configs", "Family", "Sampling", "family_of"]

FAMILIES: dict[str, type[Family]] = {
    family.pipeline_class: family
    for family in (
        StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Flux2, Flux2Klein, QwenImage, ZImage, Sana,
        PixArtSigma,
    )
}  # fmt: skip


def family_of(index: Mapping[str, Any], base: str) -> type[Family]:
    """The family of a `model_index.json`; raises InputError, with the known classes, for another one's."""
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise InputError(f"{base!r} is a {name}, which this cannot train; it knows {', '.join(FAMILIES)}.")
    return FAMILIES[name]
