"""A layer with functions on a grid: thin products of every kind of layer, their gradients, sums and mixed batches."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from s2ft_diffusion import S2FTConfig, S2FTLayer
from s2ft_diffusion.tuner import delta as delta_module
from s2ft_diffusion.tuner.delta import _SHARED
from tests.random_adapters import arranged

LAYERS = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12)),
    "Conv1D": (lambda: Conv1D(9, 12), (2, 5, 12)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (1, 2, 5, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 6, 6)),
}


def adapted(name: str, **options) -> tuple[PeftModel, S2FTLayer, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    config = S2FTConfig(**{"target_modules": ["0"], "n_frequency": 12, "init_weights": False, **options})
    model = get_peft_model(nn.Sequential(make()), config)
    layer = model.base_model.model[0]
    delta = layer.s2ft_delta["default"]
    generator = torch.Generator().manual_seed(0)
    latent, coefficients = torch.randn(delta.shape), delta.coefficients.detach().clone()
    delta.place(delta.choose(config, latent, generator, "0"), arranged(delta.shape))
    delta.coefficients.data.copy_(coefficients)
    return model, layer, torch.randn(shape)


@pytest.mark.parametrize("oversampling", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_thin_products_are_the_dense_change(name, oversampling) -> None:
    model, layer, x = adapted(name, oversampling=oversampling, scaling=1.5)
    found = model(x)
    delta = layer.get_delta_weight("default")
    base = layer.get_base_layer()
    with torch.no_grad():
        base.weight += delta
        wanted = base(x)
        base.weight -= delta
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    before = base.weight.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("oversampling", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_a_fresh_adapter_changes_no_bit(name, oversampling) -> None:
    make, shape = LAYERS[name]
    net, x = nn.Sequential(make()), torch.randn(shape)
    before = net(x)
    model = get_peft_model(net, S2FTConfig(target_modules=["0"], n_frequency=12, oversampling=oversampling))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("oversampling", [1, 3])
@pytest.mark.parametrize("name", ["linear", "Conv1D", "2d", "groups"])
def test_gradients(name, oversampling) -> None:
    model, layer, x = adapted(name, oversampling=oversampling)
    model.double()
    coefficients = layer.s2ft_delta["default"].coefficients.detach().double().requires_grad_()

    def output(x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"s2ft_delta.default.coefficients": coefficients}, (x,))

    assert torch.autograd.gradcheck(output, (x.double().requires_grad_(), coefficients))


@pytest.mark.parametrize("name", ["linear", "2d"])
def test_it_is_a_lora_of_peft(name) -> None:
    model, layer, x = adapted(name, scaling=0.5)
    expected = model(x)
    b, a = layer.lora_factors("default")
    make, _ = LAYERS[name]
    torch.manual_seed(0)
    lora = get_peft_model(nn.Sequential(make()), LoraConfig(r=len(a), lora_alpha=len(a), target_modules=["0"]))
    lora_layer = lora.base_model.model[0]
    lora_layer.base_layer.load_state_dict(layer.get_base_layer().state_dict())
    for side, factor in (("lora_A", a), ("lora_B", b)):
        weight = getattr(lora_layer, side)["default"].weight
        weight.data.copy_(factor.view(weight.shape))
    torch.testing.assert_close(lora(x), expected, rtol=1e-4, atol=1e-5)
    _, free, _ = adapted(name, positions="free")
    with pytest.raises(TypeError, match="free positions"):
        free.lora_factors("default")


def test_conversion_by_peft() -> None:
    peft = pytest.importorskip("peft.tuners.lora.conversion")
    model, layer, _ = adapted("linear")
    rank = len(layer.lora_factors("default")[1])
    config, state = peft.convert_to_lora(model, rank)
    assert (config.r, config.lora_alpha) == (rank, rank)
    b, a = (next(t for n, t in state.items() if side in n) for side in ("lora_B", "lora_A"))
    torch.testing.assert_close(b @ a, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)


class _Largest(TorchDispatchMode):
    """The most elements that any new tensor has; a view is none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        there = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in there:
                self.elements = max(self.elements, value.numel())
        return result


WIDE_LAYERS = {
    "linear": (lambda: nn.Linear(80, 96), (3, 80)),
    "Conv1D": (lambda: Conv1D(96, 80), (3, 80)),
    "1d": (lambda: nn.Conv1d(64, 96, 3, padding=1), (1, 64, 4)),
    "2d": (lambda: nn.Conv2d(32, 96, 3, padding=1), (1, 32, 3, 3)),
    "3d": (lambda: nn.Conv3d(16, 96, 2), (1, 16, 3, 3, 3)),
}


