"""Adapters for other tools, and two in one."""

from __future__ import annotations

import pytest
import torch

from app.exports import TOOLS, export
from app.limits import RequestError
from s2ft_diffusion import toybox
from s2ft_diffusion.adapters.base_files import weight_shapes
from s2ft_diffusion.adapters.file import read_adapter
from s2ft_diffusion.adapters.lora_files import read_lora


def changes(path, strength: float) -> dict[str, torch.Tensor]:
    adapter = read_adapter(path)
    return {
        name: strength * adapter.configs["unet"].scaling * layer.delta()
        for name, layer in adapter.layers["unet"].items()
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_a_lora_of_two_is_the_sum_of_their_changes(library, ids, tmp_path, tool) -> None:
    cat, dog = library.get(ids["cat"]), library.get(ids["dog"])
    path, words = export([(cat, 0.5), (dog, 1.5)], tool, "toybox", tmp_path, "cat-dog")
    assert path.name == f"cat-dog-{TOOLS[tool]}.safetensors"
    assert words.startswith(f"{path.name}: ")
    found = read_lora(path, weight_shapes(toybox.base_path())).layers["unet"]
    first, second = changes(cat.path, 0.5), changes(dog.path, 1.5)
    assert found.keys() == first.keys()
    for name, layer in found.items():
        expected = first[name] + second[name]
        assert (layer.delta().reshape(expected.shape) - expected).norm() < 2e-3 * expected.norm()


def test_what_cannot_be_exported_is_said(library, ids, tmp_path) -> None:
    with pytest.raises(RequestError, match="tool must be one of ComfyUI"):
        export([(library.get(ids["cat"]), 1.0)], "Paint", "toybox", tmp_path, "cat")
