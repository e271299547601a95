"""Every family by the trainer's command: photos to a file, the file to an image; the recipe knows none by name."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

import train_dreambooth_s2ft as recipe
from s2ft_diffusion import AdapterFileError, read_adapter
from s2ft_diffusion.families import FAMILIES
from tests.conftest import assert_trained_alike
from tests.families.pipelines import COMPONENTS, SIDE
from tests.training_process import Training, arguments, train, train_here, train_two

ALL = list(COMPONENTS)
SAMPLED = ("Flux2KleinPipeline",)  # by fifty steps: one is enough, how each is called is tested with `eval`


def flags(base: Path, *more: str) -> tuple[str, ...]:
    side = str(SIDE.get(base.name, 16))
    return (
        "--pretrained_model_name_or_path", str(base), "--targets", "blocks", "--n_frequency", "0.2", "--estimate",
        "gradient", "--resolution", side, "--max_train_steps", "3", "--learning_rate", "5e-2", *more,
    )  # fmt: skip


def load(base: Path) -> diffusers.DiffusionPipeline:
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def picture(pipe: diffusers.DiffusionPipeline, side: int) -> torch.Tensor:
    options = FAMILIES[type(pipe).__name__].call(steps=2, side=side)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(prompt="a photo of sks dog", generator=generator, output_type="pt", **options).images)


@pytest.mark.parametrize("name", ALL)
def test_photos_to_a_file_to_an_image(saved, photos, tmp_path, name) -> None:
    base = saved(name)
    side = SIDE.get(name, 16)
    sampling = ("--validation_prompt", "a photo of sks dog", "--num_validation_images", "1") if name in SAMPLED else ()
    path = train_here(photos, tmp_path / "out", *flags(base, "--gradient_checkpointing", *sampling))
    adapter = read_adapter(path)
    assert any(bool(layer.coefficients.any()) for layers in adapter.layers.values() for layer in layers.values())
    assert (tmp_path / "out" / "validation" / "final-0.png").exists() == (name in SAMPLED)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"from_pretrained({str(base)!r})" in card
    pipe = load(base)
    before = picture(pipe, side)
    weights = {n: p.clone() for n, p in getattr(pipe, FAMILIES[name].denoiser).named_parameters()}
    pipe.load_s2ft_weights(path, adapter_name="default")
    adapted = picture(pipe, side)
    assert not torch.equal(adapted, before)
    pipe.set_adapters("default", 0.0)
    torch.testing.assert_close(picture(pipe, side), before, rtol=0, atol=1e-5)  # a convolution may take another path
    pipe.set_adapters("default", 1.0)
    assert torch.equal(picture(pipe, side), adapted)
    pipe.fuse_s2ft()
    torch.testing.assert_close(picture(pipe, side), adapted, rtol=0, atol=2e-2)
    pipe.unfuse_s2ft()
    assert torch.equal(picture(pipe, side), adapted)
    pipe.unload_s2ft_weights()
    after = dict(getattr(pipe, FAMILIES[name].denoiser).named_parameters())
    assert all(torch.equal(after[n], value) for n, value in weights.items())
    other = load(saved("StableDiffusionPipeline" if name != "StableDiffusionPipeline" else "StableDiffusionXLPipeline"))
    with pytest.raises(AdapterFileError, match=r"transformer|this model has"):
        other.load_s2ft_weights(path)


@pytest.mark.slow
def test_verbs_of_a_pipeline_that_takes_no_lora(saved, photos, tmp_path) -> None:
    base = saved("PixArtSigmaPipeline")
    paths = [train_here(photos, tmp_path / seed, *flags(base, "--seed", seed)) for seed in ("0", "1")]
    pipe = load(base)
    before, alone = picture(pipe, 16), []
    for name, path in zip("ab", paths, strict=True):
        pipe.load_s2ft_weights(path, adapter_name=name)
        assert pipe.get_active_adapters() == [name]
        alone.append(picture(pipe, 16))
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    pipe.set_adapters(["a", "b"], [1.0, 0.0])
    torch.testing.assert_close(picture(pipe, 16), alone[0], rtol=0, atol=1e-5)
    pipe.set_adapters("b")
    assert torch.equal(picture(pipe, 16), alone[1])
    pipe.disable_lora()
    assert torch.equal(picture(pipe, 16), before)
    pipe.enable_lora()
    assert torch.equal(picture(pipe, 16), alone[1])
    with pytest.raises(ValueError, match="no adapter named 'c'; the pipeline has"):
        pipe.set_adapters(["a", "c"])
    with pytest.raises(ValueError, match="1 weights for the adapters"):
        pipe.set_adapters(["a", "b"], [1.0])
    pipe.delete_adapters("b")
    assert pipe.get_list_adapters() == {"transformer": ["a"]}
    assert torch.equal(picture(pipe, 16), alone[0])
    pipe.delete_adapters("a")
    assert pipe.get_list_adapters() == {}
    assert torch.equal(picture(pipe, 16), before)


@pytest.mark.parametrize(
    "name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]
)  # fmt: skip
def test_text_encoders_are_trained(saved, photos, tmp_path, name) -> None:
    path = train_here(photos, tmp_path / "out", *flags(saved(name), "--train_text_encoder"))
    adapter = read_adapter(path)
    assert set(adapter.layers) == {FAMILIES[name].denoiser, *FAMILIES[name].trainable_text_encoders}
    for layers in adapter.layers.values():
        assert any(bool(layer.coefficients.any()) for layer in layers.values())
    load(saved(name)).load_s2ft_weights(path)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "QwenImagePipeline", "PixArtSigmaPipeline"])
def test_class_images_with_prompts_of_another_length(saved, photos, tmp_path, name) -> None:
    classes = ("--with_prior_preservation", "--class_data_dir", str(tmp_path / "classes"), "--class_prompt",
               "a photo of a dog, one of many more dogs", "--num_class_images", "2")  # fmt: skip
    train_here(photos, tmp_path / "out", *flags(saved(name), *classes))
    assert len(list((tmp_path / "classes").iterdir())) == 2


def test_layers_that_were_left_out_are_said(saved, photos, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    train_here(photos, tmp_path / "out", *flags(saved("QwenImagePipeline")))
    assert "left out" in caplog.text
    assert "transformer.transformer_blocks.1.attn.add_q_proj" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_killed_and_resumed_is_bit_identical(saved, photos, tmp_path, name) -> None:
    """In the order that weights are in: what a search for another ends with is the same for every family."""
    more = flags(
        saved(name), "--max_train_steps", "8", "--checkpointing_steps", "2", "--random_flip", "--rearrange", "none"
    )
    train(arguments(photos, tmp_path / "whole", *more), tmp_path / "log")
    killed = arguments(photos, tmp_path / "killed", *more, "--resume_from_checkpoint", "latest")
    training = Training(killed, tmp_path / "log")
    training.wait_until((tmp_path / "killed" / "checkpoint-2").exists)
    training.kill()
    assert (tmp_path / "killed" / "checkpoint-2").exists()
    train(killed, tmp_path / "log")
    name = recipe.WEIGHTS_NAME
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_two_processes_equal_one(saved, photos, tmp_path, name) -> None:
    """Without what hangs on the last bits of a prior: a search for orders may end elsewhere."""
    placed = ("--rearrange", "none", "--sampling", "low_frequency")
    encoders = FAMILIES[name].trainable_text_encoders
    texts = ("--train_text_encoder",) if encoders else ()
    more = flags(saved(name), "--learning_rate", "1e-3", *texts, *placed)
    train_two(arguments(photos, tmp_path / "two", *more), tmp_path / "log")
    train(arguments(photos, tmp_path / "one", *more, "--train_batch_size", "2"), tmp_path / "log")
    one, two = (read_adapter(tmp_path / folder / recipe.WEIGHTS_NAME) for folder in ("one", "two"))
    assert set(one.layers) == {FAMILIES[name].denoiser, *encoders}
    assert_trained_alike(two, one)
