"""Bases in low precision, quantised or offloaded."""

from __future__ import annotations

import copy

import pytest
import torch

from s2ft_diffusion import S2FTConfig, S2FTLinear
from s2ft_diffusion.tuner.seeding import seeded
from tests.conftest import generate, state


def test_unfusing_after_a_change_of_type(pipe, folder) -> None:
    path, _ = folder
    half = {k: v.half() for k, v in state(pipe).items() if k.startswith("unet")}
    pipe.load_s2ft_weights(path)
    pipe.fuse_s2ft()
    pipe.unet.to(torch.float16)
    pipe.unfuse_s2ft()
    pipe.unload_s2ft_weights()
    assert all(torch.equal(state(pipe)[k], v) for k, v in half.items())


@torch.no_grad()
def errors_of_effects(pipe, dtype: torch.dtype) -> list[float]:
    """How far each adapted layer's own output is from a float32 product with its delta weight, relatively.

    At |dW| / |W| = 1e-3 the base's rounding would hide the answer, so the base is silenced once the scale is set.
    """
    errors = []
    for layer in (m for m in pipe.unet.modules() if isinstance(m, S2FTLinear)):
        linear = layer.get_base_layer()
        layer.set_scale("s2ft_0", float(1e-3 * linear.weight.float().norm() / layer.get_delta_weight("s2ft_0").norm()))
        linear.weight.zero_()
        assert linear.bias is None
        x = torch.randn(64, layer.in_features, generator=seeded("effect")).to(dtype)
        wanted = x.float() @ layer.get_delta_weight("s2ft_0").T
        found = layer(x)
        assert found.dtype == dtype
        errors.append(float((found.float() - wanted).norm() / wanted.norm()))
    assert len(errors) == 28
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases(pipe, folder, dtype) -> None:
    path, _ = folder
    pipe.unet.to(dtype)
    pipe.text_encoder.to(dtype)
    pipe.load_s2ft_weights(path)
    assert torch.isfinite(generate(pipe)).all()
    assert max(errors_of_effects(pipe, dtype)) < 0.01


def test_one_evaluation_of_a_low_precision_denoiser(pipe, folder) -> None:
    """One step, so that sampling does not amplify rounding: the effect, beside what rounding does to the base."""
    path, _ = folder
    exact, rounded = pipe.unet, copy.deepcopy(pipe.unet).to(torch.bfloat16)
    inputs = (
        torch.randn(4, 4, 8, 8, generator=seeded("x")),
        torch.tensor(500),
        pipe.encode_prompt("a photo", "cpu", 4, False)[0],
    )

    @torch.no_grad()
    def predictions() -> tuple[torch.Tensor, torch.Tensor]:
        low = [i.bfloat16() if i.is_floating_point() else i for i in inputs]
        return exact(*inputs).sample, rounded(*low).sample.float()

    base, low_base = predictions()
    pipe.load_s2ft_weights(path)
    pipe.unet = rounded
    pipe.load_s2ft_weights(path)
    adapted, low_adapted = predictions()
    rounding = (low_base - base).norm()
    assert ((low_adapted - low_base) - (adapted - base)).norm() < 3 * rounding


def test_converting_a_loaded_pipeline_keeps_it_usable(pipe, folder) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path)
    pipe.unet.to(torch.float16)
    pipe.unet.to(torch.float32)
    pipe_change = (generate(pipe) - expected).norm()
    assert pipe_change < 0.1 * expected.norm()


def test_fusing_into_bf16_warns_when_it_rounds_the_change_away(pipe, folder) -> None:
    path, _ = folder
    pipe.unet.to(torch.bfloat16)
    pipe.load_s2ft_weights(path)
    pipe.set_adapters("s2ft_0", 1e-4)
    with pytest.warns(UserWarning, match="rounds an adapter's change"):
        pipe.fuse_s2ft()
    before = {k: v for k, v in pipe.unet.state_dict().items() if "base_layer" in k}
    pipe.unfuse_s2ft()
    assert any(not torch.equal(v, pipe.unet.state_dict()[k]) for k, v in before.items())


def test_layerwise_casting(pipe, folder) -> None:
    """Weights stored in bfloat16 or 8 bits, coefficients in full: the adapter's effect is not rounded at all."""
    path, _ = folder
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    base = generate(pipe)
    pipe.load_s2ft_weights(path)
    assert not torch.equal(generate(pipe), base)
    layer = next(m for m in pipe.unet.modules() if isinstance(m, S2FTLinear))
    assert layer.get_base_layer().weight.dtype == torch.float8_e4m3fn
    assert layer.s2ft_delta["s2ft_0"].coefficients.dtype == torch.float32
    x = torch.randn(8, layer.in_features, generator=seeded("x"))
    stored = layer.get_base_layer().weight.float()
    torch.testing.assert_close(layer(x), x @ (stored + layer.get_delta_weight("s2ft_0")).T, rtol=1e-4, atol=1e-4)
    pipe.unload_s2ft_weights()
    assert torch.equal(generate(pipe), base)


def test_layerwise_casting_of_a_pipeline_with_an_adapter(pipe, folder) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    layer = next(m for m in pipe.unet.modules() if isinstance(m, S2FTLinear))
    assert layer.get_base_layer().weight.dtype == torch.bfloat16
    assert (generate(pipe) - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("offload", ["group", "group_leaf"])
def test_group_offload(pipe, folder, offload) -> None:
    path, expected = folder
    kind = {
        "group": {"offload_type": "block_level", "num_blocks_per_group": 1},
        "group_leaf": {"offload_type": "leaf_level"},
    }
    device = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=device, offload_device=device, **kind[offload])
    pipe.load_s2ft_weights(path)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
    pipe.unload_s2ft_weights()
    assert torch.isfinite(generate(pipe)).all()


def test_hooks_of_sequential_offload_find_the_coefficients(pipe, folder) -> None:
    """What enable_sequential_cpu_offload does, with the CPU as the execution device: weights wait on "meta"."""
    from accelerate import cpu_offload

    path, expected = folder
    pipe.load_s2ft_weights(path)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in pipe.unet.parameters())
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)


def test_quantised_linears_take_the_second_product(two_layers) -> None:
    """A linear whose weight is not a plain matrix (as bitsandbytes') is called as it is; fusing is refused by name."""
    from peft import inject_adapter_in_model

    class PackedLinear(torch.nn.Linear):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features)
            self.full = linear.weight.detach().clone()
            self.bias = linear.bias
            self.weight = torch.nn.Parameter(torch.zeros(7, dtype=torch.uint8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.full, self.bias)

    two_layers.first = PackedLinear(two_layers.first)
    inject_adapter_in_model(S2FTConfig(target_modules=["first"], n_frequency=40, init_weights=False), two_layers)
    layer, data = two_layers.first, torch.randn(3, 12)
    expected = layer.base_layer(data) + data @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(data), expected)
    with pytest.raises(TypeError, match="uint8"):
        layer.merge()
