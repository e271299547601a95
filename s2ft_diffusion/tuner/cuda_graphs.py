"""Training on a GPU: a layer's transform, and its adjoint, each recorded once as a CUDA graph and then replayed.

A transform is a dozen kernels, each too small to keep a GPU busy while the next is launched; a graph launches all of
them at once. It computes what `inverse_transform` does.

`enabled = False`, or S2FT_CUDA_GRAPHS=0 in the environment, turns it off. Graphs use cuFFT's plans: while they are in
use, `torch.backends.cuda.cufft_plan_cache` must not be cleared or made small.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch

from .spectrum import SpectrumIndex, adjoint_transform, transform

enabled = os.environ.get("S2FT_CUDA_GRAPHS", "1") != "0"
MOST_ELEMENTS = 1 << 22  # of a weight change; a larger one's kernels keep the GPU busy by themselves


def graphs_apply(coefficients: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Whether transforms of these coefficients into a (d, k) weight change should be recorded."""
    return (
        enabled
        and coefficients.is_cuda
        and coefficients.dtype == torch.float32
        and torch.version.cuda is not None
        and shape[0] * shape[1] <= MOST_ELEMENTS
        and coefficients.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        and not torch.are_deterministic_algorithms_enabled()  # adding by index then waits for the GPU
    )


def current_stream(device: torch.device) -> int:
    """The stream that graphs would run on: what one stream's graphs share is not safe to use on another."""
    return torch.cuda.current_stream(device).cuda_stream


class _Shared:
    """What the graphs of one stream share: memory that they allocate while they run, one after the other, and the
    stream they are recorded on. It is gone with the last of them."""

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.Lock()
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.recording = torch.cuda.Stream(device) if device.type == "cuda" else None


@dataclass(eq=False)
class _Workspace:
    """A weight change and its gradient on their way out of and into graphs: one for all layers of a shape."""

    delta: torch.Tensor
    grad: torch.Tensor


_shared: WeakValueDictionary[tuple, _Shared] = WeakValueDictionary()
_workspaces: WeakValueDictionary[tuple, _Workspace] = WeakValueDictionary()


def _get(known: WeakValueDictionary, key: tuple, make: Callable[[], Any]) -> Any:
    found = known.get(key)
    if found is None:
        found = known[key] = make()
    return found


class GraphedTransform:
    """`inverse_transform` for one layer, recorded: coefficients of one shape to a weight change in one dtype.

    Raises RuntimeError where it cannot be recorded.
    """

    @torch.no_grad()
    def __init__(self, coefficients: torch.Tensor, index: SpectrumIndex, dtype: torch.dtype, stream: int) -> None:
        device = coefficients.device
        self.index = index  # which the graphs read from
        self.stream = stream
        self.coefficients = torch.zeros_like(coefficients, dtype=torch.float32)
        self.found = torch.empty_like(self.coefficients)
        key = (device, stream)
        self.shared = _get(_shared, key, lambda: _Shared(device))
        empty = lambda: torch.empty(index.shape, dtype=dtype, device=device)  # noqa: E731
        self.workspace = _get(_workspaces, (*key, index.shape, dtype), lambda: _Workspace(empty(), empty()))
        with self.shared.lock:
            self.forward = self._record(
                device, lambda: self.workspace.delta.copy_(transform(self.coefficients, index, dtype))
            )
            self.adjoint = self._record(
                device,
                lambda: self.found.view(-1).copy_(adjoint_transform(self.workspace.grad, index, torch.float32)),
            )

    def _record(self, device: torch.device, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), self.shared.recording
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # makes plans of transforms, which cannot be made while recording
                try:
                    graph.capture_begin(pool=self.shared.pool, capture_error_mode="thread_local")
                    run()
                    graph.capture_end()
                except RuntimeError as error:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise RuntimeError(
                        "A layer's transform cannot be recorded as a CUDA graph here. Train without graphs: start "
                        "again with S2FT_CUDA_GRAPHS=0 in the environment."
                    ) from error
            torch.cuda.current_stream().wait_stream(stream)
        return graph

    def __call__(self, coefficients: torch.Tensor, scale: float) -> torch.Tensor:
        """The weight change (d, k) times `scale`, differentiable in the coefficients."""
        return _Replay.apply(coefficients, self, scale)

    # A graph cannot be copied; whoever has a copy of its layer records another.

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coefficients, graphed: GraphedTransform, scale: float):
        ctx.graphed, ctx.scale = graphed, scale
        with graphed.shared.lock:
            torch.mul(coefficients, scale, out=graphed.coefficients)
            graphed.forward.replay()
            return graphed.workspace.delta.clone()

    @staticmethod
    def backward(ctx, grad):
        graphed = ctx.graphed
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which a graph does not have
            found = adjoint_transform(grad, graphed.index, torch.float32).view_as(graphed.found)
            return found * ctx.scale, None, None
        with graphed.shared.lock:
            graphed.workspace.grad.copy_(grad)
            graphed.adjoint.replay()
            return graphed.found * ctx.scale, None, None
