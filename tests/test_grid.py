"""Functions on a grid: their mathematics, and how an adapter chooses them."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from s2ft_diffusion import S2FTConfig, initialize_s2ft_weights
from s2ft_diffusion.tuner.basis import fourier_functions, fourier_transform
from s2ft_diffusion.tuner.delta import GridDelta
from s2ft_diffusion.tuner.grid import Grid, choose_grid, grid_delta, grid_factors, grid_size
from s2ft_diffusion.tuner.integers import from_bytes, to_bytes
from s2ft_diffusion.tuner.spectrum import delta_weight
from tests.random_adapters import arranged

SHAPES = [(8, 6), (7, 9), (5, 8), (12, 5), (2, 3), (1, 4)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 31, 32])
def test_the_functions_are_orthonormal_and_the_transform_is_theirs(n) -> None:
    functions = fourier_functions(n, torch.arange(n), dtype=torch.float64)
    torch.testing.assert_close(functions.T @ functions, torch.eye(n, dtype=torch.float64))
    matrix = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(fourier_transform(matrix, 0), functions.T @ matrix)
    torch.testing.assert_close(fourier_transform(matrix.T.contiguous(), 1), matrix.T @ functions)


def test_the_functions_do_not_depend_on_the_default_dtype() -> None:
    wanted = fourier_functions(31, torch.arange(31))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(fourier_functions(31, torch.arange(31), dtype=torch.float32), wanted.float())
    finally:
        torch.set_default_dtype(torch.float32)


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
for estimate, options in (("full", {"oversampling": 4}), ("normalized", {"seed": 3}), ("full", {"positions": "free"})):
    config = S2FTConfig(target_modules=["0"], n_frequency=30, **options)
    model = get_peft_model(nn.Sequential(nn.Linear(20, 14)), config)
    batches = [torch.randn(8, 20) for _ in range(4)]
    initialize_s2ft_weights(model, lambda x: model(x).square().mean(), batches, estimate=estimate)
    print({k: v.flatten().tolist() for k, v in model.state_dict().items() if "s2ft" in k})
"""


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter_in_a_new_process() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    here = io.StringIO()
    with contextlib.redirect_stdout(here), torch.random.fork_rng():
        exec(SCRIPT, {})
    assert here.getvalue() == done.stdout
    assert "places" in done.stdout


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
