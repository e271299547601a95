"""The estimates of a weight change: what they are, and what they cost."""

from __future__ import annotations

import copy
import os
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from s2ft_diffusion import S2FTConfig, estimate_prior, initialize_s2ft_weights
from s2ft_diffusion.tuner import estimate as estimates
from s2ft_diffusion.tuner.prior import place_from_prior, s2ft_layers
from tests.conftest import ROOT, TwoLayers
from tests.prior_cases import STEP, adapted, batches, full, loss_of
from tests.training_process import TORCHRUN


class TestFull:
    def test_equals_torchs_adafactor(self, two_layers) -> None:
        """A step a batch: gradients of one size, rates growing evenly to twice their mean."""
        trained = copy.deepcopy(two_layers)
        weights = [trained.first.weight, trained.second.weight]
        rates = [STEP * float(w.detach().square().mean().sqrt()) / w.shape[1] ** 0.5 for w in weights]
        optimizer = torch.optim.Adafactor([{"params": [w]} for w in weights], eps=(None, 1e-12), weight_decay=0.0)
        for number, batch in enumerate(batches(), 1):
            optimizer.zero_grad()
            loss_of(trained)(batch).backward()
            for weight, rate, group in zip(weights, rates, optimizer.param_groups, strict=True):
                weight.grad /= weight.grad.square().mean().sqrt()
                # Its rate is relative to the weight's present size.
                group["lr"] = rate * number * 2 / 7 / float(weight.detach().square().mean().sqrt())
            optimizer.step()
        change = full(adapted(copy.deepcopy(two_layers)), iter(batches()), step_size=STEP)
        for name in ("first", "second"):
            expected = (trained.get_submodule(name).weight - two_layers.get_submodule(name).weight).detach()
            torch.testing.assert_close(change[name], expected, rtol=1e-3, atol=1e-6)

    def test_blocks_of_rows_make_no_difference(self, two_layers, monkeypatch) -> None:
        expected = full(adapted(copy.deepcopy(two_layers)), batches())
        monkeypatch.setattr(estimates, "BLOCK_ENTRIES", 30)
        found = full(adapted(two_layers), batches())
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])

    def test_minds_neither_the_size_of_the_loss_nor_zero_weights(self, two_layers) -> None:
        nn.init.zeros_(two_layers.second.weight)
        model = adapted(two_layers)

        def change(factor: float) -> torch.Tensor:
            found = estimate_prior(
                model, lambda b: factor * model(b).sub(1).square().mean(), batches(), estimate="full"
            )
            return found["base_model.model.second"]

        assert change(1.0).abs().max() > 0
        torch.testing.assert_close(change(1.0), change(1e-3), rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_small_steps_are_not_rounded_away(self, two_layers, dtype) -> None:
        """Steps far below what bfloat16 can tell apart: rounded to the nearest, none of them would count."""
        data = batches(30)
        exact = full(adapted(copy.deepcopy(two_layers)), data, step_size=0.002)
        found = full(adapted(two_layers.to(dtype)), [batch.to(dtype) for batch in data], step_size=0.002)
        kept = float((found["first"] * exact["first"]).sum() / exact["first"].square().sum())
        assert 0.5 < kept < 1.5

    def test_accumulated_batches_are_one_step(self, two_layers) -> None:
        data, model = batches(5), adapted(copy.deepcopy(two_layers))
        expected = full(adapted(copy.deepcopy(two_layers)), [torch.cat(data[:2]), torch.cat(data[2:4]), data[4]])
        found = full(model, data, gradient_accumulation_steps=2)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6)
        with pytest.raises(ValueError, match="at least 1"):
            full(model, data, gradient_accumulation_steps=0)

    def test_a_gradient_of_an_earlier_accumulated_batch_alone_counts(self, two_layers) -> None:
        model = adapted(two_layers)
        inner = model.base_model.model

        def loss(batch: torch.Tensor) -> torch.Tensor:
            hidden = inner.first(batch[1])
            return (inner.second(hidden.relu()) if batch[0] == 0 else hidden).square().mean()

        found = estimate_prior(
            model, loss, [(0, batches()[0]), (1, batches()[1])], estimate="full", gradient_accumulation_steps=2
        )
        assert bool(found["base_model.model.second"].any())

    def test_checkpointing_makes_no_difference(self, two_layers) -> None:
        class Checkpointed(TwoLayers):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return checkpoint(super().forward, x, use_reentrant=False)

        plain, again = two_layers, Checkpointed()
        again.load_state_dict(plain.state_dict())
        expected, found = full(adapted(plain), batches()), full(adapted(again), batches())
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_a_float16_overflow_is_left_out(self, two_layers) -> None:
        model = adapted(two_layers.half())
        data = batches(6, torch.float16)

        def loss(batch: torch.Tensor) -> torch.Tensor:
            output = model(batch)
            return output.float().square().mean() + _Scaled.apply(output, 6e4 if batch is data[2] else 0.0)

        found = estimate_prior(model, loss, data, estimate="full")
        assert all(torch.isfinite(matrix).all() and matrix.any() for matrix in found.values())

    def test_a_gradient_that_is_not_finite_names_the_layer(self, two_layers) -> None:
        model = adapted(two_layers)
        with pytest.raises(ValueError, match=r"first has NaN or infinite gradients in 6 of 6"):
            estimate_prior(model, lambda batch: _Scaled.apply(model(batch), float("nan")), batches(), estimate="full")


