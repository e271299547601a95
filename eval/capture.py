"""A denoiser whose forward and backward pass are captured as CUDA graphs: small networks wait for launches alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn


class CapturedDenoiser(nn.Module):
    """Calls a denoiser through CUDA graphs, captured at the first call and replayed at all of the same shapes.

    The denoiser must stay as it is from then on, its parameters' values apart. What cannot be captured (a method that
    waits for the device in its forward pass), and calls of other shapes, run as they are. Only for denoisers that are
    called with `return_dict=False`.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._captured: Any = None
        self._shapes: list[Any] | None = None

    def forward(self, *args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        tensors = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        if self._shapes is None and torch.is_grad_enabled():
            self._shapes = shapes
            self._capture(args, options, tensors)
        if self._captured is None or shapes != self._shapes:
            return self.denoiser(*args, **options)
        return (self._captured(*tensors),)

    def _capture(self, args: tuple[Any, ...], options: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        call = _Call(self.denoiser, args, options)
        samples = tuple(tensor.detach().clone() for tensor in tensors)
        try:
            self._captured = torch.cuda.make_graphed_callables(call, samples, allow_unused_input=True)
        except RuntimeError as error:
            torch.cuda.synchronize()
            warnings.warn(f"Not captured as a CUDA graph: {str(error).splitlines()[0]}", stacklevel=3)


class _Call(nn.Module):
    """A denoiser as a function of the tensors among its arguments, the others as they were."""

    def __init__(self, denoiser: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.train(denoiser.training)
        self._args = [None if isinstance(value, torch.Tensor) else value for value in args]
        self._options = {k: None if isinstance(value, torch.Tensor) else value for k, value in options.items()}
        self._places = [i for i, value in enumerate(args) if isinstance(value, torch.Tensor)]
        self._names = [name for name, value in options.items() if isinstance(value, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        args, options = list(self._args), dict(self._options)
        for place, tensor in zip(self._places, tensors, strict=False):
            args[place] = tensor
        for name, tensor in zip(self._names, tensors[len(self._places) :], strict=True):
            options[name] = tensor
        return self.denoiser(*args, **options)[0]