@pytest.mark.parametrize("oversampling", [1, 4])
@pytest.mark.parametrize("name", WIDE_LAYERS)
def test_nothing_dense_is_made(name, oversampling) -> None:
    make, shape = WIDE_LAYERS[name]
    config = S2FTConfig(target_modules=["0"], n_frequency=64, oversampling=oversampling)
    model = get_peft_model(nn.Sequential(make()), config)
    layer = model.base_model.model[0]
    d, k = layer.s2ft_delta["default"].shape
    x = torch.randn(shape, requires_grad=True)
    layer(x)  # the fixed matrices are made here: thin as well
    with _Largest() as largest:
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
    assert layer.s2ft_delta["default"].coefficients.grad.any()
    assert 0 < largest.elements <= 16 * max(d, k)  # thin, with at most 16 functions on a side
    assert largest.elements < d * k / 4


def test_many_groups_take_no_more_than_the_dense_change() -> None:
    """The filters, copied for each of 32 groups, would be 10,368 numbers: nine times the change."""
    layer = nn.Sequential(nn.Conv2d(64, 64, 3, groups=32, padding=1))
    model = get_peft_model(layer, S2FTConfig(target_modules=["0"], n_frequency=500, init_weights=False))
    x = torch.randn(1, 64, 3, 3)
    model(x)
    layer = model.base_model.model[0]
    with torch.no_grad():
        weight = layer.base_layer.weight + layer.get_delta_weight("default")
        wanted = layer.base_layer._conv_forward(x, weight, layer.base_layer.bias)
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    with _Largest() as largest:
        model(x).sum().backward()
    assert largest.elements <= 64 * 18


@pytest.fixture
def made(monkeypatch) -> list[torch.Tensor]:
    """Every matrix of functions that is made from now on."""
    matrices: list[torch.Tensor] = []
    make = delta_module.row_matrix

    def watched(*args, **kwargs) -> torch.Tensor:
        matrices.append(make(*args, **kwargs))
        return matrices[-1]

    monkeypatch.setattr(delta_module, "row_matrix", watched)
    return matrices


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("options", [{}, {"oversampling": 3}, {"positions": "free"}])
def test_a_buffer_changed_in_place_counts(options, inference) -> None:
    """As plain DDP changes them, whose processes all take the first one's."""
    model, layer, x = adapted("linear", **options)
    delta = layer.s2ft_delta["default"]
    names = [*delta.integer_bounds, "row_sign", "column_sign"]
    for name in names:
        before = model(x)
        with torch.inference_mode(inference):
            buffer = getattr(delta, name)
            buffer.copy_(buffer.flip(0) if name in delta.integer_bounds else -buffer)
        found = model(x)
        assert not torch.allclose(found, before), name
        delta.forget()
        assert torch.equal(model(x), found), name


def test_moving_makes_nothing_again(made) -> None:
    model, layer, x = adapted("linear", oversampling=3)
    expected = model(x).detach()  # whose graph would keep the matrices
    made.clear()
    for move in (lambda: model.to("cpu"), model.float, lambda: model._apply(torch.clone), model.eval):
        move()  # a clone is what another device's memory is: other buffers
        assert torch.equal(model(x), expected)
    assert not made
    held = layer.s2ft_delta["default"]._known()
    layer.s2ft_delta["default"].coefficients.data.mul_(2)
    assert layer.s2ft_delta["default"]._known() is held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_from_what_is_there(made, dtype) -> None:
    """As under autocast, or in an int8 base, whose layers compute in another type than their weight's."""
    model, layer, x = adapted("linear")
    delta = layer.s2ft_delta["default"]
    model(x)
    made.clear()
    with torch.autocast("cpu", dtype):
        model(x)
    assert not made
    held = delta._known()
    assert held[0].dtype == dtype
    delta.forget()
    _SHARED.clear()
    delta.prepare(dtype, x.device)
    assert made
    assert all(torch.equal(a, b) for a, b in zip(held[:2], delta._known()[:2], strict=True))


def test_a_graph_in_autocast_computes_no_functions() -> None:
    model, layer, x = adapted("linear")
    layer.prepare()
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(model, fullgraph=True, backend=backend)(x)
        assert torch.equal(found, model(x))
    assert len(targets) < 20
    assert not any("cos" in target for target in targets)


def half_precision(scale: float = 0.0) -> tuple[nn.Module, S2FTLayer]:
    torch.manual_seed(0)
    base = nn.Linear(4096, 64).half()
    base.weight.data.mul_(1e-3)
    model = get_peft_model(nn.Sequential(base), S2FTConfig(target_modules=["0"], n_frequency=64))
    model.base_model.model[0].s2ft_delta["default"].coefficients.data.fill_(scale)
    return model, model.base_model.model[0]


