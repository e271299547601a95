"""One adapter's weight change of one layer, as a module: `GridDelta`, or `SpectralDelta` at free positions."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import nn

from .config import S2FTConfig
from .grid import GridSize, as_lora, choose_grid, full_table, grid_size, row_matrix
from .integers import from_bytes, to_bytes
from .rearrange import ORDERS, SIGNS, Rearrangement
from .spectrum import SpectrumIndex, count_positions, index_spectrum, inverse_transform, sample_positions


class LayerDelta(nn.Module):
    """What both kinds have in common: trainable coefficients, where they sit, and the rearrangement.

    State: `coefficients`, float; integers as bytes (`integers.to_bytes`), `row_order` (d, 2 or 4), `column_order`
    (k, 2 or 4) and those in `integer_bounds`; `row_sign` (d,) and `column_sign` (k,), int8.

    A module, so that whatever moves a module's weights around its call (offloading, sharding) finds it.
    """

    integer_bounds: dict[str, int]
    loaded: bool = False  # by a pipeline: diffusers' verbs, which activate adapters, would train it

    def __init__(self, shape: tuple[int, int], config: S2FTConfig, start: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.coefficients = nn.Parameter(torch.zeros(start) if config.init_weights else torch.randn(start))
        self.integer_bounds = dict(zip(ORDERS, shape, strict=True))
        identity = Rearrangement.identity(*shape)
        for name, bound in zip(ORDERS, shape, strict=True):
            self.register_buffer(name, to_bytes(getattr(identity, name), bound))
        for name in SIGNS:
            self.register_buffer(name, getattr(identity, name))
        self._draw: Callable[[], Mapping[str, torch.Tensor]] | None = None
        self._made: tuple[list[tuple[torch.Tensor, int | None, torch.device]], Any] | None = None

    def draw_later(self, config: S2FTConfig, generator: torch.Generator, name: str) -> None:
        """Choose without a prior when it is first needed, unless a state is loaded or set before: it can take long."""
        self._draw = partial(self.choose, config, None, generator, name)

    def draw(self) -> None:
        """Do what `draw_later` has put off."""
        if self._draw is not None:
            with torch.device("cpu"):  # whatever the default is: generators are the CPU's
                chosen, self._draw = self._draw(), None
            self._set(chosen)

    def _hold(self, name: str, values: torch.Tensor, bound: int) -> None:
        self.integer_bounds[name] = bound
        self.register_buffer(name, to_bytes(values, bound))

    def integers(self, name: str) -> torch.Tensor:
        """The integers that are held under a name, int32."""
        self.draw()
        return from_bytes(getattr(self, name))

    @property
    def rearrangement(self) -> Rearrangement:
        return Rearrangement(*map(self.integers, ORDERS), self.row_sign, self.column_sign)

    def choose(
        self, config: S2FTConfig, latent: torch.Tensor | None, generator: torch.Generator, name: str
    ) -> dict[str, torch.Tensor]:
        """Where the coefficients are to sit, for the rearranged prior (d, k) or without one: integers by name.

        Raises ValueError, with `name`, for a prior that is not finite.
        """
        sampling = config.sampling
        if latent is None and sampling in ("power", "top"):
            sampling = "low_frequency"
        return self._choose(sampling=sampling, gamma=config.gamma, latent=latent, generator=generator, name=name)

    @abstractmethod
    def _choose(self, **options: Any) -> dict[str, torch.Tensor]:
        """`choose`, with the options that `choose_grid` and `sample_positions` share."""

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The unscaled weight change (d, k), in float32 (float64 for float64 coefficients)."""

    def added_to(self, matrix: torch.Tensor, scale: float) -> torch.Tensor:
        """A matrix (d, k) plus `scale` times the weight change, in the change's dtype and on its device."""
        delta = self.dense()
        return torch.add(matrix.to(delta.device, delta.dtype), delta, alpha=scale, out=delta)

    @torch.no_grad()
    def place(self, chosen: Mapping[str, torch.Tensor], rearrangement: Rearrangement) -> None:
        """Set what `choose` gave and the rearrangement in place, and the coefficients to zero."""
        self._set({**chosen, **{name: getattr(rearrangement, name) for name in ORDERS}})
        for name in SIGNS:
            getattr(self, name).copy_(getattr(rearrangement, name))
        self.placed()

    @torch.no_grad()
    def placed(self) -> None:
        """To be called after buffers have been set from outside: coefficients are zero, what was made is let go."""
        self._draw = None
        self.coefficients.zero_()
        self.forget()  # a process group may write without counting a version

    def _set(self, chosen: Mapping[str, torch.Tensor]) -> None:
        for name, values in chosen.items():
            getattr(self, name).copy_(to_bytes(values, self.integer_bounds[name]))

    def _known(self) -> Any:
        """What was made of the buffers and kept; None after one was changed in place, replaced or moved.

        A compiled graph cannot ask whether one was.
        """
        if self._made is not None and not torch.compiler.is_compiling():
            for now, (seen, version, device) in zip(self._buffers.values(), self._made[0], strict=True):
                if now is not seen or now.device != device or (version is not None and now._version != version):
                    self.forget()
                    break
        return None if self._made is None else self._made[1]

    def _keep(self, made: Any) -> None:
        # An inference tensor counts no versions.
        seen = [(t, None if t.is_inference() else t._version, t.device) for t in self._buffers.values()]
        self._made = seen, made

    def forget(self) -> None:
        """Let go of everything that was made from the state."""
        self._made = None

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make what a forward pass in `dtype` on `device` needs of the state; else the first one does."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loads a whole state, or coefficients alone. Of any other part (PEFT leaves out tensors of other sizes where
        it is asked to) it loads nothing, with a warning: coefficients are nothing without their places and orders."""
        own = {*self._parameters, *self._buffers}
        found = {name for name in own if prefix + name in state_dict}
        if found not in (own, {"coefficients"}, set()):
            layer = prefix.partition(".s2ft_delta.")[0] or "a layer"
            warnings.warn(
                f"The state of {layer} is not loaded: it lacks {', '.join(sorted(own - found))}.", stacklevel=2
            )
            state_dict = {}
        for name, bound in self.integer_bounds.items():  # integers as such, which earlier releases saved
            values = state_dict.get(prefix + name)
            if values is not None and values.dtype != torch.uint8:
                state_dict[prefix + name] = to_bytes(values, bound)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if found == own:
            self._draw = None
        self.forget()  # inference tensors count no versions

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.draw()
        super()._save_to_state_dict(*args, **kwargs)


class ThinFactors(NamedTuple):
    """A weight change in three thin matrices: up (d, r1) @ table (r1, r2) @ down (r2, k)."""

    up: torch.Tensor
    table: torch.Tensor
    down: torch.Tensor


# Layers without a prior have the same functions in the same order, and share their matrices where these are made on a
# CPU: elsewhere looking up what they are made of would make the device wait.
_SHARED: WeakValueDictionary[tuple, torch.Tensor] = WeakValueDictionary()

Fixed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # up, down and the table's places, int64


class GridDelta(LayerDelta):
    """Coefficients on a grid: a table between row and column frequency functions (`grid`).

    State beside `LayerDelta`'s: `row_functions` (r1,) and `column_functions` (r2,), and for a sparse table `places`
    (n,). `coefficients` are (r1, r2), or (n,). Calling it gives the `ThinFactors` of the change times `scale`. The two
    fixed ones are made once, in the dtype and on the device where they are needed, moved with the module, made again
    after a buffer has changed, and let go while not in use.

    In float16, `down` is divided by a power of two and `up` multiplied by it: a constant input of 1,200 would otherwise
    be beyond float16's largest number after `down` already. `up` has the room, whatever the coefficients are.
    """

    def __init__(self, shape: tuple[int, int], config: S2FTConfig, size: GridSize) -> None:
        self.size = size
        super().__init__(shape, config, (size.rows, size.columns) if size.dense else (size.numbers,))
        self._hold("row_functions", torch.arange(size.rows), shape[0])
        self._hold("column_functions", torch.arange(size.columns), shape[1])
        if not size.dense:
            self._hold("places", torch.arange(size.numbers), size.rows * size.columns)

    def _choose(self, **options: Any) -> dict[str, torch.Tensor]:
        return choose_grid(self.size, self.shape, **options).tensors()

    def dense(self) -> torch.Tensor:
        b, a = self.factors()
        return b @ a

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B (d, r) and A (r, k), r = min(r1, r2): the unscaled weight change as a LoRA, exactly.

        In float32, or float64 for float64 coefficients.
        """
        exact = torch.float64 if self.coefficients.dtype == torch.float64 else torch.float32
        return as_lora(*self._thin(self._fixed_in(exact, self.coefficients.device, keep=False), 1.0))

    def added_to(self, matrix: torch.Tensor, scale: float) -> torch.Tensor:
        b, a = self.factors()
        return torch.addmm(matrix.to(b.device, b.dtype), b, a, alpha=scale)  # no dense change beside the sum

    def forward(self, scale: float, dtype: torch.dtype) -> ThinFactors:
        keep = not torch.compiler.is_compiling()
        return self._thin(self._fixed_in(dtype, self.coefficients.device, keep=keep), scale)

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        self._fixed_in(dtype, device, keep=True)

    def _thin(self, fixed: Fixed, scale: float) -> ThinFactors:
        up, down, places = fixed
        table = self.coefficients
        if scale != 1.0:  # not in the coefficients' half precision where the product is in a wider one
            table = table.to(torch.promote_types(table.dtype, up.dtype)) * scale
        return ThinFactors(up, full_table(table, places, up.shape[1], len(down)).to(up.dtype), down)

    def _fixed_in(self, dtype: torch.dtype, device: torch.device, *, keep: bool) -> Fixed:
        """What is held, if it has this dtype and lies on this device; else made of it, or anew."""
        held = self._known()
        if held is not None and held[0].dtype == dtype and held[0].device == device:
            return held
        exact = held is not None and held[0].dtype == torch.float32 and held[0].device == device and dtype.itemsize == 2
        with torch.inference_mode(False), torch.no_grad():  # for gradients too, wherever they are made
            up = self._functions("row", dtype, device, held[0] if exact else None)
            down = self._functions("column", dtype, device, held[1] if exact else None)
            places = self.integers("places").to(device, torch.int64) if "places" in self.integer_bounds else None
        fixed = up, down, places
        if keep:
            self._keep(fixed)
        return fixed

    def _functions(
        self, side: str, dtype: torch.dtype, device: torch.device, exact: torch.Tensor | None
    ) -> torch.Tensor:
        """The row functions as (d, r1), the column functions as (r2, k), in float16 times a power of two; rounded from
        `exact`, the float32 ones, where there are any: that gives the same bits."""
        self.draw()
        power = math.ceil(math.log2(self.shape[1]) / 2) if dtype == torch.float16 else 0  # about the root of k
        held = [getattr(self, f"{side}_{what}") for what in ("functions", "order", "sign")]
        known = not torch.compiler.is_compiling() and all(
            type(t) is torch.Tensor and t.device.type == "cpu" for t in held
        )
        key = (side, dtype, device, power, *(t.numpy().tobytes() for t in held)) if known else None
        if key is not None and (shared := _SHARED.get(key)) is not None:
            return shared
        if exact is None:
            functions, order, sign = (t.to(device) for t in held)
            made = row_matrix(from_bytes(functions), from_bytes(order), sign, dtype=dtype)
            made = made if side == "row" else made.T.contiguous()
        else:
            made = exact.to(dtype)
        if power:
            made = made * 2.0 ** (power if side == "row" else -power)
        if key is not None:
            _SHARED[key] = made
        return made

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GridDelta:
        """What moves the buffers moves what was made of them, but for its dtype: that has been rounded once."""
        held = self._known()
        super()._apply(fn, recurse)
        if held is not None and self._known() is None:
            with torch.inference_mode(False), torch.no_grad():
                moved = tuple(None if t is None else fn(t) for t in held)
            if moved[0].dtype == held[0].dtype:
                self._keep(moved)
        return self

    def extra_repr(self) -> str:
        return f"shape={self.shape}, table={self.size.rows}x{self.size.columns}, numbers={self.coefficients.numel()}"


