"""The U-Net and the flow transformer, on latents of one autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..networks import new_scheduler, new_transformer, new_unet
from .plan import Plan
from .stage import Stage, Training, autocast, step_generator

UNCONDITIONAL = 0.1  # share of samples whose caption is dropped
SILENT = (32, 32, 32, 32, 32, 64, 256)  # numbers of the third encoder's silent tokens, step by step


@dataclass(frozen=True)
class Latents:
    """Scenes' posterior moments with their captions, on the device."""

    moments: torch.Tensor
    scaling_factor: float
    ids: torch.Tensor
    empty: torch.Tensor

    def draw(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (batch, 16, 8, 8) of random scenes, each with the token ids of one of its captions, or of none."""
        device = self.moments.device
        scene = torch.randint(len(self.moments), (batch,), device=device, generator=generator)
        caption = torch.randint(self.ids.shape[1], (batch,), device=device, generator=generator)
        mean, log_variance = self.moments[scene].float().chunk(2, dim=1)
        noise = torch.randn(mean.shape, device=device, generator=generator)
        dropped = torch.rand(batch, 1, device=device, generator=generator) < UNCONDITIONAL
        ids = torch.where(dropped, self.empty, self.ids[scene, caption].long())
        return (mean + (0.5 * log_variance).exp() * noise) * self.scaling_factor, ids


def train_unet(
    folder: Path,
    encoder: CLIPTextModel,
    latents: Latents,
    plan: Plan,
    device: torch.device,
    start: UNet2DConditionModel | None = None,
) -> UNet2DConditionModel:
    """v-prediction with min-SNR weights (gamma 5); the loss that is logged is without them. `start` is trained on."""
    torch.manual_seed(2)
    unet = (start or new_unet()).requires_grad_(True).train().to(device, memory_format=torch.channels_last)
    if device.type == "cpu":  # the CPU's fused attention is slow in the backward pass
        unet.set_attn_processor(AttnProcessor())
    training = Training(unet, 8e-4, plan.unet, warmup=300, decay=0.9995, weight_decay=0.01)
    stage = Stage("unet", folder, training.parts, plan.every)
    alphas = new_scheduler().alphas_cumprod.to(device)
    count = len(alphas)

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            return unet(noisy, timesteps, context).sample

    predicted = torch.compile(predict) if plan.compile and device.type == "cuda" else predict

    def step(i: int) -> torch.Tensor:
        generator = step_generator(2, i, device)
        clean, ids = latents.draw(plan.batch, generator)
        noise = torch.randn(clean.shape, device=device, generator=generator)
        offset = torch.rand((), device=device, generator=generator)
        spread = (torch.arange(plan.batch, device=device) + offset) / plan.batch
        timesteps = (spread * count).long().clamp(max=count - 1)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        snr = (alpha / (1 - alpha)).flatten()
        with torch.no_grad(), autocast(device):
            context = encoder(ids).last_hidden_state
        prediction = predicted(noisy.contiguous(memory_format=torch.channels_last), timesteps, context)
        error = (prediction.float() - velocity).square().mean(dim=(1, 2, 3))
        training.update((error * snr.clamp(max=5.0) / (snr + 1)).mean(), i)
        return error.mean()

    stage.run(plan.unet, step)
    training.finish()
    unet.set_default_attn_processor()
    return unet


def train_transformer(
    folder: Path,
    encoders: Sequence[CLIPTextModelWithProjection],
    latents: Latents,
    plan: Plan,
    device: torch.device,
    start: SD3Transformer2DModel | None = None,
) -> SD3Transformer2DModel:
    """Flow matching; noise levels logit-normal for four fifths of the samples and uniform for the rest.

    `start` is trained on.
    """
    torch.manual_seed(3)
    transformer = (start or new_transformer()).requires_grad_(True).train().to(device)
    training = Training(transformer, 8e-4, plan.transformer, warmup=300, decay=0.9995, weight_decay=0.01)
    stage = Stage("transformer", folder, training.parts, plan.every)

    if plan.compile and device.type == "cuda":  # block by block: they share their code
        for block in transformer.transformer_blocks:
            block.compile(fullgraph=True, dynamic=True)

    def step(i: int) -> torch.Tensor:
        generator = step_generator(3, i, device)
        clean, ids = latents.draw(plan.batch, generator)
        noise = torch.randn(clean.shape, device=device, generator=generator)
        bell = torch.randn(plan.batch, device=device, generator=generator).sigmoid()
        even, choice = torch.rand(2, plan.batch, device=device, generator=generator)
        level = torch.where(choice < 0.8, bell, even)
        share = level[:, None, None, None]
        context, pooled = encode_text(encoders, ids, SILENT[i % len(SILENT)])
        with autocast(device):
            prediction = transformer((1 - share) * clean + share * noise, context, pooled, level * 1000).sample
        loss = (prediction.float() - (noise - clean)).square().mean()
        training.update(loss, i)
        return loss

    stage.run(plan.transformer, step)
    training.finish()
    return transformer


@torch.no_grad()
def encode_text(
    encoders: Sequence[CLIPTextModelWithProjection], ids: torch.Tensor, silent: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context (n, 32 + silent, 320) and pooled (n, 320), as StableDiffusion3Pipeline makes them."""
    with autocast(ids.device):
        outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
    return torch.cat([context, context.new_zeros(len(ids), silent, context.shape[-1])], dim=1), pooled