class _Scaled(torch.autograd.Function):
    """Zero, with a gradient of a given size."""

    @staticmethod
    def forward(ctx, y, factor):
        ctx.factor, ctx.save = factor, y
        return y.sum() * 0

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones_like(ctx.save) * ctx.factor, None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators have made and that are alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = {p.untyped_storage()._cdata: 0 for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key: int) -> None:
        self.now -= self.known.pop(key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_needs_one_copy_of_the_weights_and_little_else(dtype) -> None:
    torch.manual_seed(0)
    width, depth = 64, 16
    model = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh()))).to(dtype)
    model = adapted(model, [str(2 * i) for i in range(depth)])
    for layer in s2ft_layers(model).values():
        layer.get_base_layer().weight.data = torch.linalg.qr(torch.randn(width, width)).Q.to(dtype)
    weights = depth * width * width * torch.finfo(dtype).bits // 8
    one_layer = width * width * 4
    data = list(torch.randn(2, 2, width).to(dtype))
    with LiveBytes(model) as memory:
        prior = estimate_prior(model, loss_of(model), data, estimate="full")
    assert weights <= memory.now < 1.2 * weights  # the change, in the weights' dtype
    assert memory.peak < weights + 8 * one_layer  # of 16: activations, a gradient, an update in float32
    assert next(iter(prior.values())).dtype == torch.float32


def test_rounding_is_right_on_average_and_to_a_neighbour() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for value in (0.3, -1.999, 3e-5, 6e-8, 0.0):
            values = torch.full((20000,), value)
            found = estimates._rounded(values, dtype, generator)
            assert found.dtype == dtype
            assert len(found.unique()) <= 2
            spacing = float(found.float().max() - found.float().min())
            assert abs(float(found.double().mean()) - value) <= 0.02 * spacing + 1e-3 * abs(value) * 2**-8
    exact = torch.randn(100)
    assert estimates._rounded(exact, torch.float32, generator) is exact


