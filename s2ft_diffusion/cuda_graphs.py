"""Training on a GPU: a layer's transform, and its adjoint, each recorded once as a CUDA graph and then replayed.

A transform is a dozen kernels, each too small to keep a GPU busy while the next is launched; a graph launches all of
them at once. It computes what `inverse_transform` does. `enabled = False` turns it off. Graphs use cuFFT's plans: they
must not outlive `torch.backends.cuda.cufft_plan_cache.clear()`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch

from .spectrum import SpectrumIndex, adjoint_transform, transform

enabled = True
MOST_ELEMENTS = 1 << 22  # of a weight change; a larger one's kernels keep the GPU busy by themselves


def graphs_apply(coefficients: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Whether transforms of these coefficients into a (d, k) weight change should be recorded."""
    return (
        enabled
        and coefficients.is_cuda
        and coefficients.dtype == torch.float32
        and torch.version.cuda is not None
        and shape[0] * shape[1] <= MOST_ELEMENTS
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        and not torch.are_deterministic_algorithms_enabled()  # adding by index then waits for the GPU
    )


@dataclass(eq=False)
class _Workspace:
    """A weight change and its gradient on their way into and out of graphs: one for all layers of a shape."""

    delta: torch.Tensor
    grad: torch.Tensor


_workspaces: WeakValueDictionary[tuple, _Workspace] = WeakValueDictionary()


def _workspace(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> _Workspace:
    key = (shape, dtype, device)
    found = _workspaces.get(key)
    if found is None:
        found = _Workspace(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
        _workspaces[key] = found
    return found


class _MemoryPool:
    """What graphs allocate while they run. They run one after the other, so that one pool serves a GPU's; it is gone
    with the last of them."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


_pools: WeakValueDictionary[torch.device, _MemoryPool] = WeakValueDictionary()


def _memory_pool(device: torch.device) -> _MemoryPool:
    found = _pools.get(device)
    if found is None:
        found = _pools[device] = _MemoryPool()
    return found


class GraphedTransform:
    """`inverse_transform` for one layer, recorded: coefficients of one shape to a weight change in one dtype."""

    @torch.no_grad()
    def __init__(self, coefficients: torch.Tensor, index: SpectrumIndex, dtype: torch.dtype) -> None:
        device = coefficients.device
        self.dtype = dtype
        self.coefficients = torch.zeros_like(coefficients, dtype=torch.float32)
        self.found = torch.empty_like(self.coefficients)
        self.workspace = _workspace(index.shape, dtype, device)
        self.pool = _memory_pool(device)
        self.index = index  # which the graphs read from
        self.forward = self._record(
            device, lambda: self.workspace.delta.copy_(transform(self.coefficients, index, dtype))
        )
        self.adjoint = self._record(
            device,
            lambda: self.found.view(-1).copy_(adjoint_transform(self.workspace.grad, index, torch.float32)),
        )

    def _record(self, device: torch.device, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # makes plans of transforms, which cannot be made while recording
                graph.capture_begin(pool=self.pool.handle, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
        return graph

    def __call__(self, coefficients: torch.Tensor, scale: float) -> torch.Tensor:
        """The weight change (d, k) times `scale`, differentiable in the coefficients."""
        return _Replay.apply(coefficients, self, scale)

    @classmethod
    def try_to_record(
        cls, coefficients: torch.Tensor, index: SpectrumIndex, dtype: torch.dtype
    ) -> GraphedTransform | None:
        """None, and graphs off with a warning, where recording fails: training goes on without."""
        global enabled
        try:
            return cls(coefficients, index, dtype)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            enabled = False
            warnings.warn(
                f"Transforms cannot be recorded as CUDA graphs here; training is slower: {error}", stacklevel=2
            )
            return None

    # A graph cannot be copied; whoever has a copy of its layer records another.

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coefficients, graphed: GraphedTransform, scale: float):
        ctx.graphed, ctx.scale = graphed, scale
        torch.mul(coefficients, scale, out=graphed.coefficients)
        graphed.forward.replay()
        return graphed.workspace.delta.clone()

    @staticmethod
    def backward(ctx, grad):
        graphed = ctx.graphed
        graphed.workspace.grad.copy_(grad)
        graphed.adjoint.replay()
        return graphed.found * ctx.scale, None, None
