"""Text encoders: from captions to the attributes that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ..captions import ATTRIBUTES
from .plan import Plan
from .stage import Stage, Training, autocast, step_generator

Encoder = TypeVar("Encoder", CLIPTextModel, CLIPTextModelWithProjection)


def train_text_encoder(
    folder: Path,
    name: str,
    encoder: Encoder,
    seed: int,
    ids: torch.Tensor,
    attributes: torch.Tensor,
    plan: Plan,
    device: torch.device,
) -> Encoder:
    """Train on what captions name, read off the pooled output, with meaningless words mixed in.

    An encoder that has learned what words mean in this world lets the denoiser start from there; it stays frozen while
    the denoiser trains. `ids` is (scenes, captions, 32), `attributes` (scenes, captions, 5).
    """
    torch.manual_seed(seed)
    width = encoder.config.projection_dim
    heads = nn.ModuleDict({k: nn.Linear(width, len(values) + 1) for k, values in ATTRIBUTES.items()})
    both = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(device)
    training = Training(both, 1e-3, plan.text, warmup=100, decay=0.99)
    stage = Stage(name, folder, training.parts, plan.every)
    scenes, captions = ids.shape[:2]

    def losses_of(tokens: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            output = encoder(tokens)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        loss = pooled.new_zeros((), dtype=torch.float32)
        for k, attribute in enumerate(ATTRIBUTES):
            loss = loss + F.cross_entropy(heads[attribute](pooled.float()), named[:, k])
        return loss

    losses = torch.compile(losses_of) if plan.compile and device.type == "cuda" else losses_of

    def step(i: int) -> torch.Tensor:
        generator = step_generator(seed, i, device)
        scene = torch.randint(scenes, (plan.text_batch,), device=device, generator=generator)
        caption = torch.randint(captions, (plan.text_batch,), device=device, generator=generator)
        loss = losses(ids[scene, caption].long(), attributes[scene, caption].long())
        training.update(loss, i)
        return loss

    stage.run(plan.text, step)
    training.finish()
    return encoder.eval()
