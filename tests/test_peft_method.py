"""S2FT through PEFT's own doors, as PEFT tests its methods."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from s2ft_diffusion import S2FTConfig, S2FTLinear, attention_targets, initialize_s2ft_weights
from s2ft_diffusion.tuner.prior import estimate_prior

BOTH = ["first", "second"]


def config(**options) -> S2FTConfig:
    return S2FTConfig(**{"target_modules": BOTH, "n_frequency": 40, **options})


def x() -> torch.Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_fresh_adapter_changes_no_bit(two_layers, preset) -> None:
    before = two_layers(x())
    model = get_peft_model(two_layers, S2FTConfig.from_preset(preset, target_modules=BOTH, n_frequency=40))
    assert torch.equal(model(x()), before)


def test_counts_trainable_numbers(two_layers, capsys) -> None:
    model = get_peft_model(two_layers, config())
    model.print_trainable_parameters()
    assert f"trainable params: {6 * 6 + 6 * 6}" in capsys.readouterr().out  # the largest tables of at most 40
    free = config(n_frequency=0.25, coefficients="real", positions="free")
    model = get_peft_model(copy.deepcopy(two_layers), free)
    assert model.get_nb_trainable_parameters()[0] == 48 + 28


def test_pattern_gives_layers_their_own_budget(two_layers) -> None:
    model = get_peft_model(two_layers, config(n_frequency_pattern={"second": 10}))
    sizes = [m.s2ft_delta["default"].coefficients.numel() for m in model.modules() if isinstance(m, S2FTLinear)]
    assert sizes == [6 * 6, 3 * 3]


def test_save_and_load(two_layers, tmp_path) -> None:
    base = copy.deepcopy(two_layers)
    model = get_peft_model(two_layers, config(init_weights=False))
    initialize_s2ft_weights(model, lambda b: model(b).square().mean(), [x()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "coefficients" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x()), model(x()))
    assert loaded.peft_config["default"].coefficients == "complex"


KINDS = [{}, {"oversampling": 3}, {"positions": "free"}]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("narrower", ["both", "inputs", "outputs"])
def test_a_base_of_other_sizes_gets_a_fresh_adapter(tmp_path, options, narrower) -> None:
    options = {"target_modules": ["0"], "n_frequency": 20, "sampling": "random", **options}
    saved = get_peft_model(nn.Sequential(nn.Linear(12, 9)), S2FTConfig(**options))
    saved.base_model.model[0].s2ft_delta["default"].coefficients.data.normal_()
    saved.save_pretrained(tmp_path)
    base = nn.Sequential(nn.Linear(12 if narrower == "outputs" else 8, 9 if narrower == "inputs" else 5))
    wanted = base(x()[:, : base[0].in_features])
    fresh = get_peft_model(copy.deepcopy(base), S2FTConfig(**options)).base_model.model[0].s2ft_delta["default"]
    with pytest.warns(UserWarning, match=r"The state of base_model\.model\.0 is not loaded"):
        model = PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)
    assert torch.equal(model(x()[:, : base[0].in_features]), wanted)
    found = model.base_model.model[0].s2ft_delta["default"]
    assert all(torch.equal(t, fresh.state_dict()[name]) for name, t in found.state_dict().items())


@pytest.mark.parametrize("options", KINDS)
def test_coefficients_may_be_loaded_alone(options) -> None:
    """What an optimizer or an average holds; places that are still to be drawn are drawn."""
    options = {"target_modules": ["0"], "n_frequency": 20, "sampling": "random", **options}
    base = nn.Sequential(nn.Linear(12, 9))
    saved = get_peft_model(copy.deepcopy(base), S2FTConfig(**options, init_weights=False))
    state = {name: t for name, t in saved.state_dict().items() if "coefficients" in name}
    for inference_mode in (False, True):
        model = get_peft_model(copy.deepcopy(base), S2FTConfig(**options, inference_mode=inference_mode))
        model.load_state_dict({}, strict=False)
        model.load_state_dict(state, strict=False)
        assert torch.equal(model(x()), saved(x()))


def test_a_config_that_was_loaded_can_be_trained_with(two_layers, tmp_path) -> None:
    """As with PEFT's own: it starts frozen, for its folder says inference_mode, and is trained when it is activated."""
    get_peft_model(copy.deepcopy(two_layers), config()).save_pretrained(tmp_path)
    model = get_peft_model(two_layers, S2FTConfig.from_pretrained(tmp_path))
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_adapter("default")
    assert model.get_nb_trainable_parameters()[0] == 6 * 6 + 6 * 6


