"""Convolutions are adapted as linear layers are: with their stride, padding, dilation and groups."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from s2ft_diffusion import S2FTConfig, S2FTConv, attention_targets, initialize_s2ft_weights
from s2ft_diffusion.families.blank import AllocationTracker
from tests.conftest import generate, same_state, state

LAYERS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "3d": (nn.Conv3d(2, 3, 2, dilation=2), (1, 2, 5, 5, 5)),
    "groups": (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 6, 6)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "1x1": (nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
}


def adapted(layer: nn.Module, **options) -> S2FTConv:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(layer), S2FTConfig(target_modules=["0"], n_frequency=10, init_weights=False, **options)
    )
    return model.base_model.model[0]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_it_is_the_convolution_with_the_changed_weight(name, dtype, grad) -> None:
    original, shape = LAYERS[name]
    layer = adapted(type(original)(**_options(original)).to(dtype))
    base = layer.get_base_layer()
    assert isinstance(layer, S2FTConv)
    delta = layer.get_delta_weight("default")
    assert delta.shape == base.weight.shape
    x = torch.randn(shape, dtype=dtype)
    with torch.set_grad_enabled(grad):
        found = layer(x)
    wanted = base._conv_forward(x.double(), (base.weight + delta).double(), _double(base.bias))
    tolerance = 1e-6 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def _options(layer: nn.Module) -> dict:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {**{name: getattr(layer, name) for name in names}, "bias": layer.bias is not None}


def _double(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.double()


def test_gradients_are_those_of_the_dense_weight() -> None:
    layer = adapted(nn.Conv2d(4, 6, 3, padding=1).double())
    delta = layer.s2ft_delta["default"].double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)

    def product(x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"s2ft_delta.default.coefficients": coefficients}, (x,))

    assert torch.autograd.gradcheck(product, (x, delta.coefficients.detach().requires_grad_()))


def test_fusing_keeps_the_memory_format() -> None:
    layer = adapted(nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last))
    weight = layer.get_base_layer().weight
    before, x = weight.data.clone(), torch.randn(1, 8, 6, 6)
    expected = layer(x).detach()
    layer.merge()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(weight, before)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("estimate", ["gradient", "normalized", "scaled", "full"])
def test_a_prior_moves_rows_alone(estimate) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 3))
    before = [parameter.clone() for parameter in model.parameters()]
    model = get_peft_model(model, S2FTConfig(target_modules=["0", "2"], n_frequency=20))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    initialize_s2ft_weights(model, lambda x: model(x).square().mean(), batches, estimate=estimate)
    layer = model.base_model.model[0]
    delta = layer.s2ft_delta["default"]
    assert delta.integers("row_order").tolist() != list(range(12))
    assert delta.integers("column_order").tolist() == list(range(27))
    assert (delta.column_sign == 1).all()
    weights = [p for name, p in model.named_parameters() if "s2ft" not in name]
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_all_layers_of_a_pipeline(pipe, tmp_path) -> None:
    torch.manual_seed(0)
    before = state(pipe)
    targets = attention_targets(pipe.unet, "all")
    pipe.unet.add_adapter(S2FTConfig(target_modules=targets, n_frequency=0.01, init_weights=False), "all")
    assert sum(isinstance(module, S2FTConv) for module in pipe.unet.modules()) == 37
    expected = generate(pipe)
    path = pipe.save_s2ft_weights(tmp_path)
    pipe.unload_s2ft_weights()
    assert same_state(pipe, before)
    assert not torch.equal(generate(pipe), expected)
    pipe.load_s2ft_weights(path)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-5, atol=1e-5)
    pipe.unet.add_adapter(LoraConfig(target_modules=["conv1"], init_lora_weights=False), "lora")
    pipe.set_adapters(["s2ft_0", "lora"])
    both = generate(pipe)
    assert not torch.equal(both, expected)
    pipe.unload_lora_weights()
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)


def test_a_depthwise_convolution_makes_no_functions_of_every_channel() -> None:
    """Its d row functions in each of the d groups would be d * d channels (Sana's have 11,200)."""
    channels, side = 64, 8
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
    model = get_peft_model(layer, S2FTConfig(target_modules=["0"], n_frequency=500, init_weights=False))
    with AllocationTracker() as tracker:
        model(torch.randn(1, channels, side, side)).sum().backward()
    assert tracker.peak < 4 * 8 * 9 * channels * side * side  # a few times nine channels for each one, float32
