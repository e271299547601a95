"""Pretraining of the embedded base: autoencoder, text encoder, denoiser, then one pipeline folder.

Runs on a CPU or a GPU, each stage resumable from its last checkpoint in the work folder:

    python -m s2ft_diffusion.toybox pretrain --work_dir runs/toybox --base_dir s2ft_diffusion/toybox/base

On a CPU it computes in bfloat16 under autocast, which pays where the processor has matrix units for it.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import filler_words, random_caption
from .objects import WEARABLES
from .tokenizer import MAX_LENGTH, build_tokenizer
from .world import BACKGROUNDS, CLASSES, COLOURS, PATTERNS, RESOLUTION, random_scene, render

TEXT_WIDTH = 192
LATENT_CHANNELS = 16
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": CLASSES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "background": tuple(BACKGROUNDS),
    "wears": tuple(WEARABLES),
}


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(128, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, by diffusers' historical naming
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


@dataclass(frozen=True)
class Steps:
    """How long each stage runs; the denoiser's last `decay` steps lower its rate to zero."""

    vae: int = 6000
    text: int = 800
    scenes: int = 40_000
    unet: int = 9000
    decay: int = 2000


class Stage:
    """A resumable training loop: `step(i)` returns a loss; state is saved every `every` steps and at the end."""

    def __init__(self, name: str, folder: Path, parts: dict[str, object], every: int = 500) -> None:
        self.name, self.parts, self.every = name, parts, every
        self.path = folder / f"{name}.pt"
        self.log_path = folder / f"{name}.jsonl"
        self.start, self.seconds = 0, 0.0
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            self.start, self.seconds = saved["step"], saved["seconds"]
            for key, part in parts.items():
                part.load_state_dict(saved[key])

    def run(self, steps: int, step: Callable[[int], float]) -> None:
        begun, losses = time.time() - self.seconds, []
        for i in range(self.start, steps):
            losses.append(step(i))
            if (i + 1) % 100 == 0:
                record = {"step": i + 1, "loss": float(np.mean(losses)), "seconds": round(time.time() - begun, 1)}
                print(self.name, json.dumps(record), flush=True)
                with self.log_path.open("a") as log:
                    log.write(json.dumps(record) + "\n")
                losses = []
            if (i + 1) % self.every == 0 or i + 1 == steps:
                state = {key: part.state_dict() for key, part in self.parts.items()}
                temporary = self.path.with_suffix(".tmp")
                torch.save({"step": i + 1, "seconds": time.time() - begun, **state}, temporary)
                temporary.replace(self.path)
        self.seconds = max(self.seconds, time.time() - begun if self.start < steps else self.seconds)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Images as one (n, 3, height, width) tensor in [-1, 1], channels last in memory."""
    array = np.stack([np.asarray(image) for image in images]).astype(np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(0, 3, 1, 2)


# Autoencoder ---------------------------------------------------------------------------------------------------------


def cluttered(image: Image.Image, rng: random.Random) -> Image.Image:
    """Random polygons, strokes and colour shifts over a picture: the autoencoder must carry what the world lacks."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 5)):
        colour = tuple(rng.randrange(256) for _ in range(3))
        x, y, r = rng.randrange(RESOLUTION), rng.randrange(RESOLUTION), rng.uniform(3, 22)
        points = [(x + rng.uniform(-r, r), y + rng.uniform(-r, r)) for _ in range(rng.randint(2, 6))]
        if len(points) == 2:
            draw.line(points, fill=colour, width=rng.randint(1, 4))
        else:
            draw.polygon(points, fill=colour)
    if rng.random() < 0.5:
        small = Image.fromarray(np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (9, 9, 3), dtype=np.uint8))
        image = Image.blend(image, small.resize(image.size, Image.Resampling.BICUBIC), rng.uniform(0.1, 0.7))
    return image


