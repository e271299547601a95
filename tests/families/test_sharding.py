"""A base that two processes share out trains as one process's, sample images and what goes on from a checkpoint too."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from s2ft_diffusion import read_adapter
from s2ft_diffusion.adapters.file import WEIGHTS_NAME
from tests.conftest import assert_trained_alike
from tests.families.test_family_training import flags
from tests.training_process import arguments, train, train_two


def say_shares() -> None:
    """In a training's process: have it say what it holds of the denoiser, once that is shared out.

    Accelerate takes no shared weights into plain data parallelism on accelerators, where this does not run.
    """
    from accelerate import Accelerator

    import train_dreambooth_s2ft as recipe

    shard, prepare_model = recipe.shard_blocks, Accelerator.prepare_model

    def prepare_whole(self, model, *args, **more):
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        return prepare_model(self, model, *args, **more)

    Accelerator.prepare_model = prepare_whole

    def shard_and_say(denoiser, device) -> None:
        before = sum(p.numel() for p in denoiser.parameters())
        shard(denoiser, device)
        assert all(isinstance(p, DTensor) for p in denoiser.parameters())
        held = sum(p.to_local().numel() for p in denoiser.parameters())
        print(f"process {dist.get_rank()} holds {held / before:.2f}", flush=True)

    recipe.shard_blocks = shard_and_say


def placed(base) -> tuple[str, ...]:
    """Without what hangs on the last bits of a prior."""
    return flags(
        base, "--learning_rate", "1e-3", "--estimate", "scaled", "--rearrange", "none", "--sampling", "low_frequency",
        "--gradient_checkpointing",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionPipeline"])
def test_two_processes_that_share_the_base_equal_one(saved, photos, tmp_path, name) -> None:
    more = placed(saved(name))
    train(arguments(photos, tmp_path / "one", *more, "--train_batch_size", "2"), tmp_path / "log")
    train_two(arguments(photos, tmp_path / "two", *more, "--shard"), tmp_path / "log", say_shares)
    for rank in range(2):
        assert f"process {rank} holds 0.5" in (tmp_path / f"log.{rank}").read_text()
    one, shared = (read_adapter(tmp_path / folder / WEIGHTS_NAME) for folder in ("one", "two"))
    assert_trained_alike(shared, one)


@pytest.mark.slow
def test_sample_images_and_what_goes_on_from_a_checkpoint(saved, photos, tmp_path) -> None:
    images = ("--validation_prompt", "a photo of sks dog", "--num_validation_images", "1")
    more = (*placed(saved("SanaPipeline")), *images, "--shard", "--checkpointing_steps", "2")
    shared = arguments(photos, tmp_path / "out", *more)
    train_two(shared, tmp_path / "log", say_shares)
    assert (tmp_path / "out" / "validation" / "final-0.png").exists()
    first = (tmp_path / "out" / WEIGHTS_NAME).read_bytes()
    (tmp_path / "out" / WEIGHTS_NAME).unlink()
    train_two([*shared, "--resume_from_checkpoint", "latest"], tmp_path / "log")
    assert "Resuming from" in (tmp_path / "log.0").read_text()
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == first
