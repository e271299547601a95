"""What an estimate leaves alone: weights, flags, gradients and hooks, whatever happens."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from s2ft_diffusion import estimate_prior
from s2ft_diffusion.tuner import estimate as estimates
from tests.prior_cases import adapted, batches, cosine, loss_of


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

    def test_an_interrupt_while_hooks_are_taken_off_waits(self, two_layers, monkeypatch) -> None:
        model = adapted(two_layers)
        same, close = self.watch(model), estimates._Arrivals.close

        def interrupted(self) -> None:
            signal.raise_signal(signal.SIGINT)
            close(self)

        monkeypatch.setattr(estimates._Arrivals, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            estimate_prior(model, loss_of(model), batches(), estimate="full")
        assert same()

    @pytest.mark.parametrize("error", [RuntimeError("of a loss"), None])
    def test_one_weight_that_fails_does_not_keep_the_others(self, two_layers, monkeypatch, error) -> None:
        model = adapted(two_layers)
        first, second = (
            layer.base_layer.weight for layer in (model.base_model.model.first, model.base_model.model.second)
        )
        before, restore = second.detach().clone(), estimates._TrainedWeight.restore
        seen = []

        def failing(self) -> None:
            if self.weight is first:
                raise torch.OutOfMemoryError("no memory")
            seen.append(not torch.equal(second, before))
            restore(self)

        def loss(batch: torch.Tensor) -> torch.Tensor:
            if error and not torch.equal(second, before):
                raise error
            return loss_of(model)(batch)

        monkeypatch.setattr(estimates._TrainedWeight, "restore", failing)
        with pytest.raises(RuntimeError, match=r"weights of base_model\.model\.first could not.*no memory") as raised:
            estimate_prior(model, loss, batches(), estimate="full")
        assert seen == [True]
        assert torch.equal(second, before)
        assert raised.value.__context__ is error
        assert not raised.value.__suppress_context__

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