class SpectralDelta(LayerDelta):
    """Coefficients at free positions of the spectrum (`spectrum`), as in the paper.

    State beside `LayerDelta`'s, for m positions: `positions` (m, 2); `coefficients` are (m, 2) complex or (m,) real.
    Calling it gives the dense (d, k) weight change times `scale`, in `dtype` or float32 (float64 for float64
    coefficients).
    """

    def __init__(self, shape: tuple[int, int], config: S2FTConfig, count: int) -> None:
        super().__init__(shape, config, (count, 2) if config.coefficients == "complex" else (count,))
        self.norm = config.norm
        self._hold("positions", torch.zeros(count, 2, dtype=torch.int32), max(shape))

    def _choose(self, **options: Any) -> dict[str, torch.Tensor]:
        kind = "complex" if self.coefficients.ndim == 2 else "real"
        return {"positions": sample_positions(len(self.positions), self.shape, kind=kind, **options)}

    def dense(self) -> torch.Tensor:
        return self(1.0)

    def forward(self, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        coefficients = self.coefficients
        if coefficients.dtype != torch.float64:
            coefficients = coefficients.float()  # no transform exists in half precision
        if scale != 1.0:  # here, where there are the fewest numbers
            coefficients = coefficients * scale
        return inverse_transform(coefficients, self._indexed(), dtype)

    def _indexed(self) -> SpectrumIndex:
        """The index made of the buffers, kept in training until a buffer has changed or moved.

        Training is where there are gradients, or would be. Not in sampling: a pipeline may hold many adapters, and an
        index takes more room than what it is made from.
        """
        training = torch.is_grad_enabled() or self.coefficients.requires_grad
        keep = training and not torch.compiler.is_compiling()
        if not keep:
            self.forget()
        elif (index := self._known()) is not None:
            return index
        real = self.coefficients.ndim == 1
        index = index_spectrum(self.integers("positions"), self.rearrangement, self.norm, real=real)
        if keep:
            self._keep(index)
        return index

    def extra_repr(self) -> str:
        return f"shape={self.shape}, positions={len(self.positions)}, numbers={self.coefficients.numel()}"


def make_delta(shape: tuple[int, int], config: S2FTConfig, n_frequency: int | float) -> LayerDelta:
    """An adapter's weight change of a (d, k) layer by its config, at zero; its integers are still to be drawn.

    Raises ValueError for an `n_frequency` that the layer has no room for.
    """
    if config.positions == "grid":
        return GridDelta(shape, config, grid_size(n_frequency, shape, config.oversampling))
    return SpectralDelta(shape, config, count_positions(n_frequency, shape, config.coefficients))


def trained_numbers(shape: tuple[int, int], config: S2FTConfig, n_frequency: int | float) -> int:
    """How many real numbers a (d, k) layer trains; raises ValueError as `make_delta` does."""
    if config.positions == "grid":
        return grid_size(n_frequency, shape, config.oversampling).numbers
    count = count_positions(n_frequency, shape, config.coefficients)
    return 2 * count if config.coefficients == "complex" else count


def delta_from_state(shape: tuple[int, int], config: S2FTConfig, state: Mapping[str, torch.Tensor]) -> LayerDelta:
    """The delta that has a state, in the state's types; `state` has been checked."""
    if "row_functions" in state:
        size = GridSize(len(state["row_functions"]), len(state["column_functions"]), state["coefficients"].numel())
        if "places" not in state:
            size = size._replace(numbers=size.rows * size.columns)
        delta: LayerDelta = GridDelta(shape, config, size)
    else:
        delta = SpectralDelta(shape, config, len(state["positions"]))
    delta.load_state_dict(dict(state), assign=True)
    return delta
