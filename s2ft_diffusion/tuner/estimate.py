"""Four estimates of a weight change before training (S2FT, Eq. 4), in little memory: see `prior.estimate_prior`."""

from __future__ import annotations

import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layer import S2FTLayer, compute_dtype, delta_shape
from .seeding import seeded

Loss = Callable[[Any], torch.Tensor]

BLOCK_ENTRIES = 2**22  # of a weight that are looked at in float32 at a time: what an update needs beyond the gradient
DECAY_POWER = 0.8  # running means of squares forget by step^-0.8 (Shazeer and Stern, 2018)
FLOOR = 1e-8  # of a row's or a column's mean square, relative to the layer's: below it is rounding noise


class NotFiniteError(ValueError):
    """A loss, a gradient or an estimate that is not finite."""


def has_gradient(layer: S2FTLayer) -> bool:
    """Whether autograd makes a gradient for a layer's weight: not if it is quantised, offloaded or held in 8 bits."""
    weight = layer.get_base_layer().weight
    plain = type(weight) in (nn.Parameter, torch.Tensor)
    return plain and weight.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def as_matrix(base: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight or its gradient as a matrix (d, k) whose rows make outputs."""
    return weight.T if isinstance(base, Conv1D) else weight.flatten(1)


# "gradient" and "normalized"


def estimate_by_gradient(
    layers: Mapping[str, S2FTLayer], loss: Loss, batches: Iterable[Any], *, normalized: bool
) -> dict[str, torch.Tensor]:
    """-sum g, or -sum g / sqrt(sum g^2), of every layer: (d, k), float32, in host memory."""
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    total = {name: torch.zeros(delta_shape(base), dtype=torch.float32, device="cpu") for name, base in bases.items()}
    squares = {name: torch.zeros_like(matrix) for name, matrix in total.items()} if normalized else {}

    def collect(name: str, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().to("cpu", torch.float32)
        total[name].sub_(gradient)
        if normalized:
            squares[name].addcmul_(gradient, gradient)

    with _watching(layers, collect):
        for batch in _some(batches):
            _backward(loss, batch)
    for name, base in bases.items():
        for matrices in (total, squares):
            if name in matrices:
                _add_up(matrices[name], base.weight.device)
        if normalized:
            total[name].mul_(torch.where(squares[name] > 0, squares.pop(name).rsqrt(), 0.0))
    return total


# "scaled"


def estimate_by_scaled_gradients(
    layers: Mapping[str, S2FTLayer], loss: Loss, batches: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """-sum g / rms(g) of every layer, rms(g) a gradient's own root mean square: no batch drowns the others.

    The sums are held in host memory in the dtype that the layers compute in, and rounded up or down at random, in
    proportion to what is nearer, where that is one of half precision.
    """
    sums = {name: _ScaledSum(name, layer.get_base_layer()) for name, layer in layers.items()}
    with _watching(layers, lambda name, gradient: sums[name].subtract(gradient)):
        for batch in _some(batches):
            _backward(loss, batch)
    for name, layer in layers.items():
        _add_up(sums[name].total, layer.get_base_layer().weight.device)
    return {name: each.total for name, each in sums.items()}


class _ScaledSum:
    """A layer's sum of scaled gradients: `total` (d, k)."""

    def __init__(self, name: str, base: nn.Module) -> None:
        self.total = torch.zeros(delta_shape(base), dtype=compute_dtype(base), device="cpu")
        seed = int(torch.randint(2**62, (), generator=seeded("rounding", name), device="cpu"))
        self.generator = torch.Generator(base.weight.device).manual_seed(seed)

    @torch.no_grad()
    def subtract(self, gradient: torch.Tensor) -> None:
        size = torch.linalg.vector_norm(gradient, dtype=torch.float32) / gradient.numel() ** 0.5
        scale = torch.where(size > 0, 1 / size, 0.0)
        rows = max(1, BLOCK_ENTRIES // gradient.shape[1])
        for before, part in zip(self.total.split(rows), gradient.split(rows), strict=True):
            after = before.to(part.device, torch.float32) - part * scale
            before.copy_(_rounded(after, before.dtype, self.generator))


def _some(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; raises ValueError where there are none, as of an iterator that has been gone through."""
    none = True
    for batch in batches:
        none = False
        yield batch
    if none:
        raise ValueError("There are no batches to estimate the prior from.")


@contextmanager
def _watching(layers: Mapping[str, S2FTLayer], collect: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Gradients of the layers' weights, (d, k) each, go to `collect` as they arrive."""
    handles = []
    try:
        for name, layer in layers.items():
            watch = watch_weight if has_gradient(layer) else watch_layer
            handles.append(watch(layer.get_base_layer(), lambda gradient, name=name: collect(name, gradient)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_up(matrix: torch.Tensor, device: torch.device) -> None:
    """A matrix in host memory becomes the sum of all processes'."""
    if distributed():
        summed = matrix.to(device)  # NCCL knows no host memory
        dist.all_reduce(summed)
        matrix.copy_(summed)


def watch_weight(base: nn.Module, collect: Callable[[torch.Tensor], None]) -> Any:
    """Collect a weight's gradient as it arrives, so that one layer's is alive at a time."""

    def hook(weight: torch.Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        collect(as_matrix(base, gradient))

    return base.weight.register_post_accumulate_grad_hook(hook)


def watch_layer(base: nn.Module, collect: Callable[[torch.Tensor], None]) -> Any:
    """Collect what a weight's gradient would be from a layer's inputs and its outputs' gradients as they pass."""
    anchor = torch.zeros((), requires_grad=True, device=base.weight.device)

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return output
        take = lambda x, gradient: collect(_weight_gradient(base, x, gradient))  # noqa: E731
        return _Passing.apply(output, inputs[0], anchor, take)

    return base.register_forward_hook(hook)


class _Passing(torch.autograd.Function):
    """The identity on `output`, which shows its gradient, and the input that made it, to `take` on the way back.

    The input is saved as autograd saves its own, so that checkpointing drops and remakes it. The `anchor` wants a
    gradient: where nothing before the layer does, there would be no way back.
    """

    @staticmethod
    def forward(ctx, output, x, anchor, take):
        ctx.save_for_backward(x)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        ctx.take(x, gradient)
        return gradient, None, None, None


@torch.no_grad()
def _weight_gradient(base: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient (d, k) of the weight that made outputs with this gradient from inputs `x`."""
    if gradient.dtype == torch.float16:
        gradient = gradient.float()  # a sum over tokens may be more than float16 holds
    x = x.to(gradient.dtype)
    if isinstance(base, nn.Linear | Conv1D):
        return gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    dimensions = len(base.kernel_size)
    padding = base._reversed_padding_repeated_twice
    x = F.pad(x, padding, mode="constant" if base.padding_mode == "zeros" else base.padding_mode)
    compute = (nn.grad.conv1d_weight, nn.grad.conv2d_weight, nn.grad.conv3d_weight)[dimensions - 1]
    shape = (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
    return compute(x, shape, gradient, base.stride, 0, base.dilation, base.groups).flatten(1)


# "full"


def estimate_by_training(
    layers: Mapping[str, S2FTLayer],
    loss: Loss,
    batches: Iterable[Any],
    *,
    step_size: float,
    accumulation: int,
) -> dict[str, torch.Tensor]:
    """The change (d, k) of every layer's weight by a step of training for every `accumulation` batches."""
    try:
        count = len(batches)
    except TypeError:  # an iterator, or a DataLoader over one
        batches = list(batches)
        count = len(batches)
    steps = math.ceil(count / accumulation)
    trained = {name: _TrainedWeight(name, layer.get_base_layer(), step_size) for name, layer in layers.items()}
    arrivals = _Arrivals(trained)
    try:
        for number, batch in enumerate(_some(batches), 1):
            arrivals.updating = number % accumulation == 0 or number == count
            arrivals.factor = 2 * math.ceil(number / accumulation) / (steps + 1)
            _backward(loss, batch)
            if arrivals.updating:
                arrivals.finish()
        for name, weight in trained.items():
            weight.check(name)
    finally:
        with _uninterrupted():
            arrivals.close()
            _restore(trained)
    return {name: as_matrix(weight.base, weight.kept) for name, weight in trained.items()}


class WeightChange(Mapping[str, torch.Tensor]):
    """Weight changes by layer: each (d, k) in float32 in host memory, made when asked for.

    They are held in the dtype that they were made in; where that is the weights' own, the difference of two near
    numbers is exact. `owners` says whose change each layer has: layers that share a weight have one.
    """

    def __init__(self, changes: Mapping[str, torch.Tensor], owners: Mapping[str, str]) -> None:
        self._changes = {name: changes[owner] for name, owner in owners.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._changes[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)


class _TrainedWeight:
    """A layer's weight while it is trained, and what it was before.

    Steps are Adafactor's without momentum: a gradient is divided by the roots of running means of its squares, kept as
    the means of rows and of columns, and clipped to a root mean square of 1. Every gradient is brought to a root mean
    square of 1 before, so that no batch drowns the others. The sum of steps is in the weight alone: a weight of half
    precision is rounded up or down at random, in proportion to what is nearer, so that small steps are not lost.

    `kept`, in host memory and the weight's dtype, is what the weight was before, and what has changed once it is that
    again.
    """

    def __init__(self, name: str, base: nn.Module, step_size: float) -> None:
        self.base, self.weight = base, base.weight
        weight = self.weight.detach()
        self.rows = weight.T if isinstance(base, Conv1D) else weight  # a view, of d rows
        d, k = delta_shape(base)
        self.rate = step_size * _typical_size(weight) / k**0.5
        self.means = torch.zeros(d, device=weight.device), torch.zeros(k, device=weight.device)
        self.steps = 0
        self.not_finite = torch.zeros((), dtype=torch.int64, device=weight.device)
        # the same on every process
        seed = int(torch.randint(2**62, (), generator=seeded("rounding", name), device="cpu"))
        self.generator = torch.Generator(weight.device).manual_seed(seed)
        self.kept = weight.to("cpu", copy=True)

    @torch.no_grad()
    def update(self, gradient: torch.Tensor, factor: float) -> None:
        """Take a step at `factor` times the rate, in blocks of rows."""
        gradient = gradient.T if isinstance(self.base, Conv1D) else gradient
        (d, k), (row_mean, column_mean) = (len(x) for x in self.means), self.means
        size = max(1, BLOCK_ENTRIES // k)
        blocks = [slice(first, first + size) for first in range(0, d, size)]

        def block(rows: slice) -> torch.Tensor:
            return gradient[rows].flatten(1).to(torch.float32, copy=True)

        row_now, column_now = torch.empty_like(row_mean), torch.zeros_like(column_mean)
        for rows in blocks:
            square = block(rows).square_()
            row_now[rows] = square.mean(1)
            column_now += square.sum(0)
        mean = row_now.mean()
        finite = mean.isfinite() & column_now.isfinite().all()
        self.not_finite += ~finite
        scale = torch.where(finite & (mean > 0), 1 / mean, 0.0)  # nothing waits for a device to answer
        self.steps += 1
        weight = self.steps**-DECAY_POWER
        for average, now in ((row_mean, row_now), (column_mean, column_now / d)):
            average.lerp_(torch.where(finite, now * scale, average), weight)
        row = (row_mean / row_mean.mean()).clamp_min(FLOOR).rsqrt_().nan_to_num_(0.0)
        column = column_mean.clamp_min(column_mean.mean() * FLOOR).rsqrt_().nan_to_num_(0.0, posinf=0.0)
        total = sum(row[rows].square() @ (block(rows).square_() @ column.square()) for rows in blocks)
        length = (total * scale / (d * k)).sqrt()
        step = -self.rate * factor * scale.sqrt() / length.clamp_min(1.0)
        for rows in blocks:
            change = block(rows).mul_((step * row[rows])[:, None]).mul_(column)
            target = self.rows[rows]
            changed = torch.where(finite, change, 0.0).view(target.shape) + target
            target.copy_(_rounded(changed, target.dtype, self.generator))

    def check(self, name: str) -> None:
        """Raise ValueError for gradients that were not finite; some of a float16 weight's may have overflowed."""
        count = int(self.not_finite)
        if count and (self.weight.dtype != torch.float16 or count == self.steps):
            raise NotFiniteError(
                f"{name} has NaN or infinite gradients in {count} of {self.steps} steps of the estimate."
            )

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weight back, bit for bit, and keep the change instead.

        Nothing is made on the device, which may be why training has stopped.
        """
        try:
            trained = self.weight.detach().to("cpu", copy=True)
        finally:
            self.weight.copy_(self.kept)
        self.kept = trained.sub_(self.kept)


def _restore(trained: Mapping[str, _TrainedWeight]) -> None:
    """Bring all weights back; what fails for one is said when the others are done."""
    failures: dict[str, Exception] = {}
    for name, weight in trained.items():
        try:
            weight.restore()
        except Exception as error:
            failures[name] = error
    if failures:
        raise RuntimeError(  # not `from` one of them: what ended the estimate is shown with it
            f"The weights of {', '.join(failures)} could not be restored after the estimate "
            f"({next(iter(failures.values()))}): load the base again."
        )


def _rounded(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Float32 values in `dtype`; in half precision, one of the two nearest numbers at random, right on average."""
    if dtype not in (torch.float16, torch.bfloat16):
        return values
    limits = torch.finfo(dtype)
    spacing = values.abs().clamp_min_(limits.smallest_normal).log2_().floor_().exp2_().mul_(limits.eps)
    noise = torch.rand(values.shape, generator=generator, device=values.device).sub_(0.5)
    return values.addcmul_(noise, spacing).to(dtype)


class _Arrivals:
    """Updates weights as their gradients arrive, so that one layer's is alive at a time.

    In a process group, all processes must add up their gradients in one order: that in which process 0's arrived in
    the first step. What comes before its turn waits; what did not come by the end counts as zero.
    """

    def __init__(self, trained: Mapping[str, _TrainedWeight]) -> None:
        self.trained = trained
        self.updating, self.factor = True, 1.0
        self.order, self.order_is_known = list(trained)[::-1], False
        self.arrived: list[str] = []
        self.waiting = deque(self.order)
        self.handles = [
            weight.weight.register_post_accumulate_grad_hook(lambda _, name=name: self.arrive(name))
            for name, weight in trained.items()
        ]

    def arrive(self, name: str) -> None:
        if not self.updating:  # more batches are to be added
            return
        self.arrived.append(name)
        if not distributed():
            self._update(name)
            return
        while self.waiting and self.waiting[0] in self.arrived:
            self._update(self.waiting.popleft())

    def finish(self) -> None:
        """After a backward pass."""
        for name in self.waiting if distributed() else self.trained:
            self._update(name)
        if distributed() and not self.order_is_known:
            late = [name for name in self.trained if name not in self.arrived]
            found = [[*self.arrived, *late]]
            dist.broadcast_object_list(found, src=0)
            self.order, self.order_is_known = found[0], True
        self.arrived = []
        self.waiting = deque(self.order)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _update(self, name: str) -> None:
        weight = self.trained[name]
        gradient, weight.weight.grad = weight.weight.grad, None
        if distributed():
            gradient = torch.zeros_like(weight.weight) if gradient is None else gradient
            dist.all_reduce(gradient.div_(dist.get_world_size()))
        if gradient is not None:
            weight.update(gradient, self.factor)


def _typical_size(weight: torch.Tensor) -> float:
    """The root mean square; of a weight of zeros, what one that keeps its inputs' size would have."""
    norm = torch.linalg.vector_norm(weight, dtype=torch.float32)
    return float(norm) / weight.numel() ** 0.5 or weight[0].numel() ** -0.5


def _backward(loss: Loss, batch: Any) -> None:
    value = loss(batch)
    if not torch.isfinite(value):
        raise NotFiniteError(
            f"The loss is {float(value)} while estimating the weight change; check the data and precision."
        )
    value.backward()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = []
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if asked:
        raise KeyboardInterrupt


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
