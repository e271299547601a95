"""The training loss: images and draws to the denoiser's error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..families import Family
from ..families.objectives import Objective
from .draws import Draw
from .images import SquareImages
from .prompts import Prompts


class LatentSource:
    """Latents of a set of images; posterior moments are encoded once where crops are always the same."""

    def __init__(self, images: SquareImages, family: Family) -> None:
        self.images, self.family = images, family
        self._moments: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def encode(self, draw: Draw) -> torch.Tensor:
        """A posterior sample (channels, height, width) of a draw's image, as the denoiser expects it, float32."""
        key = (draw.image, draw.flip)
        moments = self._moments.get(key) if self.images.fixed else None
        if moments is None:
            pixels = self.images.crop(draw.image, draw.place, flip=draw.flip)[None]
            with self.family.exactly():
                mean, std = (moment.float() for moment in self.family.moments(pixels))
            moments = (mean, std)
            if self.images.fixed:
                self._moments[key] = moments
        mean, std = moments
        return self.family.normalize(mean + std * draw.posterior_noise.to(mean.device))

    def keep_all(self, flips: Sequence[bool]) -> bool:
        """Encode everything now, if that is valid; True says that the autoencoder is not needed any more."""
        if not self.images.fixed:
            return False
        shape = torch.zeros(1)
        for index in range(len(self.images)):
            for flip in flips:
                self.encode(Draw(index, 0.0, (0.5, 0.5), flip, shape, shape))
        return True


class DiffusionLoss(nn.Module):
    """The denoising loss of a batch of draws, as DreamBooth trains with.

    A module of all that trains, by component name, so that several processes share its gradients whichever parts of it
    they come from. Calling it gives the mean over the samples' losses, each weighted by its `weight`.
    """

    def __init__(self, components: Mapping[str, nn.Module], family: Family, objective: Objective, prompts: Prompts):
        super().__init__()
        self.components = nn.ModuleDict(components)
        self.family, self.objective, self.prompts = family, objective, prompts
        # They are the same on all processes, or shared out over them: nothing to send at the start.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    def forward(self, samples: Sequence[tuple[Draw, LatentSource, str, float]]) -> torch.Tensor:
        """`samples`: draw, where its latents come from, its prompt, and its weight."""
        draws = [draw for draw, *_ in samples]
        latents = torch.stack([source.encode(draw) for draw, source, *_ in samples])
        noise = torch.stack([draw.noise for draw in draws]).to(latents.device)
        told = {prompt: self.prompts(prompt) for prompt in dict.fromkeys(prompt for _, _, prompt, _ in samples)}
        conditions = self.family.collate([told[prompt] for _, _, prompt, _ in samples])
        denoiser = self.components[self.family.denoiser]

        def denoise(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.family.predict(denoiser, noisy, timesteps, conditions)

        error = self.objective(denoise, latents, noise, [draw.time for draw in draws])
        weights = torch.tensor([weight for *_, weight in samples], device=error.device)
        return (error * weights).sum() / len(samples)
