"""The real architecture: train on a pipeline with Stable Diffusion 1.5's shapes and random weights.

    python -m benchmarks.stable_diffusion_shape --json docs/results/stable-diffusion-shape.json

Builds the pipeline from configs (no download, 4.1 GB on disk for the time of the run), runs the trainer by its command
line for a few steps, and reports layers, trainable numbers, file size, seconds by phase and peak memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from s2ft_diffusion import read_header, toybox
from s2ft_diffusion.toybox.subjects import write_photos

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path) -> None:
    """A pipeline with SD 1.5's shapes; the tokenizer is the toybox's, whose vocabulary is smaller."""
    torch.manual_seed(0)
    channels = (128, 256, 512, 512)
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
        vae=AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ),
        tokenizer=CLIPTokenizer.from_pretrained(toybox.base_path() / "tokenizer"),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        base, photos, output = (Path(folder) / name for name in ("base", "photos", "out"))
        # In a process of its own: what this one has in memory would count as the trainer's.
        building = multiprocessing.get_context("spawn").Process(target=build, args=(base,))
        building.start()
        building.join()
        if building.exitcode:
            sys.exit(building.exitcode)
        write_photos("mittens", photos)
        for extra in sorted(photos.iterdir())[2:]:
            extra.unlink()
        command = [
            sys.executable,
            str(ROOT / "train_dreambooth_s2ft.py"),
            *("--pretrained_model_name_or_path", str(base), "--instance_dir", str(photos), "--output_dir", str(output)),
            *("--instance_prompt", "a photo of sks cat", "--resolution", str(args.resolution)),
            *("--max_train_steps", str(args.steps), "--n_frequency", "8000", "--targets", "qv"),
            *("--estimate_draws", "1", "--adapter_dtype", "float16", "--report_to", "none", *flags),
        ]
        process = subprocess.Popen(command, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(os.waitstatus_to_exitcode(status))
        shutil.rmtree(base)
        training = json.loads((output / "training.json").read_text(encoding="utf-8"))
        header = read_header(training["adapter"])
    report = {
        "layers": len(header.shapes["unet"]),
        "trainable": training["trainable"],
        "share": training["share"],
        "adapter_bytes": training["adapter_bytes"],
        "seconds": training["seconds"],
        "peak_memory_mb": round(usage.ru_maxrss / 1024),
        "resolution": args.resolution,
        "steps": args.steps,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
