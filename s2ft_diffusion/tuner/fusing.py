"""Fusing, which PEFT calls merging: weight changes added to a layer's weight, and taken out again bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

# A fused change that its own rounding alters by more than this share is worth a warning.
FUSE_ROUNDING_LIMIT = 0.05
# Not float8, whose rounding would leave little of a change.
FUSED_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Fused:
    """What a layer remembers of fusing: the original weight, on the CPU, and how to know the fused one again."""

    original: torch.Tensor
    scales: dict[str, float]
    dtype: torch.dtype
    fingerprint: int


def fingerprint(weight: torch.Tensor) -> int:
    """The sum of a weight's bits, read as integers: the same on every device, and another one after any change."""
    wide = weight.numel() * weight.element_size() % 8 == 0
    flat = weight.contiguous().flatten()
    return int(flat.view(torch.int64 if wide else torch.uint8).sum())


class Fusing:
    """What an adapted layer does to fuse: a part of `S2FTLayer`, in a file of its own.

    It reads the layer's `s2ft_delta`, scales and weight shape, and keeps `merged_adapters`, as PEFT wants it.
    """

    s2ft_delta: nn.ModuleDict
    merged_adapters: list[str]
    _weight_shape: tuple[int, ...]
    _as_weight: Callable[[torch.Tensor], torch.Tensor]
    _as_matrix: Callable[[torch.Tensor], torch.Tensor]
    _fused: Fused | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, *, scale: float = 1.0) -> None:
        """Add the delta weights of the active (or the named) adapters to the base weight, `scale` times.

        The weight as it was is kept on the CPU, so that `unmerge` restores it bit for bit; that costs one copy of every
        adapted weight. Raises TypeError for a packed (quantised) weight. With `safe_merge`, raises ValueError and
        changes nothing if the sum is not finite.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.s2ft_delta]
        scales = {name: self.effective_scale(name) * scale for name in adapter_names}
        self._drop_passing_scales()
        if scales:
            self._fuse(scales, safe_merge)

    @torch.inference_mode(False)  # a sum made under it could not be trained or changed outside
    def _fuse(self, scales: dict[str, float], safe: bool = False) -> None:
        weight = self.get_base_layer().weight
        full = weight.dtype in FUSED_TYPES and weight.shape == self._weight_shape
        if not full or type(weight.data) is not torch.Tensor:
            kind = weight.dtype if type(weight.data) is torch.Tensor else type(weight.data).__name__
            raise TypeError(f"An S2FT adapter cannot be fused into a {kind} weight; use it unfused.")
        with torch.no_grad():
            fused = self._add_deltas(weight.data, scales)
        if safe and not torch.isfinite(fused).all():
            raise ValueError(  # in PEFT's words
                f"NaNs detected in the merged weights. The adapter {', '.join(scales)} seems to be broken: the sum is "
                "not finite. Nothing was changed."
            )
        self._warn_of_rounding(weight.data, fused, scales)
        # On a CPU, the very same memory: the sum has memory of its own.
        original = self._fused.original if self._fused else weight.data.detach().to("cpu")
        before = self._fused.scales if self._fused else {}
        self._fused = Fused(original, {**before, **scales}, fused.dtype, fingerprint(fused))
        self._set_weight(fused)
        self.merged_adapters.extend(scales)

    @torch.inference_mode(False)
    def unmerge(self) -> None:
        """Restore the base weight to what it was before merging, bit for bit (in the type it has by now).

        If something else (a fused LoRA) has changed the weight since, the delta weights are subtracted instead, which
        leaves a rounding error.
        """
        self._drop_passing_scales()
        if self._fused is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight, fused = self.get_base_layer().weight, self._fused
        with torch.no_grad():
            if self._is_as_fused(weight.data):
                self._set_weight(fused.original.to(weight.device, weight.dtype))
            else:
                self._set_weight(self._add_deltas(weight.data, {n: -s for n, s in fused.scales.items()}))
        self._fused = None
        self.merged_adapters.clear()

    def _is_as_fused(self, weight: torch.Tensor) -> bool:
        """Whether the weight is still what fusing made it, in the type it has by now."""
        fused = self._fused
        if weight.dtype == fused.dtype:
            return fingerprint(weight) == fused.fingerprint
        # Rounded since, and so may be the coefficients.
        original = fused.original.to(weight.device)
        expected = self._add_deltas(original, fused.scales).float()
        epsilon = 4 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
        slack = epsilon * float((expected - original.float()).abs().max())
        return torch.allclose(weight.float(), expected, rtol=epsilon, atol=slack)

    def fused_state(self) -> tuple[torch.Tensor, Fused | None, list[str]]:
        """What `restore_fused_state` needs to undo a later merge; no copies."""
        return self.get_base_layer().weight.data, self._fused, list(self.merged_adapters)

    def restore_fused_state(self, state: tuple[torch.Tensor, Fused | None, list[str]]) -> None:
        """Undo every merge since `fused_state`."""
        weight, self._fused, self.merged_adapters[:] = state
        self._set_weight(weight)

    def _set_weight(self, data: torch.Tensor) -> None:
        layer = self.get_base_layer()
        if layer.weight.is_inference():  # made under `torch.inference_mode`: it cannot hold an ordinary tensor
            layer.weight = nn.Parameter(data, layer.weight.requires_grad)
        else:
            layer.weight.data = data

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it is fused, it is taken out of the weight, and others that are fused stay."""
        others = None
        if adapter_name in self.merged_adapters:
            others = {name: scale for name, scale in self._fused.scales.items() if name != adapter_name}
            self.unmerge()
        super().delete_adapter(adapter_name)
        if others:
            self._fuse(others)

    def _add_deltas(self, weight: torch.Tensor, scales: dict[str, float]) -> torch.Tensor:
        result = weight
        for name, scale in scales.items():
            delta = self.s2ft_delta[name]
            result = self._as_weight(delta.added_to(self._as_matrix(result), scale).to(weight.device, weight.dtype))
        if result.stride() != weight.stride():  # a convolution's weight may lie channels last
            result = torch.empty_like(weight).copy_(result)
        return result

    def _warn_of_rounding(self, before: torch.Tensor, after: torch.Tensor, scales: dict[str, float]) -> None:
        if before.dtype in (torch.float32, torch.float64):
            return
        with torch.no_grad():
            wanted = sum(self.s2ft_delta[name].dense() * scale for name, scale in scales.items())
            wanted = self._as_weight(wanted).to(before.device)
        if (lost := ((after.float() - before.float()) - wanted).norm()) > FUSE_ROUNDING_LIMIT * wanted.norm():
            warnings.warn(
                f"Fusing into {before.dtype} rounds an adapter's change by {float(lost / wanted.norm()):.0%} in some "
                "layers. Use it unfused, or fuse in float32 and convert the pipeline afterwards.",
                stacklevel=4,
            )
