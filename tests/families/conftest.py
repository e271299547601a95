"""The tiny pipelines, saved once each in diffusers' layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.pipelines import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a class's tiny pipeline."""
    root = tmp_path_factory.mktemp("bases")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            tiny(name).save_pretrained(root / name)
        return root / name

    return folder
