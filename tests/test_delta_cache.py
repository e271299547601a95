"""Delta weights are made once while nothing changes, and never stale."""

from __future__ import annotations

import pytest
import torch
from peft import inject_adapter_in_model

from s2ft_diffusion import S2FTConfig, SpectralDelta
from s2ft_diffusion.tuner.delta_cache import DeltaCache, delta_cache


@pytest.fixture
def layer(two_layers, monkeypatch):
    """An adapted layer, with a count of the transforms done in `layer.transforms`."""
    inject_adapter_in_model(S2FTConfig(target_modules=["first"], n_frequency=40, init_weights=False), two_layers)
    two_layers.first.transforms = []
    original = SpectralDelta.forward

    def counting(self, *args, **kwargs):
        two_layers.first.transforms.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SpectralDelta, "forward", counting)
    return two_layers.first


def reference(layer, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return layer(x).detach()


@torch.no_grad()
def test_made_once_without_gradients(layer) -> None:
    x = torch.randn(3, 12)
    first = layer(x)
    for scale in (1.0, 0.5, 1.0):
        layer.set_scale("default", scale)
        again = layer(x)
    assert len(layer.transforms) == 1
    assert torch.equal(again, first)
    assert torch.equal(first, reference(layer, x))


@pytest.mark.parametrize("change", ["in place", "optimizer", "load", "assign", "positions", "convert", "base"])
def test_never_stale(layer, change) -> None:
    x = torch.randn(3, 12)
    delta = layer.s2ft_delta["default"]
    with torch.no_grad():
        before = layer(x)
        if change == "in place":
            delta.coefficients.mul_(2)
        elif change == "load":
            delta.load_state_dict({**delta.state_dict(), "coefficients": delta.coefficients * 2})
        elif change == "assign":
            delta.coefficients.data = delta.coefficients.data * 2
        elif change == "positions":
            delta.positions.copy_(delta.positions.flip(0))
        elif change == "base":
            layer.get_base_layer().weight.add_(1.0)
        elif change == "convert":
            layer.half().float()
    if change == "optimizer":
        layer(x).sum().backward()
        torch.optim.SGD(delta.parameters(), lr=1.0).step()
    with torch.no_grad():
        after = layer(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, reference(layer, x))


def test_models_made_under_inference_mode() -> None:
    """Their weights have no version counters: nothing can be kept, and nothing fails."""
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Linear(12, 16))
    inject_adapter_in_model(S2FTConfig(target_modules=["0"], n_frequency=40, init_weights=False), model)
    x = torch.randn(3, 12)
    with torch.no_grad():
        wanted = x @ (model[0].base_layer.weight + model[0].get_delta_weight("default")).T + model[0].base_layer.bias
        torch.testing.assert_close(model(x), wanted)


@torch.no_grad()
def test_fusing_lets_go_of_the_weight_as_it_was(layer) -> None:
    delta_cache.clear()
    x = torch.randn(3, 12)
    before = layer(x)
    layer.merge()
    assert delta_cache.bytes == 16 * 12 * 4  # the delta alone
    assert torch.equal(layer(x), before)
    layer.unmerge()
    assert torch.equal(layer(x), before)


@torch.no_grad()
def test_nothing_is_kept_while_training(layer) -> None:
    delta_cache.clear()
    layer(torch.randn(3, 12))
    assert delta_cache.bytes == 2 * 16 * 12 * 4  # the delta, and the weight it was added to
    with torch.enable_grad():
        layer(torch.randn(3, 12))
    assert delta_cache.bytes == 0


def test_budget_drops_what_was_used_longest_ago() -> None:
    class Owner:
        pass

    cache, owners, made = DeltaCache(budget=80), [Owner() for _ in range(4)], []

    def get(i: int) -> None:
        source = torch.zeros(1) if i not in sources else sources[i]
        sources[i] = source
        cache.get(owners[i], None, [source], lambda: made.append(i) or torch.zeros(10))  # 40 bytes

    sources: dict[int, torch.Tensor] = {}
    for i in (0, 1, 0, 2, 0, 1):
        get(i)
    assert made == [0, 1, 2, 1]
    assert cache.bytes == 80
    cache.budget = 40
    assert cache.bytes == 40
    get(1)
    assert made == [0, 1, 2, 1]
    owners.pop(1)
    assert cache.bytes == 0
    cache.budget = 8  # too small for any
    get(0)
    assert cache.bytes == 0
