"""Conditions with nothing in them, and the estimate of memory, for every family."""

from __future__ import annotations

import pytest
import torch

from s2ft_diffusion.dreambooth.base import load_base, plan_base
from s2ft_diffusion.dreambooth.memory import run_memory
from s2ft_diffusion.dreambooth.settings import AdapterSettings, BaseSettings, PhotoSettings, Settings
from tests.families.pipelines import COMPONENTS, SIDE

# CLIP's window, and that of the embedded base's tokenizer, which the tiny pipelines have.
TOKENS = {77: 32, 77 + 256: 32 + 256}
AS_LONG_AS_THE_PROMPT = ("QwenImagePipeline", "ZImagePipeline")


def plan_of(saved, name: str):
    settings = AdapterSettings(targets="blocks", options={"n_frequency": 0.2})
    return plan_base(BaseSettings(str(saved(name))), settings, SIDE.get(name, 16), 0)


@pytest.mark.parametrize("name", [name for name in COMPONENTS if name not in AS_LONG_AS_THE_PROMPT])
def test_blank_conditions_are_shaped_like_a_prompt(saved, name) -> None:
    plan = plan_of(saved, name)
    found = load_base(plan).encode_prompt("a photo of sks dog")
    blank = plan.family.blank_conditions(plan.base_configs)
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        key: tuple(TOKENS.get(size, size) for size in value.shape) for key, value in blank.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPONENTS)
def test_every_family_has_an_estimate(saved, name) -> None:
    plan = plan_of(saved, name)
    settings = Settings(photos=PhotoSettings(None, "dog", "a photo"), base=plan.settings)
    needed = run_memory(plan, settings, torch.bfloat16)
    assert all(size > 0 for size in needed.phases.values())
