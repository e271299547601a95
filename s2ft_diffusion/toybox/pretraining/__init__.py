"""Pretraining of the embedded bases, from nothing: autoencoder, text encoders, U-Net, flow transformer.

    python -m s2ft_diffusion.toybox pretrain --work_dir runs/toybox --output_dir runs/toybox/bases
    python -m s2ft_diffusion.toybox pretrain --start toybox-flow --work_dir runs/more   # train a base's denoiser on

Pictures are rendered in processes of their own beside the training. Every stage goes on from its last checkpoint in
the work folder, and comes out the same, bit by bit on a CPU, however often it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from transformers import CLIPTokenizer

from ..networks import new_projected_text_encoder, new_text_encoder
from ..tokenizer import build_tokenizer
from .autoencoder import encode_scenes, train_autoencoder
from .denoisers import Latents, train_transformer, train_unet
from .plan import Plan
from .rendering import Renders
from .saving import save_flow_base, save_unet_base
from .text import train_text_encoder

__all__ = ["Plan", "pretrain", "pretrain_further"]


def pretrain(
    work_dir: Path, output_dir: Path, plan: Plan, device: torch.device, bases: Collection[str] = ("unet", "flow")
) -> None:
    """All stages in order; a stage that is complete in `work_dir` is only loaded.

    Writes `output_dir`/base and `output_dir`/flow, or the one that `bases` names, each with a training.json.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(work_dir / "tokenizer")
    with Renders(work_dir, plan.scenes, plan.workers, plan.captions) as renders:
        vae = train_autoencoder(work_dir, renders, plan, device)
        renders.wait_for(plan.scenes)
        moments, scaling_factor = encode_scenes(work_dir, vae, renders, device)
        ids, attributes = renders.captions(device)
    vae.register_to_config(scaling_factor=scaling_factor, shift_factor=0.0)
    latents = Latents(moments.to(device), scaling_factor, ids, _empty(tokenizer, device))
    shared = ["autoencoder"]

    def trained(name: str, encoder: Any, seed: int) -> Any:
        return train_text_encoder(work_dir, name, encoder, seed, ids, attributes, plan, device)

    if "unet" in bases:
        torch.manual_seed(1)
        encoder = trained("text_encoder", new_text_encoder(tokenizer), 1)
        unet = train_unet(work_dir, encoder, latents, plan, device)
        save_unet_base(output_dir / "base", vae, encoder, tokenizer, unet)
        _describe(output_dir / "base", work_dir, [*shared, "text_encoder", "unet"], plan, device)
    if "flow" in bases:
        encoders = []
        for which, name in enumerate(("flow_text_encoder", "flow_text_encoder_2")):
            torch.manual_seed(11 + which)
            encoders.append(trained(name, new_projected_text_encoder(tokenizer, which), 11 + which))
        transformer = train_transformer(work_dir, encoders, latents, plan, device)
        save_flow_base(output_dir / "flow", vae, encoders, tokenizer, transformer)
        names = [*shared, "flow_text_encoder", "flow_text_encoder_2", "transformer"]
        _describe(output_dir / "flow", work_dir, names, plan, device)


def pretrain_further(work_dir: Path, start: Path, output_dir: Path, plan: Plan, device: torch.device) -> None:
    """Train the denoiser of the base in the folder `start` on; its other networks stay as they are.

    Writes the base, with a training.json whose `start` is that of the base before, to `output_dir`.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    pipeline = DiffusionPipeline.from_pretrained(start).to(device)
    tokenizer, vae = build_tokenizer(work_dir / "tokenizer"), pipeline.vae
    with Renders(work_dir, plan.scenes, plan.workers, plan.captions) as renders:
        renders.wait_for(plan.scenes)
        moments, _ = encode_scenes(work_dir, vae, renders, device)
        ids, _ = renders.captions(device)
    latents = Latents(moments.to(device), vae.config.scaling_factor, ids, _empty(tokenizer, device))
    if isinstance(pipeline, StableDiffusion3Pipeline):
        encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        transformer = train_transformer(work_dir, encoders, latents, plan, device, pipeline.transformer)
        save_flow_base(output_dir, vae, encoders, tokenizer, transformer)
        stage = "transformer"
    else:
        unet = train_unet(work_dir, pipeline.text_encoder, latents, plan, device, pipeline.unet)
        save_unet_base(output_dir, vae, pipeline.text_encoder, tokenizer, unet)
        stage = "unet"
    earlier = json.loads((start / "training.json").read_text(encoding="utf-8"))
    _describe(output_dir, work_dir, [stage], plan, device, earlier)


def _empty(tokenizer: CLIPTokenizer, device: torch.device) -> torch.Tensor:
    return tokenizer([""], padding="max_length", return_tensors="pt").input_ids[0].to(device)


def _describe(
    folder: Path,
    work_dir: Path,
    stages: list[str],
    plan: Plan,
    device: torch.device,
    start: dict[str, Any] | None = None,
) -> None:
    """Write training.json: what each stage took (the last record of its log), on what, and what it went on from."""
    took = {}
    for name in stages:
        record = json.loads((work_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        batch = plan.batch_of(name)
        took[name] = {
            "steps": record["step"],
            "batch": batch,
            "samples": record["step"] * batch,
            "seconds": record["seconds"],
            "loss": record["loss"],
        }
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    report = {
        "made_by": "python -m s2ft_diffusion.toybox pretrain" + " --start" * bool(start),
        "scenes": plan.scenes,
        "captions_a_scene": plan.captions,
        "stages": took,
        "device": f"{where}; {plan.workers} processes rendering",
        "torch": torch.__version__,
        **({"start": start} if start else {}),
    }
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
