"""Training of the embedded world's encoders, on a CPU or a GPU, resumable.

    python -m eval.toybox.pretrain --work_dir runs/encoders

* The ViT learns as DINO does (Caron et al., 2021: a student, a teacher that is its moving average, several views of one
  thing, no labels), with the contrastive loss of MoCo v3 (Chen et al., 2021), which needs fewer steps than
  self-distillation. The views of one individual are renders of it in different places and poses, so that what stays the
  same is the individual.
* The CLIP (Radford et al., 2021) learns pictures with captions.

Neither has seen the named subjects, and neither shares weights with the base's text encoder.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2 as transforms
from tqdm import tqdm
from transformers import CLIPTokenizer, ViTConfig, ViTImageProcessor, ViTModel

from s2ft_diffusion import toybox
from s2ft_diffusion.toybox.captions import describe, random_caption
from s2ft_diffusion.toybox.objects import EMBLEMS
from s2ft_diffusion.toybox.pretraining.stage import Stage
from s2ft_diffusion.toybox.subjects import SUBJECTS
from s2ft_diffusion.toybox.world import BACKGROUNDS, CLASSES, COLOURS, RESOLUTION, Scene, random_scene, render

from . import CLIP_FOLDER, DINO_FOLDER

VIEWS = 4
SEED = 5_000_000  # of individuals, and of scenes from SEED + 1_000_000 on; held-out ones start at HELD_OUT
HELD_OUT = 9_000_000
CLIP_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": RESOLUTION, "patch_size": 8, "width": 128, "layers": 6, "head_width": 32},
    "text_cfg": {
        "context_length": 32,
        "width": 128,
        "heads": 4,
        "layers": 3,
        "hf_tokenizer_name": "tokenizer",
        "vocab_size": 0,
    },
}


def random_individual(rng: random.Random) -> Scene:
    """Something that may be two-toned, carry an emblem and have an accessory; none of the named subjects."""
    while True:
        scene = random_scene(rng)
        emblems = [name for name, emblem in EMBLEMS.items() if emblem.shapes]
        accessories = [name for name, emblem in EMBLEMS.items() if emblem.behind]
        other = [c for c in COLOURS if c != scene.colour]
        scene = replace(
            scene,
            second_colour=rng.choice(other) if rng.random() < 0.8 else None,
            emblem=rng.choice(emblems) if rng.random() < 0.8 else None,
            emblem_colour=rng.choice(other),
            accessory=rng.choice(accessories) if rng.random() < 0.7 else None,
            pattern=scene.pattern if rng.random() < 0.3 else "plain",
        )
        if all((scene.kind, scene.colour, scene.emblem) != (s.kind, s.colour, s.emblem) for s in SUBJECTS.values()):
            return scene


def views_of(individual: Scene, rng: random.Random, count: int) -> list[Scene]:
    """The same individual in `count` different places and poses."""
    places = rng.sample(list(BACKGROUNDS), count)
    return [replace(individual, background=place).posed(rng) for place in places]


def rendered(path: Path, scenes: list[Scene]) -> np.ndarray:
    """Pictures (n, 64, 64, 3) in bytes, made once and kept in a file."""
    if not path.exists():
        pictures = np.empty((len(scenes), RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
        for i, scene in enumerate(tqdm(scenes, desc=path.stem, mininterval=10)):
            pictures[i] = np.asarray(render(scene))
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, pictures)
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


AUGMENT = transforms.Compose(
    [
        transforms.RandomResizedCrop(RESOLUTION, scale=(0.6, 1.0), ratio=(0.9, 1.1), antialias=True),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(brightness=0.15, contrast=0.15, saturation=0.15, hue=0.02),
        transforms.RandomApply([transforms.GaussianBlur(5, (0.1, 1.5))], p=0.5),
    ]
)


def to_batch(pictures: np.ndarray, generator: torch.Generator | None = None) -> torch.Tensor:
    """Bytes (n, 64, 64, 3) to (n, 3, 64, 64) in [-1, 1]; with a generator, each a little changed."""
    batch = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    if generator is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            batch = torch.stack([AUGMENT(picture) for picture in batch])
    return batch.float() / 127.5 - 1.0


def schedule(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))


# The self-supervised ViT ---------------------------------------------------------------------------------------------


def new_dino() -> ViTModel:
    return ViTModel(
        ViTConfig(
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=RESOLUTION,
            patch_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )


def _head(width: int, out: int = 128) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, out))


class Views(nn.Module):
    """A ViT with a projection head, of which the head is thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = new_dino()
        self.head = _head(128)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.head(self.vit(images).last_hidden_state[:, 0]).float(), dim=-1)


