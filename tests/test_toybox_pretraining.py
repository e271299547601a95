"""Pretraining of the embedded bases: every stage at a few steps, and what an interruption changes."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from s2ft_diffusion import toybox
from s2ft_diffusion.toybox.networks import to_tensor
from s2ft_diffusion.toybox.pretraining import Plan, pretrain, pretrain_further
from s2ft_diffusion.toybox.pretraining.autoencoder import cluttered
from s2ft_diffusion.toybox.pretraining.denoisers import encode_text
from s2ft_diffusion.toybox.pretraining.rendering import Renders
from s2ft_diffusion.toybox.tokenizer import build_tokenizer
from s2ft_diffusion.toybox.world import random_scene, render

CPU = torch.device("cpu")
TINY = Plan(
    scenes=12, autoencoder=2, autoencoder_batch=4, text=2, text_batch=4, unet=2, transformer=2, batch=2, captions=2,
    compile=False, every=1,
)  # fmt: skip


def weights(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    pretrain(folder, folder / "bases", TINY, CPU)
    return folder


@pytest.mark.slow
def test_both_bases_come_out_as_the_committed_ones_are_laid_out(trained) -> None:
    for kind, stages in (
        ("unet", ["autoencoder", "text_encoder", "unet"]),
        ("flow", ["autoencoder", "flow_text_encoder", "flow_text_encoder_2", "transformer"]),
    ):
        committed = toybox.base_path(kind)
        made = trained / "bases" / committed.name
        files = {path.relative_to(made): path for path in made.rglob("*") if path.is_file()}
        expected = {path.relative_to(committed): path for path in committed.rglob("*") if path.is_file()}
        assert files.keys() == expected.keys() - {Path("check.json")}
        for name, path in files.items():
            if name.suffix == ".safetensors":
                assert path.stat().st_size == pytest.approx(expected[name].stat().st_size, rel=0.01), name
        pipeline = DiffusionPipeline.from_pretrained(made)
        assert pipeline("a red mug", num_inference_steps=1).images[0].size == (64, 64)
        report = json.loads((made / "training.json").read_text())
        assert list(report["stages"]) == stages
        assert all(stage["steps"] == 2 and np.isfinite(stage["loss"]) for stage in report["stages"].values())
    vae = [trained / "bases" / name / "vae" for name in ("base", "flow")]
    assert weights(vae[0]) == weights(vae[1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "denoiser"), [("flow", "transformer"), ("base", "unet")])
def test_a_base_is_trained_on(trained, tmp_path, name, denoiser) -> None:
    start, output = trained / "bases" / name, tmp_path / "bases"
    pretrain_further(tmp_path, start, output, TINY, CPU)
    before, after = weights(start), weights(output)
    assert before.keys() == after.keys()
    changed = {file for file in before if before[file] != after[file]}
    assert changed == {f"{denoiser}/diffusion_pytorch_model.safetensors"}
    report = json.loads((output / "training.json").read_text())
    assert list(report["stages"]) == [denoiser]
    assert report["start"] == json.loads((start / "training.json").read_text())


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_uninterrupted_one(trained, tmp_path, monkeypatch) -> None:
    """Killed three times: after the first step of the autoencoder, of the U-Net and of the transformer."""
    for name in ("pictures.npy", "ids.npy", "attributes.npy", "done.npy"):
        shutil.copy(trained / name, tmp_path / name)
    save = torch.save
    for last in ("autoencoder.tmp", "unet.tmp", "transformer.tmp"):

        def interrupted(state, path, last=last) -> None:
            save(state, path)
            if path.name == last:
                path.replace(path.with_suffix(".pt"))
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pretrain(tmp_path, tmp_path / "bases", TINY, CPU)
    pretrain(tmp_path, tmp_path / "bases", TINY, CPU)
    assert weights(tmp_path / "bases") == weights(trained / "bases")


@pytest.mark.slow
def test_renders_are_the_scenes_and_are_not_made_twice(tmp_path) -> None:
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    with Renders(tmp_path, 12, 1, captions=3) as renders:
        renders.wait_for(12)
        pictures = renders.pictures(torch.tensor([7, 0]))
        assert np.array_equal(pictures[0], np.asarray(render(random_scene(random.Random(7)))))
        ids, attributes = renders.captions(CPU)
    assert ids.shape == (12, 3, 32)
    assert attributes.shape == (12, 3, 5)
    assert all(text.split() for text in tokenizer.batch_decode(ids[:, 0], skip_special_tokens=True) if text)
    stamp = (tmp_path / "pictures.npy").stat().st_mtime_ns
    with Renders(tmp_path, 12, 1, captions=3) as again:
        again.wait_for(12)
        assert torch.equal(again.captions(CPU)[0], ids)
    assert (tmp_path / "pictures.npy").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_what_goes_wrong_in_rendering_is_raised(tmp_path) -> None:
    with Renders(tmp_path, 12, 1) as renders, pytest.raises(Exception, match="tokenizer"):
        renders.wait_for(12)


def test_clutter_is_on_the_first_quarter_alone() -> None:
    pictures = to_tensor([render(random_scene(random.Random(i))) for i in range(8)])
    made = cluttered(pictures, torch.Generator().manual_seed(0))
    assert torch.equal(made[2:], pictures[2:])
    assert ((made[:2] - pictures[:2]).abs().amax(dim=(1, 2, 3)) > 0.2).all()
    assert made.abs().max() <= 1


def test_text_is_encoded_as_the_pipeline_encodes_it() -> None:
    pipe = DiffusionPipeline.from_pretrained(toybox.base_path("flow"))
    prompt = "a photo of a red mug in the snow"
    ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    context, pooled = encode_text([pipe.text_encoder, pipe.text_encoder_2], ids, 32)
    expected, _, expected_pooled, _ = pipe.encode_prompt(
        prompt, prompt, prompt, max_sequence_length=32, do_classifier_free_guidance=False
    )
    # bfloat16 in training, float32 in the pipeline
    torch.testing.assert_close(context.float(), expected, rtol=0.05, atol=0.15)
    torch.testing.assert_close(pooled.float(), expected_pooled, rtol=0.05, atol=0.15)
