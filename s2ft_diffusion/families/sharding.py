"""A denoiser's frozen weights shared out over the processes that train it (FSDP 2): each block is whole for its passes.

The adapter, put in afterwards, is left out: it is a megabyte, whole on every process, and its gradients are averaged as
in plain data parallelism.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InputError
from .offloading import transformer_blocks


def shared_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The parts of a denoiser that are gathered one by one: its transformer blocks, and a U-Net's ResNet blocks."""
    transformers = set(transformer_blocks(denoiser))
    return [m for m in denoiser.modules() if m in transformers or type(m).__name__.startswith("ResnetBlock")]


def shard_blocks(denoiser: nn.Module, device: torch.device) -> None:
    """Leave each process its share of a denoiser's frozen weights, on `device`.

    Each block is gathered for its passes, what is not in one for a whole step. All processes must call the denoiser
    equally often from now on. Raises InputError for a denoiser without transformer blocks.
    """
    if not transformer_blocks(denoiser):
        raise InputError(f"--shard: {type(denoiser).__name__} has no transformer blocks.")
    # Here, since not every build of PyTorch has them.
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    for block in shared_blocks(denoiser):
        fully_shard(block, mesh=mesh)
    fully_shard(denoiser, mesh=mesh)
