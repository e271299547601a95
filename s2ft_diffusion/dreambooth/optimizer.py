"""AdamW and its learning rate, as the flags say."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler

from .settings import OptimizerSettings


def make_optimizer(
    settings: OptimizerSettings, parameters: list[torch.nn.Parameter], images_per_step: int, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and its scheduler over `steps` steps; with `scale_rate` the rate grows with the images."""
    if settings.eight_bit:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer = AdamW(
        parameters,
        lr=settings.rate * (images_per_step if settings.scale_rate else 1),
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        eps=settings.epsilon,
    )
    scheduler = get_scheduler(
        settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=steps,
        num_cycles=settings.cycles,
        power=settings.power,
    )
    return optimizer, scheduler
