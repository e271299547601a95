"""Adapters on layers that bitsandbytes or torchao has quantised, and on those stored in 8-bit floats."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from s2ft_diffusion import S2FTConfig, initialize_s2ft_weights
from s2ft_diffusion.tuner.seeding import seeded

KINDS = {
    "bitsandbytes": ("nf4", "8-bit"),
    "torchao": ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"),
}


def quantised(kind: str, dtype: torch.dtype) -> nn.Module:
    """Two linear layers, the first of them quantised."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8)).to(dtype)
    if kind in KINDS["torchao"]:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, kind)(), filter_fn=lambda module, name: name == "0")
        return model
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if kind == "nf4":
        packed = bitsandbytes.nn.Linear4bit(64, 48, compute_dtype=dtype, quant_type="nf4")
    else:
        packed = bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    packed.load_state_dict(model[0].state_dict())
    model[0] = packed.to("cpu")
    return model


@pytest.mark.parametrize("positions", ["grid", "free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kinds in KINDS.values() for kind in kinds])
def test_inference_training_and_what_is_refused(kind, dtype, positions) -> None:
    base = quantised(kind, dtype)
    x = torch.randn(5, 64, generator=seeded("x")).to(dtype)
    with torch.no_grad():
        plain = base[0](x)
    options = {"target_modules": ["0"], "n_frequency": 100, "positions": positions}
    model = get_peft_model(copy.deepcopy(base), S2FTConfig(**options, init_weights=False))
    layer = model.base_model.model[0]
    found = layer(x)
    assert found.dtype == plain.dtype
    wanted = plain.float() + x.float() @ layer.get_delta_weight("default").T
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)
    with pytest.raises(TypeError, match="cannot be fused into a"):
        layer.merge()
    # Trained from zero, with a prior: the loss falls, and the base stays.
    model = get_peft_model(base, S2FTConfig(**options))
    layer = model.base_model.model[0]

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return (model(batch).float() - 1).square().mean()

    initialize_s2ft_weights(model, loss, [x] * 2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(30):
        losses.append(loss(x))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert torch.equal(layer.base_layer(x), plain)


@pytest.mark.parametrize("positions", ["grid", "free"])
def test_a_base_stored_in_8_bit_floats_is_trained_on(positions) -> None:
    """As diffusers' layerwise casting has it: float8 between the calls, bfloat16 in them."""
    from diffusers.hooks import apply_layerwise_casting

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8)).to(torch.bfloat16)
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16)
    options = {"target_modules": ["0", "2"], "n_frequency": 100, "positions": positions}
    model = get_peft_model(model, S2FTConfig(**options))
    assert model.base_model.model[0].base_layer.weight.dtype == torch.float8_e4m3fn
    x = torch.randn(5, 64, generator=seeded("x")).bfloat16()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(30):
        losses.append((model(x).float() - 1).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
