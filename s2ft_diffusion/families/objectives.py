"""Training objectives: each takes a denoiser, latents, noise and times, and gives every sample's weighted error.

Times are uniform in [0, 1): a density is reached through the inverse of its distribution, so that stratified times stay
stratified.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from ..dreambooth.settings import LossSettings

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # noisy latents and timesteps to a prediction


class Objective(Protocol):
    """Latents and noise (batch, channels, h, w), and as many times, to errors (batch,)."""

    def __call__(
        self, denoise: Denoiser, latents: torch.Tensor, noise: torch.Tensor, times: Sequence[float]
    ) -> torch.Tensor: ...


class NoiseObjective:
    """Prediction of noise, velocity or latents, as the scheduler says, with min-SNR weights on request."""

    def __init__(self, scheduler: DDPMScheduler, snr_gamma: float | None = None) -> None:
        self.scheduler, self.snr_gamma = scheduler, snr_gamma

    def __call__(
        self, denoise: Denoiser, latents: torch.Tensor, noise: torch.Tensor, times: Sequence[float]
    ) -> torch.Tensor:
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.tensor([int(time * steps) for time in times], device=latents.device)
        prediction = denoise(self.scheduler.add_noise(latents, noise, timesteps), timesteps)
        error = (prediction.float() - self._target(latents, noise, timesteps)).square().flatten(1).mean(1)
        return error * self._weights(timesteps)

    def _target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        if kind == "sample":
            return latents
        raise ValueError(f"Unknown prediction type {kind!r}.")

    def _weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Min-SNR weights (Hang et al., 2023, https://arxiv.org/abs/2303.09556) for the kind of prediction."""
        if self.snr_gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        snr = compute_snr(self.scheduler, timesteps)
        capped = snr.clamp(max=self.snr_gamma)
        kind = self.scheduler.config.prediction_type
        return capped / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]


class EDMObjective:
    """Denoising with Karras et al.'s preconditioning and weights (2022, https://arxiv.org/abs/2206.00364)."""

    def __init__(self, scheduler: EDMEulerScheduler) -> None:
        self.scheduler = scheduler

    def __call__(
        self, denoise: Denoiser, latents: torch.Tensor, noise: torch.Tensor, times: Sequence[float]
    ) -> torch.Tensor:
        steps, data = self.scheduler.config.num_train_timesteps, self.scheduler.config.sigma_data
        index = torch.tensor([int(time * steps) for time in times])
        sigmas = self.scheduler.sigmas[index].to(latents.device).view(-1, 1, 1, 1)
        noisy = latents + sigmas * noise
        timesteps = self.scheduler.timesteps[index].to(latents.device)
        prediction = denoise(self.scheduler.precondition_inputs(noisy, sigmas), timesteps).float()
        denoised = self.scheduler.precondition_outputs(noisy, prediction, sigmas)
        weights = (sigmas**2 + data**2) / (sigmas * data) ** 2
        return (weights * (denoised - latents).square()).flatten(1).mean(1)


class FlowObjective:
    """Flow matching: sigma of the noise, the rest of the latents, and noise minus latents as the target.

    Where times lie, and how they weigh, is said by diffusers' `weighting_scheme` (Esser et al., 2024,
    https://arxiv.org/abs/2403.03206). `shift` is the mu of a scheduler that shifts by resolution, else None; a constant
    shift is in the scheduler's sigmas.
    """

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        settings: LossSettings,
        weighting_scheme: str = "none",
        shift: float | None = None,
    ) -> None:
        self.steps = scheduler.config.num_train_timesteps
        self.settings, self.weighting_scheme = settings, weighting_scheme
        sigmas = scheduler.sigmas[: self.steps]
        self.sigmas = sigmas if shift is None else scheduler.time_shift(shift, 1.0, sigmas)

    def __call__(
        self, denoise: Denoiser, latents: torch.Tensor, noise: torch.Tensor, times: Sequence[float]
    ) -> torch.Tensor:
        index = torch.tensor([min(int(self._place(time) * self.steps), self.steps - 1) for time in times])
        sigmas = self.sigmas[index].to(latents.device)
        wide = sigmas.view(-1, 1, 1, 1)
        prediction = denoise((1.0 - wide) * latents + wide * noise, sigmas * self.steps)
        error = (prediction.float() - (noise - latents)).square().flatten(1).mean(1)
        return error * compute_loss_weighting_for_sd3(self.weighting_scheme, sigmas)

    def _place(self, time: float) -> float:
        """Where in the scheduler's sigmas a uniform time lies by the density asked for."""
        if self.weighting_scheme == "logit_normal":
            normal = torch.special.ndtri(torch.tensor(max(time, 1e-12), dtype=torch.float64))
            return torch.sigmoid(self.settings.logit_mean + self.settings.logit_std * normal).item()
        if self.weighting_scheme == "mode":
            place = 1 - time - self.settings.mode_scale * (math.cos(math.pi * time / 2) ** 2 - 1 + time)
            return max(0.0, place)
        return time
