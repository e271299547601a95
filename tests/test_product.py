"""Products taken in the spectrum: the same as with the dense weight change, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2ft_diffusion import S2FTConfig, S2FTLayer
from s2ft_diffusion.tuner.layer import S2FTLinear
from s2ft_diffusion.tuner.product import index_product, prefers_spectrum, spectral_product
from s2ft_diffusion.tuner.rearrange import Rearrangement
from s2ft_diffusion.tuner.spectrum import delta_weight, distinct_positions, inverse_transform, sample_positions


def random_signs(count: int) -> torch.Tensor:
    return (torch.randint(0, 2, (count,)) * 2 - 1).to(torch.int8)


def make(shape: tuple[int, int], kind: str, count: int, seed: int = 0):
    torch.manual_seed(seed)
    d, k = shape
    positions = sample_positions(min(count, distinct_positions(shape, kind)), shape, kind=kind, sampling="random")
    rearrangement = Rearrangement(torch.randperm(d), torch.randperm(k), random_signs(d), random_signs(k))
    size = (len(positions), 2) if kind == "complex" else (len(positions),)
    return positions, rearrangement, torch.randn(size, dtype=torch.float64, requires_grad=True)


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 13),
    k=st.integers(1, 13),
    tokens=st.integers(1, 5),
    kind=st.sampled_from(["complex", "real"]),
    norm=st.sampled_from(["ortho", "backward"]),
    seed=st.integers(0, 1000),
)
def test_equals_the_product_with_the_dense_change(d, k, tokens, kind, norm, seed) -> None:
    positions, rearrangement, coefficients = make((d, k), kind, 20, seed)
    x = torch.randn(2, tokens, k, dtype=torch.float64, requires_grad=True)
    expected = x @ delta_weight(coefficients, positions, rearrangement, norm).T
    found = spectral_product(x, coefficients, index_product(positions, rearrangement, norm, real=kind == "real"))
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, [x, coefficients], direction),
        torch.autograd.grad(expected, [x, coefficients], direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(6, 8), (5, 7)])
def test_a_mirrored_position_is_the_same_function(shape) -> None:
    """Files may hold a complex coefficient at either of a pair of mirrored positions."""
    d, k = shape
    positions, rearrangement, coefficients = make(shape, "complex", 12)
    mirrored = torch.stack([-positions[:, 0] % d, -positions[:, 1] % k], dim=1)
    x = torch.randn(3, k, dtype=torch.float64)
    expected = x @ delta_weight(coefficients, mirrored, rearrangement, "ortho").T
    torch.testing.assert_close(
        spectral_product(x, coefficients, index_product(mirrored, rearrangement, "ortho", real=False)), expected
    )


@pytest.mark.parametrize("kind", ["complex", "real"])
def test_gradcheck(kind) -> None:
    positions, rearrangement, coefficients = make((5, 6), kind, 9)
    index = index_product(positions, rearrangement, "ortho", real=kind == "real")
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c: spectral_product(x, c, index), (x, coefficients))


def test_few_tokens_of_a_large_layer_are_multiplied_in_the_spectrum() -> None:
    assert prefers_spectrum(64, 4000, (1280, 1280))
    assert prefers_spectrum(77, 4000, (1280, 768))
    assert not prefers_spectrum(4096, 4000, (320, 320))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_gives_the_same_either_way(dtype, monkeypatch) -> None:
    """In training with few tokens, in training with many, and in sampling."""
    torch.manual_seed(0)
    config = S2FTConfig(n_frequency=200, init_weights=False, scaling=3.0)
    layer = S2FTLinear(nn.Linear(320, 256), "default", 200, config, "layer").to(dtype)
    layer.s2ft_delta["default"].float()
    x = torch.randn(2, 3, 320, dtype=dtype)
    assert isinstance(layer, S2FTLayer)
    assert layer.s2ft_delta["default"].prefers_product(x)
    coefficients = layer.s2ft_delta["default"].coefficients
    calls = []
    monkeypatch.setattr(
        "s2ft_diffusion.tuner.delta.inverse_transform", lambda *a: (calls.append(1), inverse_transform(*a))[1]
    )
    few = layer(x)
    (few_grad,) = torch.autograd.grad(few.float().square().sum(), coefficients)
    assert not calls
    monkeypatch.setattr("s2ft_diffusion.tuner.delta.prefers_spectrum", lambda *a: False)
    many = layer(x)
    (many_grad,) = torch.autograd.grad(many.float().square().sum(), coefficients)
    assert calls
    with torch.no_grad():
        sampled = layer(x)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for found in (few, sampled):
        torch.testing.assert_close(found, many, rtol=tolerance, atol=tolerance)
    assert (few_grad - many_grad).norm() <= tolerance * many_grad.norm()


def test_on_a_gpu_the_largest_layers_alone_are_multiplied_in_the_spectrum() -> None:
    assert prefers_spectrum(77, 4000, (1280, 1280))
    assert not prefers_spectrum(77, 4000, (1280, 1280), "cuda")
    assert prefers_spectrum(77, 1000, (27648, 3072), "cuda")
    assert not prefers_spectrum(4096, 1000, (27648, 3072), "cuda")


def test_an_index_is_kept_in_training_only() -> None:
    layer = S2FTLinear(nn.Linear(320, 256), "default", 200, S2FTConfig(n_frequency=200), "layer")
    delta, x = layer.s2ft_delta["default"], torch.randn(2, 320)
    layer(x)
    (first,) = delta._indexes.values()
    layer(x)
    assert next(iter(delta._indexes.values()))[1] is first[1]
    delta.place(delta.positions.flip(0), delta.rearrangement)
    layer(x)
    assert next(iter(delta._indexes.values()))[1] is not first[1]
    with torch.no_grad():
        layer(x)  # a look at how training goes
        assert delta._indexes
        delta.requires_grad_(False)
        delta.coefficients.add_(1)
        layer(x)
    assert not delta._indexes
