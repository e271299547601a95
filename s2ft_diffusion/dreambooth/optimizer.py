"""AdamW and its learning rate, as the flags say."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler

from ..errors import InputError
from .settings import OptimizerSettings

POLYNOMIAL_END = 1e-7  # diffusers' polynomial schedule goes down to this rate


def check_schedule(settings: OptimizerSettings, steps: int) -> None:
    """Raise InputError for a polynomial schedule that fails in diffusers, at its start or after the last step."""
    if settings.schedule != "polynomial":
        return
    if settings.rate <= POLYNOMIAL_END:
        raise InputError(f"--lr_scheduler polynomial ends at {POLYNOMIAL_END:g}: --learning_rate must be above that.")
    if settings.warmup_steps == steps:
        raise InputError(f"--lr_scheduler polynomial needs --lr_warmup_steps other than the run's {steps} steps.")


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
