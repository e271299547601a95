"""Which draws a process takes: for the estimate, and in every step of training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

from accelerate import Accelerator

from .arguments import DEFAULT_STEPS
from .draws import Draw, DrawStream, process_slots, replayed
from .loss import LatentSource

# Of "full", a step each: 8 % of the images that training sees, about as much of the time at one image a batch
# (docs/performance.md), but no fewer and no more of each image than these.
ESTIMATE_SHARE = 0.08
FULL_DRAWS = (4, 24)

Sample = tuple[Draw, LatentSource, str, float]


def images_per_step(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Instance images that one optimizer step sees, over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def steps_per_epoch(args: argparse.Namespace, images: int, accelerator: Accelerator) -> int:
    return math.ceil(images / images_per_step(args, accelerator))


def total_steps(args: argparse.Namespace, images: int, accelerator: Accelerator) -> int:
    if args.num_train_epochs is None:
        return args.max_train_steps or DEFAULT_STEPS
    return args.num_train_epochs * steps_per_epoch(args, images, accelerator)


def estimate_draws(args: argparse.Namespace, images: int, accelerator: Accelerator) -> int:
    """Draws of each of the `images` for the estimate.

    Unless given, those of "full" are `ESTIMATE_SHARE` of the images that training sees, within `FULL_DRAWS`: a prior of
    more steps is a better one. However many processes share a run's batches, its prior is the same.
    """
    if args.estimate_draws is not None:
        return args.estimate_draws
    trained = total_steps(args, images, accelerator) * images_per_step(args, accelerator)
    least, most = FULL_DRAWS
    return max(least, min(most, round(ESTIMATE_SHARE * trained / images)))


def estimate_batches(
    args: argparse.Namespace, stream: DrawStream, source: LatentSource, accelerator: Accelerator
) -> list[list[Sample]]:
    """One draw a batch, shared out over the processes; for "full", every process takes the same steps (Adam does not
    mind that their gradients are added)."""
    batches = [[draw] for draw in stream.stratified(estimate_draws(args, len(source), accelerator))]
    if args.estimate != "full":
        batches = batches[accelerator.process_index :: accelerator.num_processes]
    return [[(draw, source, args.instance_prompt, 1.0) for draw in batch] for batch in batches]


def training_batches(
    args: argparse.Namespace,
    step: int,
    steps: int,
    streams: Sequence[DrawStream],
    sources: Sequence[LatentSource],
    accelerator: Accelerator,
) -> Iterator[list[Sample]]:
    """The micro-batches of one optimizer step for this process; with class images, each has as many of both."""
    prompts = (args.instance_prompt, args.class_prompt)
    weights = (2.0, 2.0 * args.prior_loss_weight) if len(sources) == 2 else (1.0,)
    for micro in range(args.gradient_accumulation_steps):
        slots = list(
            process_slots(
                replayed(step, steps),
                micro,
                args.train_batch_size,
                args.gradient_accumulation_steps,
                accelerator.num_processes,
                accelerator.process_index,
            )
        )
        yield [
            (stream.sample(number), source, prompt, weight)
            for stream, source, prompt, weight in zip(streams, sources, prompts, weights, strict=False)
            for number in slots
        ]
