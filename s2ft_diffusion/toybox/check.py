"""Are the embedded bases any good? Reconstruction error, and a probe that reads what they generate.

    python -m s2ft_diffusion.toybox check

The probe is a small classifier of class, background and colour, trained on rendered pictures; it is trusted only for
what it gets right on held-out renders.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from .captions import ATTRIBUTES
from .networks import to_tensor
from .pretraining.stage import Stage, set_rate
from .tokenizer import MAX_LENGTH
from .world import BACKGROUNDS, Scene, random_scene, render

PROBE_PATH = Path(__file__).parent / "probe.safetensors"
PROBED = ("kind", "background", "colour")
HELD_OUT = 2_000_000  # seeds from here on are never trained on
PROBE_STEPS = 1200


class Probe(nn.Module):
    """Images (n, 3, 64, 64) in [-1, 1] to logits of class, background and colour."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, 256), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(ATTRIBUTES[name])) for name in PROBED})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}


def load_probe() -> Probe:
    """The committed probe."""
    probe = Probe()
    probe.load_state_dict({name: tensor.float() for name, tensor in load_file(PROBE_PATH).items()})
    return probe.eval()


def train_probe(work_dir: Path, steps: int = PROBE_STEPS, batch: int = 64) -> Probe:
    """Train the probe on renders and save it in fp16 where `load_probe` finds it."""
    torch.manual_seed(3)
    probe = Probe()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.01)
    work_dir.mkdir(parents=True, exist_ok=True)
    stage = Stage("probe", work_dir, {"model": probe, "optimizer": optimizer})

    def step(i: int) -> float:
        scenes = [random_scene(random.Random(HELD_OUT // 2 + i * batch + j)) for j in range(batch)]
        set_rate(optimizer, 2e-3 * min(1.0, (i + 1) / 100) * (1 - i / steps))
        with torch.autocast("cpu", torch.bfloat16):
            images = to_tensor([render(scene) for scene in scenes])
            images = images + 0.1 * torch.rand(()) * torch.randn(images.shape)
            logits = probe(images)
        loss = sum(F.cross_entropy(logits[name].float(), _labels(scenes, name)) for name in PROBED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    stage.run(steps, step)
    save_file({name: tensor.half() for name, tensor in probe.state_dict().items()}, PROBE_PATH)
    return load_probe()


def _labels(scenes: list[Scene], name: str) -> torch.Tensor:
    return torch.tensor([ATTRIBUTES[name].index(getattr(scene, name)) for scene in scenes])


@torch.no_grad()
def read_images(probe: Probe, images: list[Image.Image]) -> dict[str, list[str]]:
    """What the probe sees: for each attribute, one value an image."""
    logits = probe(to_tensor(images))
    return {name: [ATTRIBUTES[name][i] for i in logits[name].argmax(1).tolist()] for name in PROBED}


def probe_accuracy(probe: Probe, count: int = 1000) -> dict[str, float]:
    """Shares of held-out renders whose class, background and colour the probe reads correctly."""
    scenes = [random_scene(random.Random(HELD_OUT + i)) for i in range(count)]
    seen = read_images(probe, [render(scene) for scene in scenes])
    return {
        name: sum(a == getattr(s, name) for a, s in zip(seen[name], scenes, strict=True)) / count for name in PROBED
    }


@torch.no_grad()
def reconstruction_error(pipeline: DiffusionPipeline, count: int = 200) -> float:
    """Mean squared error of the autoencoder on held-out renders, pixels in [-1, 1]."""
    images = to_tensor([render(random_scene(random.Random(HELD_OUT + i))) for i in range(count)])
    errors = []
    for part in images.split(50):
        decoded = pipeline.vae.decode(pipeline.vae.encode(part).latent_dist.mode()).sample
        errors.append((decoded.clamp(-1, 1) - part).square().mean())
    return float(torch.stack(errors).mean())


def prompted_scenes(count: int) -> list[tuple[Scene, str]]:
    """Scenes with full prompts, classes and backgrounds in equal shares."""
    pairs = []
    kinds, backgrounds = ATTRIBUTES["kind"], ATTRIBUTES["background"]
    for i in range(count):
        rng = random.Random(HELD_OUT * 2 + i)
        scene = random_scene(rng)
        scene = Scene(kinds[i % 12], scene.colour, scene.pattern, backgrounds[(i // 12) % 10])
        words = [scene.colour] + ([] if scene.pattern == "plain" else [scene.pattern]) + [scene.kind]
        pairs.append((scene, f"a photo of a {' '.join(words)} {BACKGROUNDS[scene.background]}"))
    return pairs


def open_scenes(count: int) -> list[tuple[Scene, str]]:
    """Scenes with prompts that leave the colour open, and in every second the pattern as well."""
    pairs = []
    for i, (scene, _) in enumerate(prompted_scenes(count)):
        pattern = "" if i % 2 else ("striped ", "dotted ", "checkered ")[i // 2 % 3]
        pairs.append((scene, f"a photo of a {pattern}{scene.kind} {BACKGROUNDS[scene.background]}"))
    return pairs


@torch.no_grad()
def confidence(probe: Probe, images: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """The probe's mean probability of the class and the background asked for, and of its first guess at the colour."""
    chances = {name: logits.softmax(1) for name, logits in probe(to_tensor(images)).items()}
    means = {name: chances[name].gather(1, _labels(scenes, name)[:, None]).mean() for name in ("kind", "background")}
    return {name: float(mean) for name, mean in {**means, "colour": chances["colour"].amax(1).mean()}.items()}


def generate(
    pipeline: DiffusionPipeline, prompts: list[str], *, steps: int = 25, batch: int = 24, seed: int = 0
) -> list[Image.Image]:
    """One image a prompt, image `i` from the generator seeded `seed + i`."""
    pipeline.set_progress_bar_config(disable=True)
    # A Stable Diffusion 3 appends as many tokens of its third encoder, which is silent in the toybox.
    length = {"max_sequence_length": MAX_LENGTH} if isinstance(pipeline, StableDiffusion3Pipeline) else {}
    images = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + j) for j in range(len(part))]
        images += pipeline(part, num_inference_steps=steps, guidance_scale=4.0, generator=generators, **length).images
    return images


def contact_sheet(images: list[Image.Image], columns: int) -> Image.Image:
    """Images in rows, two pixels apart."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + 2), (i // columns) * (height + 2)))
    return sheet


def check_base(base_dir: Path, count: int, count_open: int, work_dir: Path) -> dict[str, object]:
    """All measurements, also written to `check.json` in the base's folder; sheets of images to the work folder."""
    probe = load_probe() if PROBE_PATH.exists() else train_probe(work_dir)
    pipeline = DiffusionPipeline.from_pretrained(base_dir)
    pairs, open_pairs = prompted_scenes(count), open_scenes(count_open)
    images = generate(pipeline, [prompt for _, prompt in pairs])
    open_images = generate(pipeline, [prompt for _, prompt in open_pairs], seed=count)
    seen = read_images(probe, images)
    found = {
        name: sum(a == getattr(scene, name) for a, (scene, _) in zip(seen[name], pairs, strict=True)) / count
        for name in PROBED
    }
    confident = confidence(probe, open_images, [scene for scene, _ in open_pairs])
    report = {
        "probe_accuracy_on_renders": probe_accuracy(probe),
        "reconstruction_mse": round(reconstruction_error(pipeline), 5),
        "generated": count,
        "found_as_prompted": {name: round(share, 4) for name, share in found.items()},
        "generated_from_open_prompts": count_open,
        "confidence_on_open_prompts": {name: round(mean, 4) for name, mean in confident.items()},
    }
    work_dir.mkdir(parents=True, exist_ok=True)
    (Path(base_dir) / "check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, made in (("prompted", images), ("open", open_images)):
        contact_sheet(made[:120], 12).save(work_dir / f"{Path(base_dir).name}-{name}.png")
    return report
