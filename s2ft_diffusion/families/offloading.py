"""A denoiser's blocks in host memory while it trains: each visits the device for its passes.

diffusers' group offloading serves for making images. In training it moves what is trained as well, and fetches the next
block in the order of the forward pass while the backward pass goes the other way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import InputError


class AwayParameter(nn.Parameter):
    """What stands in a layer for a frozen weight that is in host memory: empty, on the device, of the same type."""


def transformer_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks of a denoiser in their order: what diffusers checkpoints as one."""
    return [module for module in denoiser.modules() if type(module).__name__.endswith("TransformerBlock")]


def offload_blocks(denoiser: nn.Module, device: torch.device) -> BlockOffloading:
    """Keep the frozen weights of a denoiser's blocks in host memory (pinned, on a GPU) from now on; all else goes to
    the device.

    Only with gradient checkpointing does that save memory in training: otherwise autograd keeps what it multiplied by.
    Raises InputError for a denoiser without blocks.
    """
    blocks = transformer_blocks(denoiser)
    if not blocks:
        raise InputError(f"--offload: {type(denoiser).__name__} has no transformer blocks.")
    return BlockOffloading(denoiser, blocks, device)


class BlockOffloading:
    """Hooks that bring a block's weights when it is called and take them away when it is done.

    On a GPU the neighbour in the direction of travel, forward or backward, is fetched on a stream of its own meanwhile:
    the device holds two blocks at a time. Weights are put in their layers' places as new tensors, so that what autograd
    has saved of a visit is what that visit computed with.
    """

    def __init__(self, denoiser: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device, self.blocks = device, list(blocks)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.host: list[list[tuple[nn.Module, str, nn.Parameter]]] = [self._take(block) for block in self.blocks]
        denoiser.to(device)
        self.last = -1
        self.ready: dict[int, list[nn.Parameter]] = {}
        for number, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda *_, number=number: self._bring(number))
            block.register_forward_hook(lambda *_, number=number: self._leave(number), always_call=True)

    @property
    def bytes(self) -> int:
        """What lies in host memory."""
        return sum(p.numel() * p.element_size() for block in self.host for _, _, p in block)

    def _take(self, block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
        taken = []
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.requires_grad:
                    continue
                held = parameter.detach().to("cpu")
                held = held.pin_memory() if self.stream is not None else held
                taken.append((module, name, nn.Parameter(held, requires_grad=False)))
                empty = torch.empty(0, dtype=parameter.dtype, device=self.device)
                module._parameters[name] = AwayParameter(empty, requires_grad=False)
        return taken

    def _fetch(self, number: int) -> list[nn.Parameter]:
        return [
            nn.Parameter(held.detach().to(self.device, non_blocking=True), requires_grad=False)
            for _, _, held in self.host[number]
        ]

    @torch.no_grad()
    def _bring(self, number: int) -> None:
        if self.stream is None:
            here = self._fetch(number)
        else:
            current = torch.cuda.current_stream(self.device)
            if number not in self.ready:
                self._prefetch(number)
            current.wait_stream(self.stream)
            here = self.ready.pop(number)
            self.ready.clear()  # of a direction that was not taken
            for parameter in here:
                parameter.record_stream(current)
            onward = number + (-1 if number <= self.last and number > 0 else 1)
            if onward < len(self.blocks):
                self._prefetch(onward)
        self.last = number
        for (module, name, _), parameter in zip(self.host[number], here, strict=True):
            module._parameters[name] = parameter

    def _prefetch(self, number: int) -> None:
        with torch.cuda.stream(self.stream):
            self.ready[number] = self._fetch(number)

    def _leave(self, number: int) -> None:
        for module, name, held in self.host[number]:
            empty = torch.empty(0, dtype=held.dtype, device=self.device)
            module._parameters[name] = AwayParameter(empty, requires_grad=False)
