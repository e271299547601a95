"""The embedded world and its base."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image, ImageChops

from s2ft_diffusion import toybox
from s2ft_diffusion.toybox.captions import UNSEEN_TOKEN, describe, random_caption, world_words
from s2ft_diffusion.toybox.check import (
    generate,
    load_probe,
    probe_accuracy,
    prompted_scenes,
    read_images,
    reconstruction_error,
)
from s2ft_diffusion.toybox.subjects import ALL_SUBJECTS, SUBJECTS, write_photos
from s2ft_diffusion.toybox.world import BACKGROUNDS, CLASSES, COLOURS, PATTERNS, Scene, random_scene, render
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def flow_pipe() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(toybox.base_path("flow"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_world_is_large_enough() -> None:
    assert len(CLASSES) >= 12
    assert len(BACKGROUNDS) >= 10
    assert len(COLOURS) >= 8
    assert len(PATTERNS) >= 4
    assert len(SUBJECTS) >= 12


def test_rendering_is_a_function_of_the_scene() -> None:
    scene = random_scene(random.Random(5))
    assert render(scene).tobytes() == render(scene).tobytes()
    assert render(scene).size == (64, 64)
    images = [render(random_scene(random.Random(i))) for i in range(200)]
    assert len({image.tobytes() for image in images}) == 200


@pytest.mark.parametrize("kind", CLASSES)
def test_every_attribute_shows(kind) -> None:
    scene = Scene(kind, "red", "plain", "beach")
    variants = [
        Scene(kind, "blue", "plain", "beach"),
        Scene(kind, "red", "striped", "beach"),
        Scene(kind, "red", "plain", "space"),
        Scene(kind, "red", "plain", "beach", wears="crown"),
        Scene(kind, "red", "plain", "beach", second_colour="green"),
        Scene(kind, "red", "plain", "beach", emblem="star"),
        Scene(kind, "red", "plain", "beach", accessory="flag"),
    ]
    for variant in variants:
        difference = np.asarray(ImageChops.difference(render(scene), render(variant)))
        assert (difference.max(axis=-1) > 40).sum() >= 25, variant


def test_captions_mention_a_part_of_what_is_shown() -> None:
    scene = Scene("mug", "red", "striped", "beach", wears="hat")
    assert describe(scene) == "a photo of a red striped mug wearing a hat on the beach"
    rng = random.Random(0)
    texts = {random_caption(scene, rng).text for _ in range(200)}
    assert len(texts) > 20
    known = set(world_words())
    assert all(set(text.split()) <= known for text in texts)
    assert UNSEEN_TOKEN not in known


def test_subjects_are_individuals_with_photos(tmp_path) -> None:
    looks = {(s.kind, s.colour, s.second_colour, s.emblem, s.accessory) for s in ALL_SUBJECTS.values()}
    assert len(looks) == len(ALL_SUBJECTS)
    for subject in ALL_SUBJECTS.values():
        assert len(subject.photos()) in (5, 6)
        assert len(set(subject.photo_backgrounds())) == len(subject.photo_backgrounds())
        assert len(subject.prompts()) >= 6
        assert all(UNSEEN_TOKEN in prompt for prompt in subject.prompts())
        assert len(subject.captions()) == len(subject.photos())
    with pytest.raises(KeyError):
        write_photos("nobody", tmp_path)
    first = write_photos("widget", tmp_path, captions=True)[0]
    assert first.with_suffix(".txt").read_text().strip() == "a photo of sks robot in space"


@pytest.mark.slow
def test_photos_by_the_command_line(tmp_path) -> None:
    command = [sys.executable, "-m", "s2ft_diffusion.toybox", "render", "mittens", str(tmp_path / "m")]
    assert "6 photos" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sorted(p.suffix for p in (tmp_path / "m").iterdir()) == [".png"] * 6


def test_a_subject_is_drawn_as_a_prompt_wants_it() -> None:
    mittens, rng = SUBJECTS["mittens"], random.Random(0)
    wanted = {
        "a photo of cat in the snow": {"background": "snow", "colour": "blue", "wears": None},
        "a photo of cat wearing a hat on the beach": {"background": "beach", "colour": "blue", "wears": "hat"},
        "a photo of a red cat at sunset": {"background": "sunset", "colour": "red", "wears": None},
        "a photo of a purple cat": {"colour": "purple", "wears": None},
    }
    for prompt, shown in wanted.items():
        scene = mittens.prompted_scene(prompt, rng)
        assert {name: getattr(scene, name) for name in shown} == shown
        assert (scene.kind, scene.emblem, scene.accessory) == ("cat", "star", "flag")
        pictures = mittens.drawn(prompt, 2)
        assert [p.tobytes() for p in pictures] == [p.tobytes() for p in mittens.drawn(prompt, 2)]
        assert pictures[0].tobytes() != pictures[1].tobytes()


def test_any_prompt_tokenizes(toybox_pipe) -> None:
    tokenizer = toybox_pipe.tokenizer
    for word in [*world_words(), UNSEEN_TOKEN]:
        assert len(tokenizer.tokenize(word)) == 1, word
    for prompt in ("", "Xylophone, 42!", "straße 猫 \N{GRINNING FACE}", "a " * 200):
        ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids
        assert len(ids) == tokenizer.model_max_length
        assert max(ids) < toybox_pipe.text_encoder.config.vocab_size


def test_names_of_bases() -> None:
    assert toybox.resolve("toybox") == str(toybox.base_path()) == str(toybox.base_path("unet"))
    assert toybox.resolve("toybox-flow") == str(toybox.base_path("flow"))
    assert toybox.resolve("owner/model") == "owner/model"
    assert toybox.resolve(toybox.base_path("flow")) == str(toybox.base_path("flow"))
    assert toybox.is_embedded("toybox-flow")
    assert not toybox.is_embedded(toybox.base_path())
    with pytest.raises(ValueError, match="'transformer'; it is one of 'unet', 'flow'"):
        toybox.base_path("transformer")


def test_the_bases_are_small_safe_and_share_their_autoencoder() -> None:
    folders = [toybox.base_path(kind) for kind in ("unet", "flow")]
    for folder in folders:
        files = [p for p in folder.rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) <= 32 * 2**20
        assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
        assert {"check.json", "training.json"} <= {p.name for p in files}
    # diffusers takes no component from outside a pipeline's folder; equal files are one object in git.
    for file in ("vae/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/tokenizer.json"):
        assert len({(folder / file).read_bytes() for folder in folders}) == 1


def test_the_flow_base_is_a_stable_diffusion_3(flow_pipe) -> None:
    names = {
        "vae": "AutoencoderKL",
        "transformer": "SD3Transformer2DModel",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    assert {name: type(getattr(flow_pipe, name)).__name__ for name in names} == names
    models = [flow_pipe.components[name] for name in names if name != "scheduler"]
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    image = flow_pipe("a red mug", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_the_base_is_a_stable_diffusion() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(toybox.base_path())
    names = ["AutoencoderKL", "CLIPTextModel", "CLIPTokenizer", "UNet2DConditionModel"]
    parts = [pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.unet]
    assert [type(part).__name__ for part in parts] == names
    assert {p.dtype for part in (parts[0], parts[1], parts[3]) for p in part.parameters()} == {torch.float32}
    assert min(m.to_q.out_features for m in pipeline.unet.modules() if hasattr(m, "to_q")) >= 128
    image = pipeline("a red mug", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


class TestQuality:
    """The committed measurements hold, measured again on fewer images."""

    @pytest.mark.parametrize("kind", ["unet", "flow"])
    def test_committed_report(self, kind) -> None:
        report = json.loads((toybox.base_path(kind) / "check.json").read_text())
        assert report["generated"] >= 240
        assert min(report["probe_accuracy_on_renders"].values()) >= 0.98
        found = report["found_as_prompted"]
        assert min(found.values()) >= 0.98

    def test_probe(self) -> None:
        assert min(probe_accuracy(load_probe(), 500).values()) >= 0.98

    def test_probe_sees_nothing_in_noise(self) -> None:
        """A probe that always answers the same would pass nothing: on noise it is no better than chance."""
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(60)]
        seen = read_images(load_probe(), images)
        pairs = prompted_scenes(60)
        assert sum(a == s.kind for a, (s, _) in zip(seen["kind"], pairs, strict=True)) < 25

    @pytest.mark.slow
    def test_reconstruction(self, toybox_pipe) -> None:
        assert reconstruction_error(toybox_pipe, 100) < 0.012

    @pytest.mark.parametrize("base", ["toybox_pipe", "flow_pipe"])
    @pytest.mark.slow
    def test_prompts_are_followed(self, base, request) -> None:
        pairs = prompted_scenes(24)
        images = generate(request.getfixturevalue(base), [prompt for _, prompt in pairs], steps=10)
        seen = read_images(load_probe(), images)
        right = {
            name: sum(a == getattr(s, name) for a, (s, _) in zip(seen[name], pairs, strict=True)) / len(pairs)
            for name in seen
        }
        assert min(right.values()) >= 0.9, right  # nearly all of 240 are right
