"""Which draws a process takes: for the estimate, and in every step of training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .draws import Draw, DrawStream, process_slots, replayed
from .loss import LatentSource
from .settings import DEFAULT_STEPS, EstimateSettings, LengthSettings

# Of "full", a step each: 8 % of the images that training sees, about as much of the time at one image a batch
# (docs/prior.md), but no fewer and no more of each image than these.
ESTIMATE_SHARE = 0.08
FULL_DRAWS = (4, 24)

Sample = tuple[Draw, LatentSource, str, float]


@dataclass(frozen=True)
class Layout:
    """How long a run is, and how its samples are shared out: steps, micro-steps, processes and batches."""

    steps: int
    batch: int = 1
    accumulation: int = 1
    processes: int = 1
    rank: int = 0

    @classmethod
    def of(cls, length: LengthSettings, images: int, processes: int = 1, rank: int = 0) -> Layout:
        """What the settings mean for so many images and processes."""
        layout = cls(length.steps or DEFAULT_STEPS, length.batch, length.accumulation, processes, rank)
        if length.epochs is None:
            return layout
        steps = length.epochs * layout.steps_per_epoch(images)
        return cls(steps, length.batch, length.accumulation, processes, rank)

    @property
    def images_per_step(self) -> int:
        """Instance images that one optimizer step sees, over all processes."""
        return self.batch * self.accumulation * self.processes

    def steps_per_epoch(self, images: int) -> int:
        return math.ceil(images / self.images_per_step)

    def numbers(self, step: int, micro_step: int) -> Iterator[int]:
        """The numbers of the samples that this process takes in a micro-step of an optimizer step."""
        return process_slots(
            replayed(step, self.steps), micro_step, self.batch, self.accumulation, self.processes, self.rank
        )


def estimate_draws(settings: EstimateSettings, layout: Layout, images: int) -> int:
    """Draws of each of the `images` for the estimate.

    Unless given, those of "full" are `ESTIMATE_SHARE` of the images that training sees, within `FULL_DRAWS`: a prior of
    more steps is a better one. However many processes share a run's batches, its prior is the same.
    """
    if settings.draws is not None:
        return settings.draws
    least, most = FULL_DRAWS
    return max(least, min(most, round(ESTIMATE_SHARE * layout.steps * layout.images_per_step / images)))


def estimate_batches(
    settings: EstimateSettings, layout: Layout, stream: DrawStream, source: LatentSource, prompts: Sequence[str]
) -> list[list[Sample]]:
    """One draw a batch, with the prompt of its image, shared out over the processes.

    For "full", every process takes the same steps (Adam does not mind that their gradients are added). Else those that
    have one less take another of no weight: a base that is shared out is called by all of them or by none.
    """
    draws = stream.stratified(estimate_draws(settings, layout, len(source)))
    if settings.kind == "full":
        return [[(draw, source, prompts[draw.image], 1.0)] for draw in draws]
    count = math.ceil(len(draws) / layout.processes)
    mine = [(draw, 1.0) for draw in draws[layout.rank :: layout.processes]]
    mine += [(draws[0], 0.0)] * (count - len(mine))
    return [[(draw, source, prompts[draw.image], weight)] for draw, weight in mine]


@dataclass(frozen=True)
class Pictures:
    """A set of images to train on, with a prompt for each, their draws and the weight of their loss."""

    source: LatentSource
    stream: DrawStream
    prompts: Sequence[str]
    weight: float = 1.0

    def sample(self, number: int, share: float = 1.0) -> Sample:
        draw = self.stream.sample(number)
        return draw, self.source, self.prompts[draw.image], share * self.weight


def training_batches(layout: Layout, step: int, sets: Sequence[Pictures]) -> Iterator[list[Sample]]:
    """The micro-batches of one optimizer step for this process; with class images, each has as many of both.

    A set's weight is that of its mean: with two sets, each sample counts twice in the mean over both.
    """
    for micro_step in range(layout.accumulation):
        numbers = list(layout.numbers(step, micro_step))
        yield [pictures.sample(number, float(len(sets))) for pictures in sets for number in numbers]
