"""Estimates for weights that autograd makes no gradient for, such as those in eight bits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from s2ft_diffusion import estimate_prior
from s2ft_diffusion.tuner.prior import s2ft_layers
from tests.prior_cases import adapted, batches, cosine, loss_of


class TestWithoutGradients:
    """Weights that autograd makes no gradient for: estimated from inputs and gradients of outputs."""

    def quantised(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """A model of weights in 8 bits, and one of the same weights in float32."""
        plain = copy.deepcopy(model)
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                kind = type(module)
                scale = module.weight.detach().abs().max() / 127
                packed = (module.weight.detach() / scale).round().to(torch.int8)
                module.weight.data = packed.float() * scale
                other = model.get_submodule(name)
                other.weight = nn.Parameter(packed, requires_grad=False)
                other.scale = scale
                other.__class__ = type(f"Packed{kind.__name__}", (kind,), {"forward": _unpacked_forward})
        return model, plain

    @pytest.mark.parametrize("estimate", ["gradient", "normalized", "scaled"])
    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_linear(self, two_layers, estimate, checkpointed) -> None:
        packed, plain = self.quantised(two_layers)
        expected = estimate_prior(model := adapted(plain), loss_of(model), batches(), estimate=estimate)
        model = adapted(packed)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def loss(batch: torch.Tensor) -> torch.Tensor:
            output = checkpoint(model, batch, use_reentrant=False) if checkpointed else model(batch)
            return output.square().mean()

        found = estimate_prior(model, loss, batches(), estimate=estimate)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())

    @pytest.mark.parametrize(
        ("conv", "size"),
        [
            (nn.Conv1d(4, 6, 3, stride=2, padding=1), (9,)),
            (nn.Conv2d(4, 6, (3, 2), padding="same", groups=2), (5, 6)),
            (nn.Conv2d(4, 6, 3, padding=(1, 2), dilation=2, padding_mode="circular"), (7, 6)),
            (nn.Conv3d(4, 6, 2), (3, 4, 3)),
        ],
    )
    def test_convolution(self, conv, size) -> None:
        packed, plain = self.quantised(nn.Sequential(conv))
        data = [torch.randn(2, 4, *size) for _ in range(3)]
        expected = estimate_prior(model := adapted(plain, ["0"]), loss_of(model), data)
        found = estimate_prior(model := adapted(packed, ["0"]), loss_of(model), data)
        torch.testing.assert_close(found["base_model.model.0"], expected["base_model.model.0"], rtol=1e-4, atol=1e-5)

    def test_full_says_that_it_is_scaled(self, two_layers) -> None:
        packed, _ = self.quantised(two_layers)
        model = adapted(packed)
        with pytest.warns(UserWarning, match=r'first has one that cannot be trained .*"scaled" instead'):
            found = estimate_prior(model, loss_of(model), batches(), estimate="full")
        expected = estimate_prior(model, loss_of(model), batches(), estimate="scaled")
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_weights_stored_in_eight_bits(self, two_layers) -> None:
        from diffusers.hooks import apply_layerwise_casting

        model = adapted(two_layers)
        plain = estimate_prior(model, loss_of(model), batches())
        for layer in s2ft_layers(model).values():
            apply_layerwise_casting(
                layer.get_base_layer(), storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
            )
        found = estimate_prior(model, loss_of(model), batches())
        for name in plain:
            assert cosine(found[name], plain[name]) > 0.98

    def test_bitsandbytes(self, two_layers) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        plain = copy.deepcopy(two_layers)
        for name in ("first", "second"):
            layer = plain.get_submodule(name)
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4"
            )
            packed.load_state_dict(layer.state_dict())
            setattr(two_layers, name, packed.to("cpu"))
        expected = estimate_prior(model := adapted(plain), loss_of(model), batches())
        found = estimate_prior(model := adapted(two_layers), loss_of(model), batches())
        assert all(cosine(found[name], expected[name]) > 0.9 for name in expected)


def _unpacked_forward(self, x: torch.Tensor) -> torch.Tensor:
    weight = self.weight.float() * self.scale
    return F.linear(x, weight, self.bias) if isinstance(self, nn.Linear) else self._conv_forward(x, weight, self.bias)
