"""The embedded world's encoders are valid metrics, and others are loaded or refused by name."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

pytest.importorskip("open_clip")

from eval.encoders import EncoderError, Encoders, FeatureCache, load_encoders
from eval.toybox import CLIP_FOLDER, DINO_FOLDER
from eval.toybox.pretrain import HELD_OUT, random_individual, train_clip, train_dino, views_of
from s2ft_diffusion.toybox.captions import describe
from s2ft_diffusion.toybox.subjects import SUBJECTS
from s2ft_diffusion.toybox.world import random_scene, render


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return load_encoders("toybox", "toybox", "toybox")


def test_dino_tells_individuals_of_one_class_apart(encoders) -> None:
    """Pairs of photos of one subject against pairs with others of its class: the area under the ROC curve."""
    features = encoders.dino.images
    same, other = [], []
    for subject in SUBJECTS.values():
        own = features(subject.photos())
        same += (own @ own.T)[tuple(torch.triu_indices(len(own), len(own), 1))].tolist()
        rng, others = random.Random(subject.name), []
        while len(others) < 20:
            individual = random_individual(rng)
            if individual.kind == subject.kind:
                others += [render(scene) for scene in views_of(individual, rng, 1)]
        other += (own @ features(others).T).flatten().tolist()
    same, other = np.array(same)[:, None], np.array(other)[None]
    assert (same > other).mean() + 0.5 * (same == other).mean() >= 0.95


@pytest.mark.slow
def test_clip_finds_the_caption_of_a_picture(encoders) -> None:
    """Among 100 captions of different scenes, that of the picture, ten times over; scenes it was not trained on."""
    right = 0
    for trial in range(10):
        rng, scenes = random.Random(HELD_OUT + trial), {}
        while len(scenes) < 100:
            scene = random_scene(rng)
            scenes.setdefault(describe(scene), scene)
        found = encoders.clip.images([render(scene) for scene in scenes.values()]) @ encoders.clip.texts(list(scenes)).T
        right += int((found.argmax(dim=1) == torch.arange(100)).sum())
    assert right >= 900


@pytest.mark.slow
def test_lpips_grows_with_every_distortion(encoders) -> None:
    """More of a distortion is further away, and another picture of the subject further than a little noise."""
    photos = [photo for subject in SUBJECTS.values() for photo in subject.photos()[:2]]
    noise = torch.randn(64, 64, 3, generator=torch.Generator().manual_seed(0)).numpy()
    distortions = {
        "blur": lambda image, much: image.filter(ImageFilter.GaussianBlur(much)),
        "noise": lambda image, much: Image.fromarray(
            (np.asarray(image) + 12 * much * noise).clip(0, 255).astype(np.uint8)
        ),
        "shift": lambda image, much: ImageChops.offset(image, int(3 * much), 0),
        "colour": lambda image, much: ImageEnhance.Color(image).enhance(1 - 0.2 * much),
    }
    for name, distort in distortions.items():
        steps = [float(encoders.lpips(photos, [distort(p, much) for p in photos]).mean()) for much in (0.5, 1, 2, 4)]
        assert steps == sorted(steps), name
        assert steps[0] > 0, name
    assert float(encoders.lpips(photos, photos).max()) == 0
    pairs = encoders.lpips(photos[::2], photos[1::2]).mean()
    assert pairs > encoders.lpips(photos, [distortions["noise"](p, 1) for p in photos]).mean()


def test_matrix_of_distances(encoders) -> None:
    photos = SUBJECTS["mittens"].photos()[:3]
    matrix = encoders.lpips.among(photos)
    assert matrix.shape == (3, 3)
    assert torch.equal(matrix, matrix.T)
    assert not matrix.diagonal().any()
    torch.testing.assert_close(matrix[0, 2], encoders.lpips(photos[:1], photos[2:])[0])


def test_features_are_kept_by_content(encoders, tmp_path) -> None:
    photos, calls = SUBJECTS["mittens"].photos(), []

    def encode(images: list) -> torch.Tensor:
        calls.append(len(images))
        return encoders.dino._in_batches(images)

    cache = FeatureCache(tmp_path)
    first = cache(encoders.dino.key, photos[:3], encode)
    again = cache(encoders.dino.key, [photos[2].copy(), photos[5], photos[0]], encode)
    assert calls == [3, 1]
    assert torch.equal(again[2], first[0])
    assert torch.equal(again[0], first[2])
    cache("another", photos[:1], encode)
    assert calls == [3, 1, 1]
    assert encoders.dino.key != encoders.clip.key


def test_an_encoder_does_not_depend_on_the_batch(encoders) -> None:
    photos = SUBJECTS["mittens"].photos()
    small = load_encoders("toybox", "toybox", "toybox", batch_size=2)
    for one, other in ((encoders.dino, small.dino), (encoders.clip, small.clip)):
        torch.testing.assert_close(one.images(photos), other.images(photos), rtol=1e-4, atol=1e-5)


def test_folders_are_taken_as_names_are() -> None:
    found = load_encoders(str(DINO_FOLDER), str(CLIP_FOLDER), "toybox")
    assert found.names == {"dino": str(DINO_FOLDER), "clip": str(CLIP_FOLDER), "lpips": found.lpips.name}
    assert "unweighted" in found.lpips.name


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("no-such/vit", "toybox", "toybox"), "DINO encoder 'no-such/vit'.*--dino"),
        (("toybox", "ViT-B-32/no-such-weights", "toybox"), "CLIP encoder 'ViT-B-32/no-such-weights'.*--clip"),
        (("toybox", "no-such-architecture/openai", "toybox"), "CLIP encoder.*--clip"),
        (("toybox", "toybox", "resnet"), "no LPIPS network 'resnet'.*--lpips"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_named(names, said, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EncoderError, match=said):
        load_encoders(*names)


def test_they_are_small() -> None:
    files = [*DINO_FOLDER.iterdir(), *CLIP_FOLDER.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20


@pytest.mark.parametrize(("train", "count"), [(train_dino, 120), (train_clip, 12)])
@pytest.mark.slow
def test_training_goes_on_where_it_stopped(train, count, tmp_path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    expected = train(once, 2, count, batch=6).state_dict()
    train(twice, 1, count, batch=6)
    found = train(twice, 2, count, batch=6).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