@pytest.mark.parametrize("estimate", ["gradient", "full"])
def test_layers_that_cannot_reach_the_output_are_named(two_layers, estimate) -> None:
    model = adapted(two_layers)
    with pytest.warns(UserWarning, match=r"1 of 2 layers have no gradient.*second"):
        initialize_s2ft_weights(
            model, lambda x: model.base_model.model.first(x).square().mean(), batches(), estimate=estimate
        )
    first, second = (layer.s2ft_delta["default"] for layer in s2ft_layers(model).values())
    assert first.integers("row_order").tolist() != list(range(16))
    assert second.integers("row_order").tolist() == list(range(7))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (None, r"no layer named 'base_model\.model\.second'; it has base_model\.model\.first\."),
        (torch.ones(16, 7), r"second has shape \(16, 7\) and should have \(7, 16\)"),
        (torch.full((7, 16), torch.nan), "second has NaN or infinite"),
        (torch.full((7, 16), -torch.inf), "second has NaN or infinite"),
    ],
)
def test_a_wrong_prior_changes_nothing(two_layers, wrong, match) -> None:
    model = adapted(two_layers)
    prior = {"base_model.model.first": torch.randn(16, 12)}
    if wrong is not None:
        prior["base_model.model.second"] = wrong
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        place_from_prior(model, prior)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_prior_of_no_adapter(two_layers) -> None:
    with pytest.raises(ValueError, match="no S2FT layer with an adapter named 'nobody'"):
        place_from_prior(adapted(two_layers), {}, adapter_name="nobody")


def test_two_matrices_are_asked_for_at_a_time() -> None:
    names = [str(number) for number in range(6)]
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in names))
    inject_adapter_in_model(S2FTConfig(target_modules=names, n_frequency=20), model)
    alive: list[weakref.ref] = []

    class Watched(dict):
        def __getitem__(self, name: str) -> torch.Tensor:
            assert sum(reference() is not None for reference in alive) < 2
            matrix = torch.randn(12, 12)
            alive.append(weakref.ref(matrix))
            return matrix

    place_from_prior(model, Watched.fromkeys(names))
    assert len(alive) == 6 + 6  # checked first, then used


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, two_layers) -> None:
    """Averaged gradients of two processes, that need not arrive in one order nor at all, are those of both batches."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*TORCHRUN, "tests/two_priors.py", str(tmp_path)], check=True, capture_output=True, env=environment, cwd=ROOT
    )
    from tests.two_priors import branching, data, new_model

    both = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for estimate in ("gradient", "normalized", "scaled", "full"):
        model = new_model()
        steps = list(zip(data(0), data(1), strict=True))
        if estimate == "full":
            found = estimate_prior(
                model, lambda pair, model=model: sum(branching(model)(part) for part in pair), steps, estimate="full"
            )
        else:
            single = [part for pair in steps for part in pair]
            found = estimate_prior(model, branching(model), single, estimate=estimate)
        for name, matrix in found.items():
            assert torch.equal(both[0][estimate][name], both[1][estimate][name])
            torch.testing.assert_close(both[0][estimate][name], matrix, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("estimate", ["gradient", "normalized", "scaled", "full"])
def test_no_batches_at_all(two_layers, estimate) -> None:
    model = adapted(two_layers)
    for none in ([], iter(())):
        with pytest.raises(ValueError, match="no batches to estimate the prior from"):
            initialize_s2ft_weights(model, loss_of(model), none, estimate=estimate)


@pytest.mark.parametrize("estimate", ["gradient", "normalized", "scaled", "full"])
def test_layers_that_share_a_weight_share_their_prior(estimate) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    model = inject_adapter_in_model(S2FTConfig(n_frequency=9, target_modules=["0", "2"]), model)
    before = model[0].weight.clone()
    prior = estimate_prior(model, lambda x: model(x).square().sum(), [torch.randn(3, 8)], estimate=estimate)
    assert set(prior) == {"0", "2"}
    assert prior["0"].any()
    assert torch.equal(prior["0"], prior["2"])
    assert torch.equal(model[2].weight, before)
    place_from_prior(model, prior)


@pytest.mark.parametrize("options", [{}, {"oversampling": 2}, {"positions": "free"}])
def test_whatever_the_default_device_is(options) -> None:
    config = S2FTConfig(n_frequency=9, target_modules=["0"], **options)
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(3, 8)
    torch.set_default_device("meta")
    try:
        for estimate in ("gradient", "normalized", "scaled", "full"):
            initialize_s2ft_weights(model, lambda x: model(x).square().sum(), [x], estimate=estimate)
        inject_adapter_in_model(config, model, "drawn when it is needed")
        model[0].set_adapter("drawn when it is needed")
        assert model(x).device == x.device
    finally:
        torch.set_default_device(None)
