"""Positions on a grid: the same functions as free positions, in thin products, exactly a LoRA."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from s2ft_diffusion import S2FTConfig, S2FTLayer, initialize_s2ft_weights
from s2ft_diffusion.tuner.basis import fourier_functions, fourier_transform
from s2ft_diffusion.tuner.delta import GridDelta
from s2ft_diffusion.tuner.grid import Grid, choose_grid, grid_delta, grid_factors, grid_size
from s2ft_diffusion.tuner.integers import from_bytes, to_bytes
from s2ft_diffusion.tuner.rearrange import Rearrangement, find_rearrangement
from s2ft_diffusion.tuner.spectrum import delta_weight

SHAPES = [(8, 6), (7, 9), (5, 8), (12, 5), (2, 3), (1, 4)]


def arranged(shape: tuple[int, int], seed: int = 0) -> Rearrangement:
    generator = torch.Generator().manual_seed(seed)
    return find_rearrangement(torch.randn(shape, generator=generator), signs=True, generator=generator)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 31, 32])
def test_the_functions_are_orthonormal_and_the_transform_is_theirs(n) -> None:
    functions = fourier_functions(n, torch.arange(n), dtype=torch.float64)
    torch.testing.assert_close(functions.T @ functions, torch.eye(n, dtype=torch.float64))
    matrix = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(fourier_transform(matrix, 0), functions.T @ matrix)
    torch.testing.assert_close(fourier_transform(matrix.T.contiguous(), 1), matrix.T @ functions)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_grid_is_the_free_adapter_with_its_positions(shape) -> None:
    """Every pair of functions, one at a time, as complex coefficients at (u, v) and (-u, v): axes and Nyquist too."""
    d, k = shape
    rearrangement = arranged(shape)
    for row in range(d):
        for column in range(k):
            grid = Grid(torch.tensor([row]), torch.tensor([column]), None)
            found = grid_delta(torch.ones(1, 1, dtype=torch.float64), grid, rearrangement, torch.float64)
            u, v = (row + 1) // 2, (column + 1) // 2
            # f(2 pi u p / d) g(2 pi v q / k) by the sum and the difference of angles, f and g cosine or sine
            sine_row, sine_column = row > 0 and row % 2 == 0, column > 0 and column % 2 == 0
            same, opposite = {
                (False, False): ((0.5, 0.0), (0.5, 0.0)),
                (True, True): ((-0.5, 0.0), (0.5, 0.0)),
                (True, False): ((0.0, -0.5), (0.0, 0.5)),  # a complex coefficient makes a cos - b sin
                (False, True): ((0.0, -0.5), (0.0, -0.5)),
            }[sine_row, sine_column]
            norm = 1.0
            for n, function in ((d, row), (k, column)):
                norm *= 1.0 if function == 0 or 2 * ((function + 1) // 2) == n else 2**0.5
            coefficients = norm * torch.tensor([same, opposite], dtype=torch.float64)
            positions = torch.tensor([[u, v], [-u % d, v]])
            wanted = delta_weight(coefficients, positions, rearrangement, "ortho")
            torch.testing.assert_close(found, wanted, msg=f"{shape}, {row}, {column}")


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    share=st.floats(0.01, 1.0, exclude_max=True),
    oversampling=st.integers(1, 9),
    sampling=st.sampled_from(["power", "top", "low_frequency", "random"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_grid_fits_and_is_a_lora(shape, share, oversampling, sampling, seed) -> None:
    numbers = max(1, int(share * shape[0] * shape[1]))
    size = grid_size(numbers, shape, oversampling)
    assert 1 <= size.rows <= shape[0]
    assert 1 <= size.columns <= shape[1]
    assert 0 < size.numbers <= numbers
    assert size.numbers <= size.rows * size.columns
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(shape, generator=generator)
    grid = choose_grid(size, shape, sampling=sampling, gamma=2.0, latent=latent, generator=generator)
    assert len(grid.row_functions.unique()) == size.rows
    assert len(grid.column_functions.unique()) == size.columns
    assert size.dense == (grid.places is None)
    if grid.places is not None:
        assert len(grid.places.unique()) == size.numbers
        assert int(grid.places.max()) < size.rows * size.columns
    start = (size.rows, size.columns) if size.dense else (size.numbers,)
    coefficients = torch.randn(start, generator=generator, dtype=torch.float64)
    b, a = grid_factors(coefficients, grid, arranged(shape), torch.float64)
    assert b.shape[1] == a.shape[0] == min(size.rows, size.columns)
    change = grid_delta(coefficients, grid, arranged(shape), torch.float64)
    torch.testing.assert_close(b @ a, change)
    torch.testing.assert_close(change.norm(), coefficients.norm())  # the functions are orthonormal


def test_functions_are_those_that_hold_the_power() -> None:
    shape = (30, 40)
    functions = [
        fourier_functions(n, torch.tensor(chosen)) for n, chosen in zip(shape, ([3, 11], [0, 8, 20]), strict=True)
    ]
    latent = functions[0] @ torch.tensor([[5.0, 4.0, 3.0], [4.0, 5.0, 4.0]]) @ functions[1].T
    latent = latent + 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    options = {"sampling": "power", "gamma": 1.0, "latent": latent}
    grid = choose_grid(grid_size(6, shape, 1), shape, **options)
    assert (grid.row_functions.tolist(), grid.column_functions.tolist()) == ([3, 11], [0, 8, 20])
    with pytest.warns(UserWarning, match="is zero: low frequencies"):
        low = choose_grid(grid_size(6, shape, 1), shape, sampling="power", gamma=1.0, latent=torch.zeros(shape))
    assert (low.row_functions.tolist(), low.column_functions.tolist()) == ([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="NaN"):
        choose_grid(grid_size(6, shape, 1), shape, sampling="top", gamma=1.0, latent=latent * float("nan"))


@pytest.mark.parametrize("bound", [1, 300, 1 << 16, (1 << 16) + 1, 1 << 30])
def test_integers_as_bytes(bound) -> None:
    values = torch.tensor([[0, bound - 1], [bound // 2, bound // 3]])
    assert torch.equal(from_bytes(to_bytes(values, bound)).long(), values)
    assert to_bytes(values, bound).shape == (2, 2, 2 if bound <= 1 << 16 else 4)


# The layer -----------------------------------------------------------------------------------------------------------


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
    """The most elements that any new tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("oversampling", [1, 4])
