"""The embedded world's encoders are valid metrics."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import ViTModel

pytest.importorskip("open_clip")

from eval.toybox import DINO_FOLDER
from eval.toybox.pretrain import random_individual, to_batch, train_clip, train_dino, views_of
from s2ft_diffusion.toybox.subjects import SUBJECTS
from s2ft_diffusion.toybox.world import render


def test_dino_tells_individuals_of_one_class_apart() -> None:
    """Pairs of photos of one subject against pairs with others of its class: the area under the ROC curve."""
    model = ViTModel.from_pretrained(DINO_FOLDER, add_pooling_layer=False).float().eval()

    @torch.no_grad()
    def features(images: list) -> torch.Tensor:
        found = model(to_batch(np.stack([np.asarray(image) for image in images]))).last_hidden_state[:, 0]
        return torch.nn.functional.normalize(found, dim=-1)

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


@pytest.mark.parametrize(("train", "count"), [(train_dino, 120), (train_clip, 12)])
def test_training_goes_on_where_it_stopped(train, count, tmp_path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    expected = train(once, 2, count, batch=6).state_dict()
    train(twice, 1, count, batch=6)
    found = train(twice, 2, count, batch=6).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
