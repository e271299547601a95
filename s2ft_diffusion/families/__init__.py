"""What differs between base models, a file each, chosen by the class that `model_index.json` names.

Every module of this package is one family, or two that are alike, but for what they share: `family`, `objectives`,
`loading`, `quantization` and `offloading`. A new one is found because it is here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .family import FAMILIES, Conditions, Configs, Family, Sampling

__all__ = ["FAMILIES", "Conditions", "Configs", "Family", "Sampling", "family_of"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f".{_module.name}", __name__)


def family_of(index: Mapping[str, Any], base: str) -> type[Family]:
    """The family of a `model_index.json`; raises InputError, with the known classes, for another one's."""
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise InputError(f"{base!r} is a {name}, which is no known family; known are {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[name]
