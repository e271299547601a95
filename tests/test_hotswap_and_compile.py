"""Adapters that take another's place, and pipelines that are compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from s2ft_diffusion import S2FTConfig, S2FTLinear, attention_targets
from s2ft_diffusion.adapters.file import read_adapter
from s2ft_diffusion.tuner.seeding import seeded
from tests.conftest import add, generate, same_state, second_folder, state


def second(pipe, tmp_path) -> tuple[Path, torch.Tensor]:
    """Another adapter's folder, and the images it makes."""
    other = second_folder(pipe, tmp_path)
    pipe.load_s2ft_weights(other)
    wanted = generate(pipe)
    pipe.unload_s2ft_weights()
    return other, wanted


@pytest.mark.slow
def test_compile(pipe, folder) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    pipe.fuse_s2ft()  # the verbs find the model inside
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_compiled_block_samples_and_trains(pipe) -> None:
    """In float64, where sums in another order are no reason to differ."""
    add(pipe)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0].double()
    compiled = torch.compile(block, fullgraph=True)
    hidden = torch.randn(2, 16, 64, generator=seeded("hidden"), dtype=torch.float64)
    context = torch.randn(2, 32, 32, generator=seeded("context"), dtype=torch.float64)
    coefficients = [p for n, p in block.named_parameters() if "coefficients" in n]
    with torch.no_grad():
        for _ in range(2):
            found, wanted = (f(hidden, encoder_hidden_states=context) for f in (compiled, block))
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
            for parameter in coefficients:
                parameter.mul_(2)  # a graph that had taken them as constants would go on as before
    gradients = [
        torch.autograd.grad(f(hidden, encoder_hidden_states=context).square().mean(), coefficients)
        for f in (compiled, block)
    ]
    assert len(gradients[0]) == 4
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_hotswap(pipe, folder, tmp_path) -> None:
    path, expected = folder
    other, wanted = second(pipe, tmp_path)
    name = pipe.load_s2ft_weights(path, adapter_name="place")
    assert torch.equal(generate(pipe), expected)
    layers = [module for module in pipe.unet.modules() if isinstance(module, S2FTLinear)]
    assert pipe.load_s2ft_weights(other, adapter_name=name, hotswap=True) == "place"
    assert torch.equal(generate(pipe), wanted)
    assert [module for module in pipe.unet.modules() if isinstance(module, S2FTLinear)] == layers
    saved = pipe.save_s2ft_weights(tmp_path / "again", dtype="float32")
    again = read_adapter(saved)
    for layer, found in read_adapter(other / saved.name).layers["unet"].items():
        for key, tensor in found.state().items():
            assert torch.equal(again.layers["unet"][layer].state()[key], tensor)
    assert again.configs["unet"].seed == 1


def test_hotswap_into_another_scaling(pipe, folder) -> None:
    path, expected = folder
    add(pipe, "place")
    for module in pipe.unet.modules():
        if isinstance(module, S2FTLinear):
            module.s2ft_config["place"].scaling = 0.5
    pipe.load_s2ft_weights(path, adapter_name="place", hotswap=True)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    assert pipe.unet.peft_config["place"].scaling == 0.5


def test_what_cannot_be_swapped_changes_nothing(pipe, folder, tmp_path) -> None:
    path, _ = folder
    with pytest.raises(ValueError, match="needs the name of a loaded"):
        pipe.load_s2ft_weights(path, hotswap=True)
    with pytest.raises(ValueError, match="needs the name of a loaded"):
        pipe.load_s2ft_weights(path, adapter_name="place", hotswap=True)
    config = S2FTConfig(target_modules=attention_targets(pipe.unet), n_frequency=200, init_weights=False)
    pipe.unet.add_adapter(config, "fewer")
    before = state(pipe)
    with pytest.raises(ValueError, match=r"coefficients \(17, 17\) on a grid.*the place coefficients \(14, 14\)"):
        pipe.load_s2ft_weights(path, adapter_name="fewer", hotswap=True)
    assert same_state(pipe, before)
    pipe.unload_s2ft_weights()
    pipe.unet.add_adapter(S2FTConfig(target_modules=attention_targets(pipe.unet)[:3], n_frequency=300), "some")
    with pytest.raises(ValueError, match="only one of the two adapters has unet"):
        pipe.load_s2ft_weights(path, adapter_name="some", hotswap=True)
    config = S2FTConfig(target_modules=attention_targets(pipe.unet), n_frequency=300, scaling=0.0)
    pipe.unet.add_adapter(config, "silent")
    with pytest.raises(ValueError, match="scaling is 0"):
        pipe.load_s2ft_weights(path, adapter_name="silent", hotswap=True)


@pytest.mark.slow
def test_hotswap_compiles_nothing_again(pipe, folder, tmp_path) -> None:
    path, expected = folder
    other, wanted = second(pipe, tmp_path)
    pipe.load_s2ft_weights(path, adapter_name="place")
    torch.compiler.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.load_s2ft_weights(other, adapter_name="place", hotswap=True)
        torch.testing.assert_close(generate(pipe), wanted, rtol=1e-3, atol=1e-3)
