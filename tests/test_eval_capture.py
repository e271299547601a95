"""Captured steps of a comparison: what goes through the graph, what goes past it. (No graph is made without a GPU.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from eval.capture import CapturedDenoiser


class Denoiser(nn.Module):
    """Called as diffusers' are: tensors by place and by name, and options."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, noisy, timestep, *, words, return_dict: bool = True) -> tuple[torch.Tensor]:
        assert not return_dict
        return (noisy * self.scale + timestep.view(-1, 1) + words,)


def inputs(batch: int) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    return (torch.randn(batch, 3), torch.arange(batch) * 1.0), {"words": torch.randn(batch, 3), "return_dict": False}


def test_calls_of_the_captured_shapes_alone_are_replayed(monkeypatch) -> None:
    replayed = []

    def graphed(call: nn.Module, samples: tuple[torch.Tensor, ...], **_: Any) -> Any:
        assert [tuple(sample.shape) for sample in samples] == [(4, 3), (4,), (4, 3)]

        def replay(*tensors: torch.Tensor) -> torch.Tensor:
            replayed.append(len(tensors))
            return call(*tensors)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    denoiser = Denoiser()
    captured = CapturedDenoiser(denoiser)
    for batch in (4, 4, 2):
        args, options = inputs(batch)
        (found,) = captured(*args, **options)
        assert torch.equal(found, denoiser(*args, **options)[0])
    assert replayed == [3, 3]  # not the third: it has another shape
    found.sum().backward()
    assert denoiser.scale.grad is not None


def test_what_cannot_be_captured_runs_as_it_is(monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    denoiser = Denoiser()
    captured = CapturedDenoiser(denoiser)
    args, options = inputs(2)
    with pytest.warns(UserWarning, match="operation not permitted when stream is capturing$"):
        (found,) = captured(*args, **options)
    assert torch.equal(found, denoiser(*args, **options)[0])
    assert torch.equal(captured(*args, **options)[0], found)  # and is not tried again
