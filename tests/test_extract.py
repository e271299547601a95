"""Adapters made of other methods' files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import FourierFTConfig, get_peft_model

from s2ft_diffusion import attention_targets, convert
from s2ft_diffusion.adapters.extract import extract_adapter
from s2ft_diffusion.adapters.file import AdapterFileError, read_adapter
from s2ft_diffusion.adapters.lora import Lora, LoraLayer, low_rank
from s2ft_diffusion.adapters.lora_files import write_lora
from s2ft_diffusion.tuner.config import S2FTConfig
from tests.random_adapters import dense, random_layer


def test_a_fourierft_adapter_is_the_same(pipe, tiny_base, tmp_path) -> None:
    names = attention_targets(pipe.unet)[:6]
    config = FourierFTConfig(
        n_frequency=50, scaling=30.0, random_loc_seed=5, init_weights=False, target_modules=names,
        n_frequency_pattern={names[1]: 30},
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(pipe.unet), config)
    model.save_pretrained(tmp_path / "fourierft")
    with pytest.raises(AdapterFileError, match="depend on its base model"):
        convert.convert(tmp_path / "fourierft", tmp_path / "a", to="s2ft")
    convert.convert(tmp_path / "fourierft", tmp_path / "a", to="s2ft", base=tiny_base, dtype="float32")
    adapter = read_adapter(tmp_path / "a")
    assert set(adapter.layers["unet"]) == set(names)
    assert adapter.trainable == 5 * 50 + 30
    for name in names:
        wanted = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(dense(adapter, "unet", name), wanted, rtol=1e-4, atol=1e-6)
    pipe.load_s2ft_weights(tmp_path / "a")
    text = json.loads((tmp_path / "fourierft" / "adapter_config.json").read_text())
    (tmp_path / "fourierft" / "adapter_config.json").write_text(json.dumps(text | {"bias": "all"}))
    with pytest.raises(AdapterFileError, match="bias='all', which an S2FT file cannot hold"):
        convert.read(tmp_path / "fourierft", tiny_base)


def test_extracting_what_is_on_a_grid_finds_it_again() -> None:
    """The change of a smooth grid is its own prior: without rearrangement the same functions, and nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    layer = random_layer((24, 20), generator, rank=4)
    layer.row_order, layer.column_order = torch.arange(24).int(), torch.arange(20).int()
    layer.row_sign[:], layer.column_sign[:] = 1, 1
    lora = Lora({"unet": {"a": low_rank(layer, 2.0)}})
    config = S2FTConfig(n_frequency=20, rearrange="none", scaling=0.5)
    adapter, errors = extract_adapter(lora, config)
    assert errors.total < 1e-3
    torch.testing.assert_close(dense(adapter, "unet", "a"), 2.0 * layer.delta(), rtol=1e-3, atol=1e-4)


def test_extracting_says_its_error(tmp_path) -> None:
    lora = Lora({"unet": {"a": LoraLayer(torch.randn(24, 2), torch.randn(2, 20))}})
    write_lora(tmp_path / "a", lora, "lora")
    sizes = []
    for numbers in (16, 100, 0.9):
        written = convert.extract(tmp_path / "a", tmp_path / "b", n_frequency=numbers, dtype="float32")
        adapter = read_adapter(tmp_path / "b")
        error = (dense(adapter, "unet", "a") - lora.layers["unet"]["a"].delta()).norm() / lora.layers["unet"][
            "a"
        ].norm()
        assert written.relative_error == pytest.approx(float(error), rel=1e-3)
        sizes.append(written.relative_error)
    assert sizes == sorted(sizes, reverse=True)
