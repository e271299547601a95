"""AdamW and its learning rate, as the flags say."""

from __future__ import annotations

import argparse

import torch
from diffusers.optimization import get_scheduler


def make_optimizer(
    args: argparse.Namespace, parameters: list[torch.nn.Parameter], images_per_step: int, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and its scheduler over `steps` optimizer steps; with --scale_lr the rate grows with the images."""
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer = AdamW(
        parameters,
        lr=args.learning_rate * (images_per_step if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    return optimizer, scheduler