def test_a_large_input_in_float16_is_finite() -> None:
    """A constant of 1,200 times the first of 4,096 columns' functions is 76,800: times zero, it would be NaN."""
    model, layer = half_precision()
    x = torch.full((1, 4096), 1200.0).half()
    assert torch.equal(model(x), layer.base_layer(x))
    for coefficient in (1e-3, 3e4):  # the second, times what the functions are divided by, would be infinite
        model, layer = half_precision(coefficient)
        x = torch.full((1, 4096), 1.2 / coefficient).half()
        change = layer.get_delta_weight("default")
        wanted = (layer.base_layer(x).float() + x.float() @ change.T).detach()
        torch.testing.assert_close(model(x).float(), wanted, rtol=5e-3, atol=5e-3 * wanted.abs().max().item())


def test_the_fixed_matrices_are_made_once_shared_and_let_go() -> None:
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model = get_peft_model(net, S2FTConfig(target_modules=["0", "1"], n_frequency=20, init_weights=False))
    x = torch.randn(2, 12)
    model(x)
    first, second = (model.base_model.model[i].s2ft_delta["default"] for i in (0, 1))
    made = first._known()
    assert made[0] is second._known()[0]  # without a prior both have the same functions
    model(x)
    assert first._known() is made
    model.half()
    assert first._known()[0].dtype == torch.float16
    model.float()  # made again, not what half precision has left of them
    assert torch.equal(first._known()[0], made[0])
    model.add_adapter("other", S2FTConfig(target_modules=["0", "1"], n_frequency=20))
    model.set_adapter("other")
    assert first._known() is None


def test_made_in_inference_mode_and_trained_outside() -> None:
    model, layer, x = adapted("linear")
    layer.s2ft_delta["default"].forget()
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert layer.s2ft_delta["default"].coefficients.grad is not None


@pytest.mark.parametrize("positions", ["grid", "free"])
def test_mixed_batches(positions) -> None:
    model, layer, x = adapted("linear", positions=positions)
    options = {"target_modules": ["0"], "n_frequency": 6, "init_weights": False, "seed": 3, "positions": positions}
    model.add_adapter("other", S2FTConfig(**options))
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model(x)
    with model.disable_adapter():
        expected["__base__"] = model(x)
    names = ["other", "__base__", "default", "other", "default"]
    found = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row])
    with pytest.raises(ValueError, match="the number of inputs, but got 2 and 5 respectively"):
        layer(x, adapter_names=names[:2])
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer(x, adapter_names=names)


def test_mixed_batches_of_a_model() -> None:
    model, _, x = adapted("linear")
    model.add_adapter("other", S2FTConfig(target_modules=["0"], n_frequency=6, init_weights=False, seed=3))
    names = ["other", "__base__", "default", "other", "default"]
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=names)
    model.eval()
    wanted = model.base_model.model[0](x, adapter_names=names)
    assert torch.equal(model(x, adapter_names=names), wanted)
    assert not torch.equal(model(x), wanted)  # and it is over with the call
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        model(x, adapter_names=["nobody"] * 5)


def test_weighted_sums_are_exact() -> None:
    model, layer, _ = adapted("linear")
    config = S2FTConfig(target_modules=["0"], n_frequency=12, init_weights=False, scaling=2.0)
    model.add_adapter("twin", config)
    with pytest.raises(ValueError, match="more than their coefficients"):
        model.base_model.add_weighted_adapter(["default", "twin"], [0.5, 0.5], "sum")
    twin, first = layer.s2ft_delta["twin"], layer.s2ft_delta["default"].state_dict()
    twin.load_state_dict({**first, "coefficients": twin.coefficients.detach().clone()})
    model.base_model.add_weighted_adapter(["default", "twin"], [0.5, -2.0], "sum")
    delta = 0.5 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("twin")
    torch.testing.assert_close(layer.get_delta_weight("sum"), delta)
    assert model.active_adapters == ["default"]
    for names, weights, match in ((["default"], [], "0 weights"), (["nobody"], [1.0], "no adapter named 'nobody'")):
        with pytest.raises(ValueError, match=match):
            model.base_model.add_weighted_adapter(names, weights, "more")


def test_half_precision_bases() -> None:
    model, layer, x = adapted("linear")
    expected = model(x)
    for dtype in (torch.bfloat16, torch.float16):
        layer.get_base_layer().to(dtype)
        found = model(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
        assert layer.s2ft_delta["default"].coefficients.dtype == torch.float32
        layer.get_base_layer().float()