def test_merge_and_unmerge_restore_every_bit(two_layers) -> None:
    model = get_peft_model(two_layers, config(init_weights=False))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    expected = model(x())
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x()), expected)
    fused = model.base_model.model.first.base_layer.weight
    assert fused.is_contiguous()
    assert not torch.equal(fused, weights["base_model.model.first.base_layer.weight"])
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_safe_merge_refuses_what_is_not_finite(two_layers) -> None:
    model = get_peft_model(two_layers, config(init_weights=False))
    layer = model.base_model.model.first
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.s2ft_delta["default"].coefficients[0] = float("inf")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


def test_merge_and_unload(two_layers) -> None:
    model = get_peft_model(two_layers, config(init_weights=False))
    expected = model(x())
    plain = model.merge_and_unload()
    assert type(plain.first) is nn.Linear
    torch.testing.assert_close(plain(x()), expected)


def test_several_adapters(two_layers) -> None:
    base = two_layers(x())
    model = get_peft_model(two_layers, config(init_weights=False))
    one = model(x())
    model.add_adapter(
        "other", config(init_weights=False, seed=1, n_frequency=20, coefficients="real", positions="free")
    )
    assert torch.equal(model(x()), one)
    model.set_adapter("other")
    two = model(x())
    assert not torch.equal(one, two)
    with model.disable_adapter():
        assert torch.equal(model(x()), base)
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.second
    delta = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(
        layer(hidden), nn.functional.linear(hidden, layer.base_layer.weight + delta, layer.base_layer.bias)
    )
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(model(x()), one)
    assert "other" not in model.base_model.model.first.s2ft_config


def test_scales_are_taken_off_exactly(two_layers) -> None:
    model = get_peft_model(two_layers, config(init_weights=False, scaling=3.0))
    layer = model.base_model.model.first
    layer.set_scale("default", 0.7)
    before = layer.effective_scale("default")
    for scale in (0.1, 3.3, 1.0, 0.7):
        layer.scale_layer(scale)
        layer.unscale_layer(scale)
        assert layer.effective_scale("default") == before
    layer.scale_layer(0.0)
    assert layer.effective_scale("default") == 0
    layer.set_scale("default", 1.0)  # how diffusers takes a scale of 0 off
    assert layer.effective_scale("default") == before
    layer.scale_layer(0.5)
    layer.scale_layer(0.5)
    layer.unscale_layer()
    assert layer.effective_scale("default") == before


@pytest.mark.parametrize("first", ["lora", "s2ft"])
def test_beside_lora_in_either_order(two_layers, first) -> None:
    lora = LoraConfig(target_modules=BOTH, r=2, init_lora_weights=False)
    s2ft = config(init_weights=False)
    order = [("lora", lora), ("s2ft", s2ft)] if first == "lora" else [("s2ft", s2ft), ("lora", lora)]
    alone = copy.deepcopy(two_layers)
    inject_adapter_in_model(order[0][1], alone, order[0][0])
    for name, one in order:
        inject_adapter_in_model(one, two_layers, name)
    layers = [m for m in two_layers.modules() if isinstance(m, S2FTLinear)]
    assert len(layers) == 2
    inner = two_layers.first
    hidden = torch.randn(4, 12)
    s2ft_layer = inner if isinstance(inner, S2FTLinear) else inner.base_layer
    lora_layer = inner.base_layer if isinstance(inner, S2FTLinear) else inner
    a, b = lora_layer.lora_A["lora"].weight, lora_layer.lora_B["lora"].weight
    linear = inner.get_base_layer()
    weight = linear.weight + s2ft_layer.get_delta_weight("s2ft") + b @ a * lora_layer.scaling["lora"]
    torch.testing.assert_close(two_layers.first(hidden), nn.functional.linear(hidden, weight, linear.bias))


def test_names_what_it_cannot_adapt(two_layers) -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"'0', a LayerNorm"):
        get_peft_model(model, S2FTConfig(target_modules=["0"], n_frequency=4))
    with pytest.raises(TypeError, match=r"out_proj': nn.MultiheadAttention takes its weight without calling it"):
        get_peft_model(nn.MultiheadAttention(8, 2), S2FTConfig(target_modules=["out_proj"], n_frequency=4))
    with pytest.raises(ValueError, match="second: n_frequency=400"):
        get_peft_model(two_layers, config(n_frequency_pattern={"second": 400}))