def train_dino(work_dir: Path, steps: int, individuals: int, batch: int = 64, temperature: float = 0.1) -> ViTModel:
    torch.manual_seed(0)
    known = [random_individual(random.Random(SEED + i)) for i in range(individuals)]
    scenes = [s for i, who in enumerate(known) for s in views_of(who, random.Random(f"views {SEED + i}"), VIEWS)]
    pictures = rendered(work_dir / "individuals.npy", scenes)
    by_kind = {kind: [i for i, who in enumerate(known) if who.kind == kind] for kind in CLASSES}
    student, predictor = Views(), _head(128)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW([*student.parameters(), *predictor.parameters()], weight_decay=0.05)
    parts = {"student": student, "predictor": predictor, "teacher": teacher, "optimizer": optimizer}
    stage = Stage("dino", work_dir, parts)

    def step(i: int) -> float:
        schedule(optimizer, 1e-3, i, steps)
        generator, rng = torch.Generator().manual_seed(i), random.Random(i)
        kinds = rng.sample(CLASSES, 3)  # few kinds at a time: what tells individuals of one kind apart is what counts
        chosen = [who for kind in kinds for who in rng.sample(by_kind[kind], batch // 3)]
        pairs = [rng.sample(range(VIEWS), 2) for _ in chosen]
        index = [[who * VIEWS + pair[side] for who, pair in zip(chosen, pairs, strict=True)] for side in (0, 1)]
        images = torch.cat([to_batch(pictures[np.array(side)], generator) for side in index])
        with torch.autocast("cpu", torch.bfloat16):
            wanted = teacher(images)
            found = F.normalize(predictor(student(images)).float(), dim=-1)
        one, two = found.chunk(2)
        target_one, target_two = wanted.chunk(2)
        labels = torch.arange(len(one))
        loss = F.cross_entropy(one @ target_two.T / temperature, labels)
        loss = loss + F.cross_entropy(two @ target_one.T / temperature, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        momentum = 1 - 0.01 * 0.5 * (1 + math.cos(math.pi * i / steps))
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 1 - momentum)
        return float(loss.detach())

    stage.run(steps, step)
    return teacher.vit.eval()


# CLIP ----------------------------------------------------------------------------------------------------------------


def new_clip(tokens: int) -> open_clip.CLIP:
    config = copy.deepcopy(CLIP_CONFIG)
    config["text_cfg"] |= {"vocab_size": tokens}
    del config["text_cfg"]["hf_tokenizer_name"]
    return open_clip.CLIP(**config)


def train_clip(work_dir: Path, steps: int, scenes: int, batch: int = 128) -> open_clip.CLIP:
    torch.manual_seed(1)
    tokenizer = CLIPTokenizer.from_pretrained(toybox.base_path() / "tokenizer")
    known = [random_scene(random.Random(SEED + 1_000_000 + i)) for i in range(scenes)]
    pictures = rendered(work_dir / "scenes.npy", known)
    model = new_clip(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    stage = Stage("clip", work_dir, {"model": model, "optimizer": optimizer})

    def step(i: int) -> float:
        schedule(optimizer, 1e-3, i, steps)
        generator, rng = torch.Generator().manual_seed(i), random.Random(i)
        index = np.array(rng.sample(range(scenes), batch))
        captions = [describe(known[k]) if rng.random() < 0.6 else random_caption(known[k], rng).text for k in index]
        tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            images = model.encode_image(to_batch(pictures[index], generator), normalize=True).float()
            texts = model.encode_text(tokens.input_ids, normalize=True).float()
        logits = model.logit_scale.exp().clamp(max=100) * images @ texts.T
        labels = torch.arange(batch)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    stage.run(steps, step)
    return model.eval()


# Saving --------------------------------------------------------------------------------------------------------------


def save_dino(model: ViTModel, folder: Path = DINO_FOLDER) -> None:
    """In transformers' layout, fp16."""
    copy.deepcopy(model).half().save_pretrained(folder)
    size = {"height": RESOLUTION, "width": RESOLUTION}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def save_clip(model: open_clip.CLIP, folder: Path = CLIP_FOLDER) -> None:
    """In open_clip's layout for local folders: its config, the weights, the tokenizer beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer.from_pretrained(toybox.base_path() / "tokenizer")
    config = copy.deepcopy(CLIP_CONFIG)
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    half = [0.5] * 3
    preprocess = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "squash"}
    written = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/encoders"))
    parser.add_argument("--dino_steps", type=int, default=4000)
    parser.add_argument("--individuals", type=int, default=8000)
    parser.add_argument("--clip_steps", type=int, default=3000)
    parser.add_argument("--scenes", type=int, default=30_000)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    save_dino(train_dino(args.work_dir, args.dino_steps, args.individuals))
    save_clip(train_clip(args.work_dir, args.clip_steps, args.scenes))
    print(f"both trained and saved in {time.perf_counter() - begun:.0f} s (this call)")


if __name__ == "__main__":
    main()
