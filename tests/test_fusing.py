"""Fusing is undone exactly, whatever else happens to the weights, and unloading leaves what was fused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from s2ft_diffusion import S2FTLayer
from tests.conftest import add, generate, same_state, state


def layers(pipe) -> list[S2FTLayer]:
    return [module for module in pipe.unet.modules() if isinstance(module, S2FTLayer)]


def weights(pipe) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight.data.clone() for layer in layers(pipe)]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_that_is_fused_beside_it_survives(pipe, dtype) -> None:
    torch.manual_seed(0)
    pipe.unet.to(dtype)
    add(pipe, "dog")
    lora = LoraConfig(target_modules=["to_q"], r=4, lora_alpha=4, init_lora_weights=False)
    pipe.unet.add_adapter(lora, "style")
    pipe.set_adapters(["dog", "style"], [1.0, 0.01])
    queries = [layer for layer in layers(pipe) if layer.in_features and _lora_around(pipe, layer)]
    assert queries
    before = [layer.get_base_layer().weight.data.clone() for layer in queries]
    pipe.fuse_s2ft()
    pipe.unet.fuse_lora(adapter_names=["style"])
    pipe.unfuse_s2ft()
    for layer, weight in zip(queries, before, strict=True):
        assert not torch.equal(layer.get_base_layer().weight, weight)  # the LoRA is still in it
    pipe.unet.unfuse_lora()
    for layer, weight in zip(queries, before, strict=True):
        error = (layer.get_base_layer().weight - weight).norm() / weight.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.03)  # several roundings to bfloat16


def _lora_around(pipe, layer) -> bool:
    return any(getattr(module, "base_layer", None) is layer for module in pipe.unet.modules())


def test_numbers_that_change_while_they_are_fused(pipe) -> None:
    add(pipe)
    before = weights(pipe)
    pipe.fuse_s2ft()
    for layer in layers(pipe):
        layer.s2ft_delta["one"].coefficients.data.mul_(2)
    pipe.unfuse_s2ft()
    assert same(weights(pipe), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_type_that_changes_while_it_is_fused(pipe, dtype) -> None:
    add(pipe)
    before = weights(pipe)
    pipe.fuse_s2ft()
    pipe.unet.to(dtype)
    pipe.unfuse_s2ft()
    assert same(weights(pipe), [weight.to(dtype) for weight in before])


def test_adapters_around_and_inside_a_lora_share_one_layer(pipe, folder, tmp_path) -> None:
    path, _ = folder
    pipe.load_s2ft_weights(path, adapter_name="one")
    count, before = len(layers(pipe)), weights(pipe)
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], r=2), "lora")  # starts at zero
    pipe.load_s2ft_weights(path, adapter_name="two")
    assert len(layers(pipe)) == count
    pipe.set_adapters(["one", "two"], [1.0, 0.01])
    both = generate(pipe)
    pipe.fuse_s2ft()
    torch.testing.assert_close(generate(pipe), both, rtol=1e-3, atol=1e-3)
    pipe.unfuse_s2ft()
    assert same(weights(pipe), before)
    pipe.unload_lora_weights()
    torch.testing.assert_close(generate(pipe), both, rtol=1e-4, atol=1e-4)


def test_a_second_fuse_that_fails_is_undone(pipe) -> None:
    add(pipe, "one")
    add(pipe, "two", seed=1)
    pipe.fuse_s2ft(adapter_names="one")
    before = weights(pipe)
    with torch.no_grad():
        layers(pipe)[-1].s2ft_delta["two"].coefficients[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        pipe.fuse_s2ft(adapter_names=["two"], safe_fusing=True)
    assert same(weights(pipe), before)
    assert {tuple(layer.merged_adapters) for layer in layers(pipe)} == {("one",)}


def test_deleting_one_of_two_leaves_the_other_fused(pipe) -> None:
    add(pipe, "one")
    add(pipe, "two", seed=1)
    before = weights(pipe)
    pipe.fuse_s2ft(adapter_names=["two"])
    with_two = weights(pipe)
    pipe.fuse_s2ft(adapter_names=["one"])
    pipe.delete_adapters("one")
    assert {tuple(layer.merged_adapters) for layer in layers(pipe)} == {("two",)}
    assert same(weights(pipe), with_two)
    pipe.unfuse_s2ft()
    assert same(weights(pipe), before)


def test_unloading_leaves_what_is_fused(pipe, folder) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path)
    pipe.fuse_s2ft()
    pipe.unload_s2ft_weights()
    assert not layers(pipe)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base_inside", [True, False])
@pytest.mark.parametrize("verbs_inside", [True, False])
def test_inference_mode_around_the_base_or_the_verbs(pipe, folder, base_inside, verbs_inside) -> None:
    """A model has its own verbs as well; its weights are ordinary afterwards if they were."""
    path, expected = folder
    with torch.inference_mode(base_inside):
        pipe.unet = copy.deepcopy(pipe.unet)
    before = state(pipe)
    pipe.load_s2ft_weights(path)
    with torch.inference_mode(verbs_inside):
        for layer in layers(pipe):
            layer.merge()
    if not base_inside:
        assert not any(parameter.is_inference() for parameter in pipe.unet.parameters())
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode(verbs_inside):
        for layer in layers(pipe):
            layer.unmerge()
    assert torch.equal(generate(pipe), expected)
    with torch.no_grad():
        layers(pipe)[-1].s2ft_delta["s2ft_0"].coefficients[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        pipe.fuse_s2ft(safe_fusing=True)
    pipe.fuse_s2ft()
    pipe.delete_adapters("s2ft_0")
    assert same_state(pipe, before)
    generate(pipe)
