"""The random draws of training: which image, which noise, which timestep, in which crop.

Every draw comes from a generator seeded by the sample's number in the run, so that it depends neither on batch size,
nor on the number of processes, nor on what was drawn before: that is what makes a resumed run bit-identical and two
processes equal to one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..tuner.seeding import seeded


@dataclass(frozen=True)
class Draw:
    """One sample: the image's index, a time in [0, 1), the crop's place, a flip, and noises of the latent's shape."""

    image: int
    time: float
    place: tuple[float, float]
    flip: bool
    posterior_noise: torch.Tensor
    noise: torch.Tensor


def replayed(step: int, total_steps: int) -> int:
    """The step whose draws a step uses: the last tenth of a run repeats the draws of the first.

    So the mean losses over the first and over the last tenth compare like with like.
    """
    tenth = total_steps // 10
    return step - (total_steps - tenth) if step >= total_steps - tenth else step


class DrawStream:
    """Draws for a set of `count` images; each image comes once an epoch, in a new order every epoch."""

    def __init__(self, name: str, seed: int, count: int, latent_shape: tuple[int, ...], *, random_flip: bool) -> None:
        self.name, self.seed, self.count = name, seed, count
        self.latent_shape, self.random_flip = latent_shape, random_flip

    def sample(self, number: int) -> Draw:
        """The draw of sample `number`, counted from the start of the run."""
        epoch, place = divmod(number, self.count)
        order = torch.randperm(self.count, generator=seeded(self.seed, self.name, "epoch", epoch))
        return self._draw(int(order[place]), seeded(self.seed, self.name, "sample", number), None)

    def stratified(self, draws_per_image: int) -> list[Draw]:
        """`draws_per_image` draws of every image, their times one from each of equally many strata of [0, 1)."""
        total = self.count * draws_per_image
        strata = torch.randperm(total, generator=seeded(self.seed, self.name, "strata"))
        return [
            self._draw(
                number % self.count,
                seeded(self.seed, self.name, "estimate", number),
                (int(strata[number]), total),
            )
            for number in range(total)
        ]

    def _draw(self, image: int, generator: torch.Generator, stratum: tuple[int, int] | None) -> Draw:
        time, vertical, horizontal, coin = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        if stratum:
            number, total = stratum
            time = (number + time) / total
        return Draw(
            image=image,
            time=time,
            place=(vertical, horizontal),
            flip=self.random_flip and coin < 0.5,
            posterior_noise=torch.randn(self.latent_shape, generator=generator),
            noise=torch.randn(self.latent_shape, generator=generator),
        )


def process_slots(
    step: int, micro_step: int, batch: int, accumulation: int, processes: int, rank: int
) -> Iterator[int]:
    """The numbers of the samples that one process takes in one micro-step of one optimizer step."""
    start = ((step * accumulation + micro_step) * processes + rank) * batch
    yield from range(start, start + batch)
