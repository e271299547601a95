"""The estimates of a weight change: what they are, what they leave alone, and what they cost."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from s2ft_diffusion import S2FTConfig, estimate_prior, initialize_s2ft_weights
from s2ft_diffusion.tuner import estimate as estimates
from s2ft_diffusion.tuner.prior import place_from_prior, s2ft_layers
from tests.conftest import ROOT, TwoLayers
from tests.training_process import TORCHRUN

STEP = 0.05


def adapted(model: nn.Module, targets=("first", "second")) -> nn.Module:
    return get_peft_model(model, S2FTConfig(target_modules=list(targets), n_frequency=20))


def batches(count: int = 6, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return list(torch.randn(count, 4, 12, generator=torch.Generator().manual_seed(3)).to(dtype))


def loss_of(model: nn.Module):
    return lambda batch: model(batch).float().square().mean()


def full(model: nn.Module, data, **options) -> dict[str, torch.Tensor]:
    found = estimate_prior(model, loss_of(model), data, estimate="full", **options)
    return {name.removeprefix("base_model.model."): matrix for name, matrix in found.items()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


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


class TestRestored:
    """Weights, flags, gradients and hooks are as before."""

    def watch(self, model: nn.Module):
        weights = [p for name, p in model.named_parameters() if "s2ft" not in name]
        before = [w.detach().clone() for w in weights]
        flags = [p.requires_grad for p in model.parameters()]

        def same() -> bool:
            return (
                all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
                and flags == [p.requires_grad for p in model.parameters()]
                and all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
            )

        return same

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
    def test_after_all_that_can_happen(self, two_layers, dtype, error) -> None:
        model = adapted(two_layers.to(dtype))
        same, seen = self.watch(model), []

        def loss(batch: torch.Tensor) -> torch.Tensor:
            seen.append(same())
            if len(seen) == 4 and error:
                raise error
            return loss_of(model)(batch)

        if error:
            with pytest.raises(error):
                estimate_prior(model, loss, batches(dtype=dtype), estimate="full")
        else:
            estimate_prior(model, loss, batches(dtype=dtype), estimate="full")
        assert not seen[-1]  # it had been training them
        assert same()

    @pytest.fixture(autouse=True)
    def interruptible(self) -> Iterator[None]:
        """A shell starts what runs in the background with Ctrl-C ignored."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_after_an_interrupt_within_a_backward_pass(self, two_layers, monkeypatch) -> None:
        model = adapted(two_layers)
        same, updates = self.watch(model), []
        update = estimates._TrainedWeight.update

        def interrupted(self, gradient, factor) -> None:
            update(self, gradient, factor)
            updates.append(same())
            if len(updates) == 3:
                signal.raise_signal(signal.SIGINT)  # to this thread, at once
                for _ in range(1000):  # where Python looks for it
                    pass

        monkeypatch.setattr(estimates._TrainedWeight, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            estimate_prior(model, loss_of(model), batches(), estimate="full")
        assert not any(updates)
        assert same()

    def test_an_interrupt_while_restoring_waits(self, two_layers, monkeypatch) -> None:
        model = adapted(two_layers)
        same, handler = self.watch(model), signal.getsignal(signal.SIGINT)
        restore = estimates._TrainedWeight.restore

        def interrupted(self) -> None:
            signal.raise_signal(signal.SIGINT)  # to this thread, at once
            restore(self)

        monkeypatch.setattr(estimates._TrainedWeight, "restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            estimate_prior(model, loss_of(model), batches(), estimate="full")
        assert same()
        assert signal.getsignal(signal.SIGINT) is handler

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_scaled_sums_gradients_of_one_size(self, two_layers, dtype) -> None:
        model = adapted(two_layers.to(dtype))
        data = [batch.to(dtype) for batch in batches()]
        found = estimate_prior(model, loss_of(model), data, estimate="scaled")
        weight = model.base_model.model.first.base_layer.weight.requires_grad_()
        expected = torch.zeros(weight.shape)
        for batch in data:
            (gradient,) = torch.autograd.grad(loss_of(model)(batch), weight)
            expected -= gradient.float() / gradient.float().square().mean().sqrt()
        exact = dtype == torch.float32
        torch.testing.assert_close(
            found["base_model.model.first"], expected, rtol=1e-4 if exact else 3e-2, atol=1e-5 if exact else 3e-2
        )

    @pytest.mark.parametrize("estimate", ["gradient", "normalized", "scaled", "full"])
    def test_gradients_that_were_there_stay(self, two_layers, estimate) -> None:
        model = adapted(two_layers)
        model.base_model.model.first.base_layer.weight.grad = torch.full((16, 12), 7.0)
        found = estimate_prior(model, loss_of(model), batches(), estimate=estimate)
        assert bool((model.base_model.model.first.base_layer.weight.grad == 7).all())
        assert cosine(found["base_model.model.first"], torch.ones(16, 12)) > -0.9  # and were not added


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
    assert len(alive) == 6


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
