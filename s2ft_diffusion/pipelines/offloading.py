"""Layers of an offloaded pipeline can change only while its hooks are off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn


@contextmanager
def offloading_paused(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Offload hooks hold on to modules by place: take them off while layers change, as diffusers does for LoRA."""
    model_offload, sequential_offload, group_offload = _func_optionally_disable_offloading(pipeline)
    try:
        yield
    finally:
        if model_offload:
            pipeline.enable_model_cpu_offload()
        elif sequential_offload:
            pipeline.enable_sequential_cpu_offload()
        elif group_offload:
            for component in pipeline.components.values():
                if isinstance(component, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)