def train_vae(folder: Path, steps: int, device: torch.device, batch: int = 16) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = new_vae().to(device, memory_format=torch.channels_last)
    ema = EMAModel(vae.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    stage = Stage("vae", folder, {"model": vae, "ema": ema, "optimizer": optimizer}, every=500)
    ema.to(device)

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        with _autocast(device):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - images
        kl = posterior.kl() / (LATENT_CHANNELS * (RESOLUTION // 8) ** 2)
        return error.abs().mean() + error.square().mean() + 3e-4 * kl.float().mean()

    compiled = torch.compile(loss_of)

    def step(i: int) -> float:
        rng = random.Random(i)
        torch.manual_seed(i)
        images = [render(random_scene(rng)) for _ in range(batch)]
        images = [cluttered(image, rng) if j % 4 == 0 else image for j, image in enumerate(images)]
        pixels = to_tensor(images).to(device, memory_format=torch.channels_last)
        _set_rate(optimizer, 1e-3 * min(1.0, (i + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * i / steps))))
        loss = compiled(pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        return loss.item()

    stage.run(steps, step)
    ema.copy_to(vae.parameters())
    return vae.eval()


# Text encoder --------------------------------------------------------------------------------------------------------


def train_text_encoder(
    folder: Path, tokenizer: CLIPTokenizer, steps: int, device: torch.device, batch: int = 128
) -> CLIPTextModel:
    """Captions to the attributes they name, read off the end token, with meaningless words mixed in.

    A caption encoder that has learned what words mean in this world lets the denoiser start from there; it stays frozen
    while the denoiser trains.
    """
    torch.manual_seed(1)
    encoder = new_text_encoder(tokenizer).to(device)
    heads = nn.ModuleDict({k: nn.Linear(TEXT_WIDTH, len(v) + 1) for k, v in ATTRIBUTES.items()}).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.0)
    stage = Stage("text", folder, {"model": encoder, "heads": heads, "optimizer": optimizer})
    filler = filler_words()

    def step(i: int) -> float:
        rng = random.Random(i)
        mentions = [random_caption(random_scene(rng), rng, filler) for _ in range(batch)]
        ids = tokenizer(
            [m.text for m in mentions],
            padding="max_length",
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        ).input_ids.to(device)
        _set_rate(optimizer, 1e-3 * min(1.0, (i + 1) / 100) * (1 - i / steps))
        with _autocast(device):
            pooled = encoder(ids).pooler_output.float()
        loss = pooled.new_zeros(())
        for name, values in ATTRIBUTES.items():
            named = [getattr(m, name) for m in mentions]
            target = torch.tensor([len(values) if v is None else values.index(v) for v in named], device=device)
            loss = loss + F.cross_entropy(heads[name](pooled), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    stage.run(steps, step)
    return encoder.eval()


# Denoiser ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_scenes(folder: Path, vae: AutoencoderKL, count: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """Posterior moments of `count` scenes, (count, 2 * channels, 8, 8) in fp16, and the latents' scaling factor.

    Scene `i` is `random_scene(random.Random(i))`, so that captions can be drawn afresh from it in every epoch.
    """
    path = folder / "latents.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        return saved["moments"], saved["scaling_factor"]
    moments = []
    for start in range(0, count, 100):
        scenes = [random_scene(random.Random(i)) for i in range(start, start + 100)]
        pixels = to_tensor([render(scene) for scene in scenes]).to(device, memory_format=torch.channels_last)
        with _autocast(device):
            moments.append(vae.encode(pixels).latent_dist.parameters.half().cpu().contiguous())
        if start % 5000 == 0:
            print("latents", start, flush=True)
    moments = torch.cat(moments)
    mean, log_variance = moments[:5000].float().chunk(2, dim=1)
    scaling_factor = float(1.0 / (mean.var() + log_variance.exp().mean()).sqrt())
    torch.save({"moments": moments, "scaling_factor": scaling_factor}, path)
    return moments, scaling_factor


def train_unet(
    folder: Path,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    moments: torch.Tensor,
    scaling_factor: float,
    plan: Steps,
    device: torch.device,
    batch: int = 64,
    rate: float = 6e-4,
) -> UNet2DConditionModel:
    """v-prediction with min-SNR weights (gamma 5), constant rate after warm-up, linear decay at the end, EMA."""
    torch.manual_seed(2)
    unet = new_unet().to(device, memory_format=torch.channels_last)
    if device.type == "cpu":  # the CPU's fused attention is slow in the backward pass
        unet.set_attn_processor(AttnProcessor())
    ema = EMAModel(unet.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    stage = Stage("unet", folder, {"model": unet, "ema": ema, "optimizer": optimizer})
    ema.to(device)
    scheduler = new_scheduler()
    filler = filler_words()
    encoder = encoder.to(device)

    def step(i: int) -> float:
        rng = random.Random(i)
        generator = torch.Generator().manual_seed(i)
        chosen = [rng.randrange(len(moments)) for _ in range(batch)]
        captions = [
            "" if rng.random() < 0.1 else random_caption(random_scene(random.Random(j)), rng, filler).text
            for j in chosen
        ]
        ids = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
        mean, log_variance = moments[chosen].float().chunk(2, dim=1)
        latents = (mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)) * scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        offset = torch.rand((), generator=generator)
        timesteps = (((torch.arange(batch) + offset) / batch) * 1000).long()
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps).to(device)
        snr = compute_snr(scheduler, timesteps)
        weight = (snr.clamp(max=5.0) / (snr + 1)).to(device)
        left = (plan.unet - i) / plan.decay
        _set_rate(optimizer, rate * min(1.0, (i + 1) / 200, max(left, 0.01)))
        with _autocast(device):
            with torch.no_grad():
                context = encoder(ids.input_ids.to(device)).last_hidden_state
            noisy = noisy.to(device, memory_format=torch.channels_last)
            prediction = unet(noisy, timesteps.to(device), context).sample
        error = (prediction.float() - target).square().mean(dim=(1, 2, 3))
        loss = (error * weight).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        return error.mean().item()

    stage.run(plan.unet, step)
    ema.copy_to(unet.parameters())
    return unet.eval()


def save_base(
    folder: Path, vae: AutoencoderKL, encoder: CLIPTextModel, unet: UNet2DConditionModel, scaling_factor: float
) -> None:
    """The standard pipeline layout, weights in fp16 safetensors."""
    vae.register_to_config(scaling_factor=scaling_factor)
    unet.set_default_attn_processor()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to("cpu", torch.float16).to(memory_format=torch.contiguous_format)
    pipeline.save_pretrained(folder, safe_serialization=True)
    # As the checkpoints on the hub name them, for transformers before 5.6: newer ones read both.
    weights_path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(weights_path).items()}
    save_file(weights, weights_path, {"format": "pt"})
    # transformers loads in the type that the config names; half precision is for storage alone.
    config_path = folder / "text_encoder" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def pretrain(work_dir: Path, base_dir: Path, plan: Steps, device: torch.device) -> None:
    """All stages in order; a stage that is complete in `work_dir` is only loaded."""
    work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(base_dir / "tokenizer")
    encoder = train_text_encoder(work_dir, tokenizer, plan.text, device)
    vae = train_vae(work_dir, plan.vae, device)
    moments, scaling_factor = encode_scenes(work_dir, vae, plan.scenes, device)
    unet = train_unet(work_dir, tokenizer, encoder, moments, scaling_factor, plan, device)
    save_base(base_dir, vae, encoder, unet, scaling_factor)
    (base_dir / "training.json").write_text(json.dumps(describe_training(work_dir, device), indent=2) + "\n")


def describe_training(work_dir: Path, device: torch.device) -> dict[str, object]:
    """What the stages took: the last line of each stage's log (step, loss, seconds), and on what."""
    stages = {}
    for name in ("text", "vae", "unet"):
        lines = (work_dir / f"{name}.jsonl").read_text().splitlines()
        stages[name] = json.loads(lines[-1])
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {"stages": stages, "device": where, "torch": torch.__version__}