@pytest.mark.parametrize(
    "options",
    [
        {"coefficients": "imaginary"}, {"norm": "forward"}, {"sampling": "best"}, {"rearrange": "sort"},
        {"distance": "manhattan"}, {"refine": "3opt"}, {"n_frequency": 0}, {"n_frequency": 1.5}, {"gamma": -1},
        {"n_frequency_pattern": {"x": 0}}, {"n_frequency": math.nan}, {"n_frequency": "8"}, {"n_frequency": None},
        {"n_frequency": math.inf}, {"n_frequency_pattern": {"x": "8"}}, {"n_frequency_pattern": {"x": math.nan}},
        {"n_frequency_pattern": None}, {"gamma": "2"}, {"gamma": math.nan}, {"scaling": math.inf}, {"scaling": None},
        {"oversampling": math.nan}, {"oversampling": "2"}, {"oversampling": 0},
        {"layers_to_transform": [0], "target_modules": "x"},
    ],
)  # fmt: skip
def test_config_refuses(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).removesuffix("_pattern")):
        S2FTConfig(**options)


def test_presets() -> None:
    paper = S2FTConfig.from_preset("paper", target_modules=BOTH)
    assert (paper.coefficients, paper.norm, paper.distance, paper.signs, paper.refine) == (
        "real", "backward", "euclidean", False, None,
    )  # fmt: skip
    assert (paper.n_frequency, paper.gamma, paper.sampling) == (8000, 1.5, "power")
    with pytest.raises(ValueError, match="preset"):
        S2FTConfig.from_preset("best")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_a_small_change(dtype) -> None:
    """At |dW| / |W| = 1e-3 the adapter's effect is within 1 % of an fp32 reference's."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 192).to(dtype)
    model = nn.Sequential(copy.deepcopy(linear))
    inject_adapter_in_model(S2FTConfig(target_modules=["0"], n_frequency=2000, init_weights=False), model)
    layer = model[0]
    delta = layer.get_delta_weight("default")
    layer.set_scale("default", float(1e-3 * linear.weight.float().norm() / delta.norm().detach()))
    data = torch.randn(64, 256).to(dtype)
    reference = data.float() @ layer.get_delta_weight("default").float().T

    def effect(x: torch.Tensor) -> torch.Tensor:  # the layer's own second product, before the base's rounding
        return nn.functional.linear(x, layer.get_delta_weight("default").to(dtype)).float()

    assert (effect(data) - reference).norm() < 0.01 * reference.norm()
    # and the sum is as near to the exact output as a low-precision output can be
    exact = data.float() @ linear.weight.float().T + linear.bias.float() + reference
    rounding = (exact.to(dtype).float() - exact).norm()
    assert (layer(data).float() - exact).norm() < 3 * rounding
    # merging would not do: it rounds the change away
    merged = linear.weight.float() + layer.get_delta_weight("default")
    lost = (merged.to(dtype).float() - linear.weight.float()) - layer.get_delta_weight("default")
    assert lost.norm() > 0.05 * layer.get_delta_weight("default").norm()


def test_autocast_computes_in_the_low_dtype(two_layers) -> None:
    model = get_peft_model(two_layers, config(init_weights=False))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x()), rtol=0.05, atol=0.05)


def test_training_lowers_the_loss(two_layers) -> None:
    model = get_peft_model(two_layers, config())
    target = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return (model(batch) - target).square().mean()

    before = float(loss(x()))
    initialize_s2ft_weights(model, loss, [x()])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss(x()).backward()
        optimizer.step()
    assert float(loss(x())) < 0.5 * before
    assert model.base_model.model.first.base_layer.weight.grad is None


class TestPrior:
    def loss(self, model):
        return lambda batch: model(batch).square().mean()

    def batches(self) -> list[torch.Tensor]:
        return list(torch.randn(6, 4, 12, generator=torch.Generator().manual_seed(3)))

    def gradients(self, model, batches) -> list[torch.Tensor]:
        found = []
        for batch in batches:
            model.zero_grad()
            model(batch).square().mean().backward()
            found.append(model.first.weight.grad.clone())
        return found

    def test_gradient_is_equation_four(self, two_layers) -> None:
        expected = -sum(self.gradients(copy.deepcopy(two_layers), self.batches()))
        model = get_peft_model(two_layers, config(init_weights=False))  # adapters are off while estimating
        prior = estimate_prior(model, self.loss(model), self.batches())
        torch.testing.assert_close(prior["base_model.model.first"], expected)

    def test_normalized(self, two_layers) -> None:
        gradients = torch.stack(self.gradients(copy.deepcopy(two_layers), self.batches()))
        model = get_peft_model(two_layers, config())
        prior = estimate_prior(model, self.loss(model), self.batches(), estimate="normalized")
        expected = -gradients.sum(0) / gradients.square().sum(0).sqrt()
        torch.testing.assert_close(prior["base_model.model.first"], expected.nan_to_num(0.0))

    @pytest.mark.parametrize("estimate", ["gradient", "normalized", "scaled", "full"])
    def test_leaves_everything_else_alone(self, two_layers, estimate) -> None:
        model = get_peft_model(two_layers, config(init_weights=False))
        state = {n: t.clone() for n, t in model.state_dict().items()}
        flags = [p.requires_grad for p in model.parameters()]
        estimate_prior(model, self.loss(model), self.batches(), estimate=estimate)
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters())

    def test_not_finite(self, two_layers) -> None:
        model = get_peft_model(two_layers, config())
        with pytest.raises(ValueError, match="loss is nan"):
            initialize_s2ft_weights(model, lambda b: model(b).sum() * float("nan"), [x()])
        with pytest.raises(ValueError, match=r"first.*NaN"):
            initialize_s2ft_weights(model, lambda b: (model(b) * 0).sum().clamp(min=1) + _nan_gradient(model(b)), [x()])

    def test_no_gradient_at_all_warns(self, two_layers) -> None:
        model = get_peft_model(two_layers, config())
        with pytest.warns(UserWarning, match="2 of 2 layers have no gradient"):
            initialize_s2ft_weights(model, lambda b: (model(b) * 0).sum(), [x()])

    def test_unknown_names(self, two_layers) -> None:
        model = get_peft_model(two_layers, config())
        with pytest.raises(ValueError, match="nobody"):
            estimate_prior(model, self.loss(model), [], adapter_name="nobody")
        with pytest.raises(ValueError, match="guess"):
            estimate_prior(model, self.loss(model), [], estimate="guess")


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        ctx.shape = y.shape
        return y.sum() * 0

    @staticmethod
    def backward(ctx, grad):
        return torch.full(ctx.shape, float("nan"))


def _nan_gradient(y: torch.Tensor) -> torch.Tensor:
    return _NanGradient.apply(y)


def test_any_transformers_model() -> None:
    from transformers import ViTConfig, ViTModel

    vit = ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32)
    )
    model = get_peft_model(vit, S2FTConfig(target_modules=attention_targets(vit), n_frequency=50))
    assert sum(isinstance(m, S2FTLinear) for m in model.modules()) == 4
    output = model(torch.randn(1, 3, 32, 32)).last_hidden_state
    (output * torch.randn(output.shape)).sum().backward()  # a plain sum of normalised values has no gradient
    coefficients = [p for n, p in model.named_parameters() if "coefficients" in n]
    assert all(p.grad is not None and bool(p.grad.any()) for p in coefficients)


def test_transformers_own_door(pipe, tmp_path) -> None:
    encoder = pipe.text_encoder
    encoder.add_adapter(S2FTConfig(target_modules=attention_targets(encoder), n_frequency=64, init_weights=False), "a")
    ids = torch.arange(8)[None]
    expected = encoder(ids).last_hidden_state
    get_peft_model_folder = tmp_path / "adapter"
    encoder.save_pretrained(get_peft_model_folder)
    encoder.delete_adapter("a")
    encoder.load_adapter(str(get_peft_model_folder), adapter_name="b")
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected)
    encoder.load_adapter(str(get_peft_model_folder), adapter_name="c")
    layers = [module for module in encoder.modules() if isinstance(module, S2FTLinear)]
    assert len(layers) == len(attention_targets(encoder))  # each has both adapters
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected)
    encoder.delete_adapter("c")
    encoder.set_adapter("b")
    encoder.delete_adapter("b")