def test_nothing_dense_is_made_in_training(oversampling) -> None:
    d, k, tokens = 96, 80, 3
    config = S2FTConfig(target_modules=["0"], n_frequency=64, oversampling=oversampling)
    model = get_peft_model(nn.Sequential(nn.Linear(k, d)), config)
    x = torch.randn(tokens, k, requires_grad=True)
    model(x)  # the fixed matrices are made here: thin as well
    # nn.Linear's own weight is frozen; its transposed view is no new tensor of ours
    layer = model.base_model.model[0]
    with _Largest() as largest:
        factors = layer.s2ft_delta["default"](1.0, torch.float32)
        layer._multiply_thin(x, factors).square().sum().backward()
    assert largest.elements <= 16 * max(d, k)  # thin, with at most 16 functions on a side
    assert largest.elements < d * k / 4


def test_the_fixed_matrices_are_made_once_shared_and_let_go() -> None:
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model = get_peft_model(net, S2FTConfig(target_modules=["0", "1"], n_frequency=20, init_weights=False))
    x = torch.randn(2, 12)
    model(x)
    first, second = (model.base_model.model[i].s2ft_delta["default"] for i in (0, 1))
    made = first._fixed
    assert made[0] is second._fixed[0]  # without a prior both have the same functions
    model(x)
    assert first._fixed is made
    model.half()
    assert first._fixed[0].dtype == torch.float16
    model.float()  # made again, not what half precision has left of them
    assert torch.equal(first._fixed[0], made[0])
    model.add_adapter("other", S2FTConfig(target_modules=["0", "1"], n_frequency=20))
    model.set_adapter("other")
    assert first._fixed is None


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
    with pytest.raises(ValueError, match="2 names for a batch of 5"):
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


def test_a_loaded_config_places_a_new_adapter(tmp_path) -> None:
    """A config read from a folder says inference_mode; a new adapter made with it has positions all the same."""
    options = {"target_modules": ["0"], "n_frequency": 40}
    for config in (S2FTConfig(**options), S2FTConfig(**options, positions="free")):
        get_peft_model(nn.Sequential(nn.Linear(12, 9)), config).save_pretrained(tmp_path)
        again = S2FTConfig.from_pretrained(tmp_path)
        assert again.inference_mode
        model = get_peft_model(nn.Sequential(nn.Linear(12, 9)), again)
        model(torch.randn(2, 12))
        delta = model.base_model.model[0].s2ft_delta["default"]
        held = delta.integers("row_functions" if isinstance(delta, GridDelta) else "positions")
        assert len(held.unique(dim=0)) == len(held)


@pytest.mark.parametrize("positions", ["grid", "free"])
def test_a_narrow_head_learns_without_a_prior(positions) -> None:
    """Two classes: the only function of two rows that a softmax sees is their difference."""
    torch.manual_seed(0)
    x = torch.randn(64, 20)
    y = (x[:, 3] + x[:, 4] > 0).long()
    config = S2FTConfig(target_modules=["0"], n_frequency=30, positions=positions)
    model = get_peft_model(nn.Sequential(nn.Linear(20, 2)), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    before = nn.functional.cross_entropy(model(x), y).item()
    for _ in range(100):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5 * before


SCRIPT = """
import torch
from torch import nn
from peft import get_peft_model
from s2ft_diffusion import S2FTConfig, initialize_s2ft_weights
torch.manual_seed(0)
config = S2FTConfig(target_modules=["0"], n_frequency=30, oversampling=4)
model = get_peft_model(nn.Sequential(nn.Linear(20, 14)), config)
batches = [torch.randn(8, 20) for _ in range(4)]
initialize_s2ft_weights(model, lambda x: model(x).square().mean(), batches)
print({k: v.flatten().tolist() for k, v in model.state_dict().items() if "s2ft" in k})
"""


def test_the_same_seed_gives_the_same_adapter_in_a_new_process() -> None:
    found = {
        subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(found) == 1
    assert "places" in found.pop()


def test_a_prior_is_set_and_training_goes_on() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(20, 14), nn.Tanh(), nn.Linear(14, 3)),
        S2FTConfig(target_modules=["0", "2"], n_frequency=0.3),
    )
    x = torch.randn(16, 20)
    with torch.no_grad():
        before = model(x)
    initialize_s2ft_weights(model, lambda x: model(x).square().mean(), [x] * 4)
    with torch.no_grad():
        assert torch.equal(model(x), before)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "coefficients" in n)


def test_config_says_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="positions must be one of"):
        S2FTConfig(positions="anywhere")
    with pytest.raises(ValueError, match="oversampling must be an int"):
        S2FTConfig(oversampling=0)
    with pytest.raises(ValueError, match='choices of positions="free"'):
        S2FTConfig(coefficients="real")
    with pytest.raises(ValueError, match='choice of positions="grid"'):
        S2FTConfig(positions="free", oversampling=4)
    assert S2FTConfig.from_preset("paper").positions == "free"
