"""LoRAs of families whose layers or encoders are of another kind."""

from __future__ import annotations

import pytest
from peft import PeftModel

from s2ft_diffusion import convert
from s2ft_diffusion.adapters.file import write_adapter
from s2ft_diffusion.dreambooth.base import plan_base
from s2ft_diffusion.dreambooth.settings import AdapterSettings, BaseSettings
from s2ft_diffusion.errors import InputError
from tests.families.pipelines import tiny
from tests.random_adapters import random_adapter


def test_peft_finds_both_of_stable_diffusion_3s_clips(tmp_path) -> None:
    pipe = tiny("StableDiffusion3Pipeline")
    models = {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    write_adapter(tmp_path / "a", random_adapter(models))
    convert.convert(tmp_path / "a", tmp_path / "peft", to="peft")
    for name, model in models.items():
        PeftModel.from_pretrained(model, tmp_path / "peft" / name)


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("SanaPipeline", "all", "conv_depth is a convolution in groups"),
        ("SanaPipeline", "attention", None),
        ("PixArtSigmaPipeline", "attention", "PixArtSigmaPipeline loads no LoRA"),
    ],
)
def test_a_lora_that_cannot_be_is_refused_before_training(saved, name, targets, said) -> None:
    base, adapter = BaseSettings(str(saved(name))), AdapterSettings(targets=targets, options={"n_frequency": 20})
    plan_base(base, adapter, None, 0)
    if said is None:
        plan_base(base, adapter, None, 0, lora=True)
    else:
        with pytest.raises(InputError, match=said):
            plan_base(base, adapter, None, 0, lora=True)
