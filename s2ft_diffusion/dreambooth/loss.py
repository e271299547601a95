"""The training loss: images and draws to the denoiser's error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.training_utils import compute_snr
from torch import nn

from .draws import Draw
from .images import SquareImages
from .settings import LossSettings


class LatentSource:
    """Latents of a set of images; posterior moments are encoded once where crops are always the same."""

    def __init__(self, images: SquareImages, vae: AutoencoderKL) -> None:
        self.images, self.vae = images, vae
        self._moments: dict[tuple[int, bool], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    @torch.no_grad()
    def encode(self, draw: Draw) -> torch.Tensor:
        """A posterior sample (channels, height, width) of a draw's image, scaled as the denoiser expects, float32."""
        key = (draw.image, draw.flip)
        moments = self._moments.get(key) if self.images.fixed else None
        if moments is None:
            pixels = self.images.crop(draw.image, draw.place, flip=draw.flip)[None]
            posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
            moments = torch.stack([posterior.mean[0], posterior.std[0]]).float()
            if self.images.fixed:
                self._moments[key] = moments
        mean, std = moments
        latents = mean + std * draw.posterior_noise.to(mean.device)
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def keep_all(self, flips: Sequence[bool]) -> bool:
        """Encode everything now, if that is valid; True says that the autoencoder is not needed any more."""
        if not self.images.fixed:
            return False
        shape = torch.zeros(1)
        for index in range(len(self.images)):
            for flip in flips:
                self.encode(Draw(index, 0.0, (0.5, 0.5), flip, shape, shape))
        return True


class DiffusionLoss:
    """The denoising loss of a batch of draws, as DreamBooth trains with, min-SNR weights on request.

    Calling it gives the mean over the samples' losses, each weighted by its `weight`.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: SchedulerMixin,
        context: Callable[[str], torch.Tensor],
        settings: LossSettings | None = None,
    ) -> None:
        self.denoiser, self.scheduler, self.context = denoiser, scheduler, context
        self.settings = settings or LossSettings()

    def __call__(self, samples: Sequence[tuple[Draw, LatentSource, str, float]]) -> torch.Tensor:
        """`samples`: draw, where its latents come from, its prompt, and its weight."""
        draws = [draw for draw, *_ in samples]
        latents = torch.stack([source.encode(draw) for draw, source, *_ in samples])
        noise = torch.stack([draw.noise for draw in draws]).to(latents.device)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.tensor([int(draw.time * steps) for draw in draws], device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        contexts = {prompt: self.context(prompt) for prompt in dict.fromkeys(prompt for _, _, prompt, _ in samples)}
        context = torch.cat([contexts[prompt] for _, _, prompt, _ in samples])
        prediction = self.denoiser(noisy.to(context.dtype), timesteps, context, return_dict=False)[0]
        error = (prediction.float() - self._target(latents, noise, timesteps)).square().flatten(1).mean(1)
        weights = torch.tensor([weight for *_, weight in samples], device=error.device)
        return (error * self._snr_weights(timesteps) * weights).sum() / len(samples)

    def _target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        if kind == "sample":
            return latents
        raise ValueError(f"Unknown prediction type {kind!r}.")

    def _snr_weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Min-SNR weights (Hang et al., 2023, https://arxiv.org/abs/2303.09556) for the kind of prediction."""
        if self.settings.snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        snr = compute_snr(self.scheduler, timesteps)
        capped = snr.clamp(max=self.settings.snr_gamma)
        kind = self.scheduler.config.prediction_type
        return capped / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
