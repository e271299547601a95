"""A training killed at random moments, again and again: what is resumed ends as what was never stopped, bit for bit.

    python -m tests.long.killing --moments 200

Trainings of a tiny base with checkpoints every other step (two are kept), class images and sample images. Half of the
moments lie anywhere in a run, half in the writing of a checkpoint. At the end of a run its adapter, class images,
sample images and what its last checkpoint holds are compared with those of a run that nobody stopped; then another one
begins from nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from s2ft_diffusion.adapters.file import WEIGHTS_NAME
from s2ft_diffusion.dreambooth.checkpoints import list_checkpoints, read_state
from s2ft_diffusion.families import Family
from s2ft_diffusion.toybox.subjects import write_photos
from tests.conftest import pipeline_of, tiny_modules
from tests.training_process import Training

STEPS = 12


def arguments(folder: Path, output: Path) -> list[str]:
    return [
        "--pretrained_model_name_or_path", str(folder / "base"), "--instance_dir", str(folder / "photos"),
        "--output_dir", str(output / "out"), "--max_train_steps", str(STEPS), "--checkpointing_steps", "2",
        "--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest", "--random_flip",
        "--targets", "qv", "--n_frequency", "200", "--estimate_draws", "1", "--lr_scheduler", "cosine",
        "--report_to", "none",
        "--with_prior_preservation", "--class_data_dir", str(output / "classes"), "--class_prompt", "a photo of a cat",
        "--num_class_images", "2", "--sample_batch_size", "1",
        "--validation_prompt", "a photo of sks cat", "--num_validation_images", "1", "--validation_epochs", "1",
    ]  # fmt: skip


def prepare(folder: Path) -> None:
    """The base and the photos that all runs are given."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
            attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        )  # fmt: skip
    pipeline_of({**tiny_modules(), "unet": unet}).save_pretrained(folder / "base")
    write_photos("mittens", folder / "photos")


def whole_run(folder: Path) -> tuple[float, dict[str, object]]:
    """The processor time of a run that nobody stops, in seconds, and its facts."""
    training, seconds = Training(arguments(folder, folder / "whole"), folder / "log", few_steps), [0.0]
    training.wait_until(lambda: seconds.append(training.seconds()))
    assert training.wait() == 0, training.said[-3000:]
    return max(filter(math.isfinite, seconds)), facts(folder / "whole")


def few_steps() -> None:
    """Class and sample images in a few steps: this is about when they are made."""
    usual = Family.sampling.__func__
    Family.sampling = classmethod(lambda family: replace(usual(family), steps=3))


def facts(output: Path) -> dict[str, object]:
    """All of a finished run that must not depend on how often it was stopped."""
    out = output / "out"
    pictures = [*sorted((output / "classes").iterdir()), *sorted((out / "validation").iterdir())]
    last = list_checkpoints(out)[-1]
    optimizer = torch.load(last / "optimizer.bin", weights_only=True)["state"]
    numbers = {f"{n}.{k}": value for n, state in optimizer.items() for k, value in state.items()}
    numbers |= load_file(last / WEIGHTS_NAME)
    files = [out / WEIGHTS_NAME, *pictures]
    return {
        **{str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        **{name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in numbers.items()},
        "checkpoints": sorted(path.name for path in list_checkpoints(out)),
        "losses": read_state(last).losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        whole, wanted = whole_run(folder)
        print(f"a run: {whole:.1f} s of processor time; {len(wanted)} facts are compared", flush=True)
        killed = runs = writing = 0
        while killed < args.moments:
            output = folder / "killed"
            out = output / "out"
            while True:
                training = Training(arguments(folder, output), folder / "log", few_steps)
                if draw.random() < 0.5:
                    moment = draw.uniform(0, whole)
                    training.wait_until(lambda training=training, moment=moment: training.seconds() > moment)
                else:
                    skip = draw.randrange(STEPS // 2)
                    before = {path.name for path in list_checkpoints(out)}
                    training.wait_until(
                        lambda out=out, before=before, skip=skip: (
                            any(out.glob(".checkpoint-*"))
                            and len({path.name for path in list_checkpoints(out)} - before) >= min(skip, 2)
                        )
                    )
                    time.sleep(draw.uniform(0, 0.03))
                if not training.running():
                    break
                halfway = any(out.glob(".checkpoint-*"))
                if training.kill() != -signal.SIGKILL:
                    break
                killed, writing = killed + 1, writing + halfway
                for path in list_checkpoints(out):
                    assert read_state(path).step == int(path.name.removeprefix("checkpoint-")), path
            assert training.wait() == 0, training.said[-3000:]
            found = facts(output)
            different = [name for name in wanted.keys() | found.keys() if found.get(name) != wanted.get(name)]
            assert not different, different
            shutil.rmtree(output)
            runs += 1
            print(f"{runs} runs, killed at {killed} moments, {writing} of them in a checkpoint: all equal", flush=True)


if __name__ == "__main__":
    main()
