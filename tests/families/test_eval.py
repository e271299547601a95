"""A comparison's training and images on every family, with the family's own defaults."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eval.generation import load_pipeline, make_images, picturing, read_images, sampling_for
from eval.methods import METHODS, s2ft
from eval.training import Run, held_out_loss, train
from s2ft_diffusion.families import FAMILIES
from tests.families.pipelines import COMPONENTS, SIDE

PROMPT = "a photo of sks dog"
LORA = next(method for method in METHODS if method.kind == "lora")
FIRST = "StableDiffusion3Pipeline"


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in COMPONENTS if name != FIRST)]
)
def test_a_cell(saved, photos, tmp_path, name) -> None:
    side = SIDE.get(name, 16)
    run = Run(str(saved(name)), photos, PROMPT, 0, 0.2, "blocks", steps=1, batch=2, resolution=side)
    method = s2ft("x", "x", 1e-2, estimate="gradient", estimate_draws=1, oversampling=1)
    trained = train(method, 1e-2, run)
    assert trained.weights is not None
    sampling = sampling_for(run.base, None, None, side)
    defaults = FAMILIES[name].sampling()
    assert (sampling.steps, sampling.guidance) == (defaults.steps, defaults.guidance)
    pipe = picturing(trained.base)
    made = []
    for folder, pipeline in (("adapter", pipe), ("base", load_pipeline(run.base, "cpu", pipe.dtype))):
        make_images(pipeline, tmp_path / folder, [(PROMPT, 0)], replace(sampling, steps=2), folder)
        made += read_images(tmp_path / folder, PROMPT, [0])
    assert made[0].size == (side, side)
    assert made[0].tobytes() != made[1].tobytes()


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "PixArtSigmaPipeline"])
def test_a_trial_of_another_method(saved, photos, name) -> None:
    held_out = ((sorted(photos.iterdir())[-1], "on grass"),)
    run = Run(str(saved(name)), photos, PROMPT, 0, 0.2, "blocks", steps=1, batch=2, resolution=16, held_out=held_out)
    assert held_out_loss(LORA, 1e-2, run) != 1.0
