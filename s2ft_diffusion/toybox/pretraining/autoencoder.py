"""The autoencoder that both bases share, and the latents of all scenes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from ..networks import LATENT_CHANNELS, LATENT_SIDE, new_vae
from .plan import Plan
from .rendering import Renders
from .stage import Stage, Training, autocast, step_generator

FIRST = 4000  # scenes that training waits for


def train_autoencoder(folder: Path, renders: Renders, plan: Plan, device: torch.device) -> AutoencoderKL:
    """L1, squared error, error of differences of neighbours, and a little KL; a quarter of the pictures cluttered."""
    torch.manual_seed(0)
    vae = new_vae().to(device, memory_format=torch.channels_last)
    training = Training(vae, 1.2e-3, plan.autoencoder, warmup=100, decay=0.999)
    stage = Stage("autoencoder", folder, training.parts, plan.every)

    def losses_of(pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - pictures
        kl = posterior.kl().float().mean() / (LATENT_CHANNELS * LATENT_SIDE**2)
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 2e-4 * kl

    losses = torch.compile(losses_of) if plan.compile else losses_of

    def step(i: int) -> torch.Tensor:
        generator = step_generator(1, i, device)
        # Over the first half of the steps more and more of the scenes: they are being rendered meanwhile.
        there = min(renders.count, FIRST + 2 * i * renders.count // plan.autoencoder)
        renders.wait_for(there)
        index = torch.randint(there, (plan.autoencoder_batch,), generator=torch.Generator().manual_seed(i))
        pictures = renders.pictures(index).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        flip = torch.rand(len(pictures), 1, 1, 1, device=device, generator=generator) < 0.5
        pictures = cluttered(torch.where(flip, pictures.flip(3), pictures), generator)
        shape = (len(pictures), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
        noise = torch.randn(shape, device=device, generator=generator)
        loss = losses(pictures.contiguous(memory_format=torch.channels_last), noise)
        training.update(loss, i)
        return loss

    stage.run(plan.autoencoder, step)
    training.finish()
    return vae


def cluttered(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random shapes and tints over the first quarter of `pictures`: the autoencoder carries what the world lacks."""
    count, side, device = len(pictures) // 4, pictures.shape[-1], pictures.device
    if not count:
        return pictures
    line = torch.linspace(-1, 1, side, device=device)
    y, x = line[:, None], line[None, :]
    shapes = pictures[:count].clone()
    for _ in range(4):  # an ellipse or a rhombus each, one colour, soft edges
        drawn = torch.rand(count, 9, 1, 1, device=device, generator=generator).unbind(1)
        angle, centre_x, centre_y = drawn[0] * math.tau, drawn[1] * 2 - 1, drawn[2] * 2 - 1
        u = ((x - centre_x) * angle.cos() + (y - centre_y) * angle.sin()) / (0.05 + 0.5 * drawn[3])
        v = ((y - centre_y) * angle.cos() - (x - centre_x) * angle.sin()) / (0.03 + 0.3 * drawn[4])
        radius = torch.where(drawn[5] > 0.5, (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs()))
        mask = ((1 - radius) * 12).clamp(0, 1)[:, None]
        colour = torch.stack(drawn[6:9], dim=1) * 2 - 1
        shapes = shapes * (1 - mask) + mask * colour
    tint = torch.rand(count, 3, 8, 8, device=device, generator=generator) * 2 - 1
    tint = F.interpolate(tint, size=side, mode="bicubic", align_corners=False).clamp(-1, 1)
    weight = (torch.rand(count, 1, 1, 1, device=device, generator=generator) * 1.2 - 0.5).clamp(0, 0.7)
    return torch.cat([shapes * (1 - weight) + tint * weight, pictures[count:]])


@torch.no_grad()
def encode_scenes(
    folder: Path, vae: AutoencoderKL, renders: Renders, device: torch.device
) -> tuple[torch.Tensor, float]:
    """Posterior moments of all scenes, (count, 2 * channels, 8, 8) in fp16, and the latents' scaling factor."""
    path = folder / "latents.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        return saved["moments"], saved["scaling_factor"]
    moments = []
    for start in range(0, renders.count, 500):
        pictures = renders.pictures(slice(start, start + 500)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        moments.append(vae.encode(pictures).latent_dist.parameters.half().cpu().contiguous())
    moments = torch.cat(moments)
    mean, log_variance = moments[:8000].float().chunk(2, dim=1)
    scaling_factor = float(1.0 / (mean.var() + log_variance.exp().mean()).sqrt())
    temporary = path.with_suffix(".tmp")
    torch.save({"moments": moments, "scaling_factor": scaling_factor}, temporary)
    temporary.replace(path)
    return moments, scaling_factor
