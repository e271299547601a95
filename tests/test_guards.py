"""diffusers' own verbs beside S2FT: each takes what is its own, and what is loaded last is what images show."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils.peft_utils import scale_lora_layers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextModel

from s2ft_diffusion import S2FTConfig, S2FTLayer, attention_targets
from tests.conftest import add, copy_of, generate, same_state, second_folder, state


@pytest.fixture
def lora(pipe, tmp_path):
    """A folder with a LoRA of the denoiser, and what the pipeline makes with it."""
    other = copy_of(pipe)
    torch.manual_seed(3)
    other.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k"], r=2, lora_alpha=2, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(other.unet))
    return tmp_path / "lora", generate(other)


def layers(pipe) -> list[S2FTLayer]:
    return [module for module in pipe.unet.modules() if isinstance(module, S2FTLayer)]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# Loaded last is active -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_first", [True, False])
def test_the_adapter_loaded_last_is_what_images_show(pipe, folder, lora, lora_first) -> None:
    loads = [
        (lambda: pipe.load_lora_weights(lora[0], adapter_name="style"), lora[1]),
        (lambda: pipe.load_s2ft_weights(folder[0], adapter_name="dog"), folder[1]),
    ]
    for load, expected in loads if lora_first else loads[::-1]:
        load()
        close(generate(pipe), expected)
    assert pipe.get_active_adapters() == (["dog"] if lora_first else ["style"])


@pytest.mark.parametrize("of_the_pipeline", [True, False])
def test_a_lora_loaded_into_a_model_alone(pipe, folder, lora, of_the_pipeline) -> None:
    pipe.load_s2ft_weights(folder[0], adapter_name="dog")
    if of_the_pipeline:
        pipe.load_lora_into_unet(pipe.lora_state_dict(lora[0])[0], None, pipe.unet, adapter_name="style")
    else:
        pipe.unet.load_lora_adapter(lora[0] / "pytorch_lora_weights.safetensors", prefix="unet", adapter_name="style")
    close(generate(pipe), lora[1])
    assert pipe.get_active_adapters() == ["style"]


def test_a_lora_loaded_into_a_text_encoder_alone(pipe) -> None:
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    pipe.text_encoder.add_adapter(config, "style")
    loaded = {"adapter_state_dict": get_peft_model_state_dict(pipe.text_encoder, adapter_name="style")}
    expected = generate(pipe)
    pipe.unload_lora_weights()
    add(pipe, "dog", text=True)
    pipe.unet.delete_adapters("dog")
    pipe.text_encoder.load_adapter(**loaded, peft_config=config, adapter_name="style")
    close(generate(pipe), expected)
    assert pipe.get_active_adapters() == ["style"]


def test_models_may_differ_in_what_is_active(pipe, folder, lora, tmp_path) -> None:
    other = copy_of(pipe)
    add(other, "words", text=True)
    other.unet.delete_adapters("words")
    other.save_s2ft_weights(tmp_path / "words")
    other.unload_s2ft_weights()
    pipe.load_s2ft_weights(folder[0], adapter_name="dog")
    pipe.load_s2ft_weights(tmp_path / "words", adapter_name="words")
    assert pipe.get_active_adapters() == ["words"]
    pipe.unet.load_lora_adapter(lora[0] / "pytorch_lora_weights.safetensors", prefix="unet", adapter_name="style")
    assert pipe.get_active_adapters() == ["style", "words"]
    pipe.unet.unload_lora()
    assert pipe.get_active_adapters() == ["dog", "words"]
    pipe.delete_adapters("dog")
    assert pipe.get_active_adapters() == ["words"]
    pipe.unload_s2ft_weights()
    assert pipe.get_active_adapters() == []


def test_loading_switches_adapters_on(pipe, folder, tmp_path) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(second_folder(copy_of(pipe), tmp_path))
    pipe.disable_lora()
    pipe.load_s2ft_weights(path)
    assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize("verb", [lambda p: p.set_adapters("s2ft_0", 0.5), lambda p: p.enable_lora()])
def test_what_was_loaded_stays_frozen(pipe, folder, tmp_path, verb) -> None:
    pipe.load_s2ft_weights(folder[0])
    add(pipe, "trained", seed=1)
    pipe.set_adapters(["s2ft_0", "trained"])
    verb(pipe)
    trainable = {name for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}
    assert not any("s2ft_0" in name for name in trainable)
    pipe.set_adapters("trained")
    assert {p.requires_grad for n, p in pipe.unet.named_parameters() if "trained.coefficients" in n} == {True}
    pipe.unet.peft_config["s2ft_0"].inference_mode = False  # as the documentation says
    pipe.set_adapters("s2ft_0")
    assert {p.requires_grad for n, p in pipe.unet.named_parameters() if "s2ft_0.coefficients" in n} == {True}


# Tensors of inference mode -------------------------------------------------------------------------------------------


def test_loaded_under_inference_mode(pipe, folder, tmp_path) -> None:
    path, expected = folder
    second = second_folder(copy_of(pipe), tmp_path)
    with torch.inference_mode():
        pipe.load_s2ft_weights(path, adapter_name="a")
        assert torch.equal(generate(pipe), expected)
    pipe.set_adapters("a", 0.5)
    pipe.disable_lora()
    pipe.enable_lora()
    pipe.set_adapters("a")
    assert torch.equal(generate(pipe), expected)
    pipe.fuse_s2ft()
    pipe.unfuse_s2ft()
    assert pipe.save_s2ft_weights(tmp_path / "again").read_bytes() == next(path.iterdir()).read_bytes()
    with torch.inference_mode():
        pipe.load_s2ft_weights(second, adapter_name="a", hotswap=True)
    pipe.load_s2ft_weights(path, adapter_name="a", hotswap=True)
    assert torch.equal(generate(pipe), expected)


# Each takes its own --------------------------------------------------------------------------------------------------


def test_set_lora_device(pipe, folder, lora) -> None:
    pipe.load_lora_weights(lora[0], adapter_name="style")
    pipe.load_s2ft_weights(folder[0], adapter_name="dog")
    pipe.set_lora_device(["dog"], "meta")
    where = {parameter.device.type for layer in layers(pipe) for parameter in layer.s2ft_delta["dog"].parameters()}
    assert where == {"meta"}
    pipe.set_lora_device(["style"], "meta")
    pipe.delete_adapters("dog")
    pipe.set_lora_device(["style"], "meta")
    assert {p.device.type for n, p in pipe.unet.named_parameters() if "lora_" in n} == {"meta"}


@pytest.mark.parametrize("lora_first", [True, False])
def test_fusing_takes_its_own(pipe, folder, lora, lora_first) -> None:
    before = state(pipe)
    loads = [
        lambda: pipe.load_lora_weights(lora[0], adapter_name="style"),
        lambda: pipe.load_s2ft_weights(folder[0], adapter_name="dog"),
    ]
    for load in loads if lora_first else loads[::-1]:
        load()
    pipe.set_adapters(["dog", "style"])
    both = generate(pipe)
    pipe.fuse_lora()
    assert not any(layer.merged for layer in layers(pipe))
    assert pipe.fused_loras == {"style"}
    close(generate(pipe), both)
    pipe.fuse_s2ft()
    close(generate(pipe), both)
    pipe.unfuse_lora()
    assert all(layer.merged for layer in layers(pipe))
    close(generate(pipe), both)
    pipe.unfuse_s2ft()
    close(generate(pipe), both)
    with pytest.raises(ValueError, match="'dog' is an S2FT adapter; fuse it with fuse_s2ft"):
        pipe.fuse_lora(adapter_names=["dog"])
    with pytest.raises(ValueError, match="no S2FT adapter named 'style'"):
        pipe.fuse_s2ft(adapter_names=["style"])
    pipe.unload_s2ft_weights()
    close(generate(pipe), lora[1])
    pipe.unload_lora_weights()
    after = state(pipe)
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[name], tensor, atol=1e-5) for name, tensor in before.items())


def test_a_fused_scale_is_not_left_behind(pipe, folder, lora) -> None:
    pipe.load_lora_weights(lora[0], adapter_name="style")
    pipe.load_s2ft_weights(folder[0], adapter_name="dog")
    pipe.set_adapters(["dog", "style"], [1.0, 0.0])
    alone = generate(pipe)
    pipe.fuse_lora(lora_scale=0.5)
    close(generate(pipe), alone)


def test_a_second_adapter_beside_a_fused_one(pipe, folder, tmp_path) -> None:
    before = state(pipe)
    other = second_folder(copy_of(pipe), tmp_path)
    pipe.load_s2ft_weights(folder[0], adapter_name="a")
    pipe.load_s2ft_weights(other, adapter_name="b")
    pipe.set_adapters(["a", "b"])
    both = generate(pipe)
    pipe.fuse_s2ft(adapter_names="a")
    close(generate(pipe), both)
    pipe.delete_adapters("b")
    close(generate(pipe), folder[1])
    pipe.load_s2ft_weights(other, adapter_name="b")
    close(generate(pipe), both)
    with pytest.raises(ValueError, match=r"'a' is fused; call unfuse_s2ft\(\)"):
        pipe.load_s2ft_weights(other, adapter_name="a", hotswap=True)
    pipe.unfuse_s2ft()
    pipe.set_adapters("a")
    close(generate(pipe), folder[1])
    pipe.unload_s2ft_weights()
    assert same_state(pipe, before)


@pytest.mark.parametrize("lora_first", [True, False])
def test_deleting_the_active_adapter_makes_one_active_on_all_layers(pipe, folder, lora, tmp_path, lora_first) -> None:
    other = second_folder(copy_of(pipe), tmp_path)
    loads = [
        lambda: pipe.load_lora_weights(lora[0], adapter_name="style"),
        lambda: (pipe.load_s2ft_weights(other, adapter_name="cat"), pipe.load_s2ft_weights(folder[0], "dog")),
    ]
    for load in loads if lora_first else loads[::-1]:
        load()
    pipe.set_adapters("cat")
    pipe.delete_adapters("cat")
    assert pipe.get_active_adapters() == ["dog"]
    close(generate(pipe), folder[1])


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("removed", ["S2FT", "LoRAs", "the model's LoRAs"])
def test_what_is_left_after_unloading_is_active(pipe, folder, lora, removed, lora_first, both) -> None:
    loads = [
        lambda: pipe.load_lora_weights(lora[0], adapter_name="style"),
        lambda: pipe.load_s2ft_weights(folder[0], adapter_name="dog"),
    ]
    for load in loads if lora_first else loads[::-1]:
        load()
    if both:
        pipe.set_adapters(["dog", "style"])
    unload = {
        "S2FT": pipe.unload_s2ft_weights,
        "LoRAs": pipe.unload_lora_weights,
        "the model's LoRAs": pipe.unet.unload_lora,
    }
    unload[removed]()
    left, expected = ("style", lora[1]) if removed == "S2FT" else ("dog", folder[1])
    assert pipe.get_active_adapters() == [left]
    assert pipe.get_list_adapters() == {"unet": [left]}
    close(generate(pipe), expected)


def test_what_is_trained_is_trained_still(pipe, folder) -> None:
    pipe.load_s2ft_weights(folder[0], adapter_name="dog")
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], r=2), "trained")
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], r=2), "frozen")
    pipe.unet.set_adapter(["dog", "trained"])
    pipe.unload_s2ft_weights()
    flags = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters() if "lora_" in name}
    assert {flag for name, flag in flags.items() if "trained" in name} == {True}
    assert {flag for name, flag in flags.items() if "frozen" in name} == {False}


# What stays behind ---------------------------------------------------------------------------------------------------


def test_deleting_the_last_adapter_leaves_no_trace(pipe, folder, tmp_path) -> None:
    path, expected = folder
    before, base = state(pipe), generate(pipe)
    pipe.load_s2ft_weights(path)
    with pytest.raises(ValueError, match=r"S2FT adapters \(s2ft_0\).*unload_s2ft_weights\(\) first"):
        pipe.save_pretrained(tmp_path / "mixed")
    pipe.delete_adapters("s2ft_0")
    assert same_state(pipe, before)
    assert not any(isinstance(module, BaseTunerLayer) for module in pipe.unet.modules())
    pipe.save_pretrained(tmp_path / "base")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again), base)
    pipe.load_s2ft_weights(path)
    assert torch.equal(generate(pipe), expected)
    pipe.unet.delete_adapters("s2ft_0")
    assert same_state(pipe, before)


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_is_saved_without_adapters_alone(pipe, folder, tmp_path, fused) -> None:
    pipe.load_s2ft_weights(folder[0], adapter_name="dog")
    if fused:
        pipe.fuse_s2ft()
    with pytest.raises(ValueError, match=r"The model has S2FT adapters \(dog\).*unload_s2ft_weights\(\) first"):
        pipe.unet.save_pretrained(tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
    pipe.unload_s2ft_weights()
    pipe.unet.save_pretrained(tmp_path / "base")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in pipe.unet.state_dict().items())


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("of_the_pipeline", [True, False])
def test_layers_that_are_left_empty_are_not_saved(pipe, folder, lora, tmp_path, beside, of_the_pipeline) -> None:
    """diffusers leaves a LoRA's layers in the model when it is deleted; what it saves then is not read again."""
    before, base = state(pipe), generate(pipe)
    if beside:
        pipe.load_s2ft_weights(folder[0], adapter_name="dog")
    pipe.load_lora_weights(lora[0], adapter_name="style")
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"], r=2), "words")
    for name in ("dog", "style", "words") if beside else ("style", "words"):
        pipe.delete_adapters(name)
    if of_the_pipeline:
        pipe.save_pretrained(tmp_path / "base")
    else:
        for name in ("unet", "text_encoder"):
            getattr(pipe, name).save_pretrained(tmp_path / "base" / name)
    assert same_state(pipe, before)
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "base" / "unet")
    pipe.text_encoder = CLIPTextModel.from_pretrained(tmp_path / "base" / "text_encoder")
    assert same_state(pipe, before)
    assert torch.equal(generate(pipe), base)


def test_an_s2ft_adapter_is_not_saved_as_a_lora(pipe, folder, tmp_path) -> None:
    pipe.load_s2ft_weights(folder[0], adapter_name="dog")
    with pytest.raises(ValueError, match="'dog' is an S2FT adapter; save it with save_s2ft_weights"):
        pipe.unet.save_lora_adapter(tmp_path / "saved", adapter_name="dog")
    tensors = get_peft_model_state_dict(pipe.unet, adapter_name="dog")
    with pytest.raises(ValueError, match=r"an S2FT adapter's tensors; save it with save_s2ft_weights"):
        pipe.save_lora_weights(tmp_path / "saved", unet_lora_layers=tensors)
    assert not (tmp_path / "saved").exists()


def test_a_deleted_adapter_holds_no_memory(pipe, folder, tmp_path) -> None:
    pipe.load_s2ft_weights(folder[0], adapter_name="a")
    pipe.load_s2ft_weights(second_folder(copy_of(pipe), tmp_path), adapter_name="b")
    pipe.set_adapters(["a", "b"])
    generate(pipe)
    held = [weakref.ref(t) for layer in layers(pipe) for t in layer.s2ft_delta["a"].state_dict(keep_vars=True).values()]
    assert len(held) > len(layers(pipe))
    pipe.delete_adapters("a")
    gc.collect()
    assert not [ref for ref in held if ref() is not None]


def test_models_made_of_an_adapted_one(pipe, folder) -> None:
    pipe.load_s2ft_weights(folder[0])
    with pytest.raises(ValueError, match=r"ControlNetModel.from_unet copies .*unload_s2ft_weights\(\) first"):
        ControlNetModel.from_unet(pipe.unet)
    motion = MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8)
    with pytest.raises(ValueError, match=r"unload_s2ft_weights\(\) first"):
        AnimateDiffPipeline.from_pipe(pipe, motion_adapter=motion)
    pipe.unload_s2ft_weights()
    assert isinstance(ControlNetModel.from_unet(pipe.unet), ControlNetModel)


def test_a_failing_prompt_leaves_no_scale(pipe, tmp_path) -> None:
    add(pipe, text=True)
    pipe.save_s2ft_weights(tmp_path)
    pipe.unload_s2ft_weights()
    pipe.load_s2ft_weights(tmp_path)
    expected = generate(pipe)
    with pytest.raises(TypeError, match="negative_prompt"):
        generate(pipe, negative_prompt=5, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(generate(pipe), expected)


def test_a_failing_prompt_of_another_pipeline_leaves_no_scale(pipe) -> None:
    """One that shares the text encoder; the adapter was not loaded by either; and a class that came later."""
    add(pipe, text=True)
    expected = generate(pipe)

    class Later(StableDiffusionPipeline):
        def encode_prompt(self, *args, **kwargs):
            scale_lora_layers(self.text_encoder, 0.5)
            raise TypeError

    kinds = [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, Later]
    for kind in kinds:
        other = kind(**pipe.components, requires_safety_checker=False)
        with pytest.raises(TypeError):
            other.encode_prompt("a", "cpu", 1, True, negative_prompt=5, lora_scale=0.5)
        assert torch.equal(generate(pipe), expected), kind


def test_fusing_projections_of_a_class_that_somebody_decorates(pipe, folder) -> None:
    """A class that came later, whose method has a wrapper of its own."""
    calls = []

    def counted(original):
        @functools.wraps(original)
        def fuse_qkv_projections(self):
            calls.append(self)
            return original(self)

        return fuse_qkv_projections

    class Later(UNet2DConditionModel):
        @counted
        def fuse_qkv_projections(self):
            pass

    unet = Later.from_config(pipe.unet.config)
    unet.add_adapter(S2FTConfig(target_modules=["to_q"], n_frequency=20))
    with pytest.raises(ValueError, match=r"unfused S2FT adapter; call fuse_s2ft\(\)"):
        unet.fuse_qkv_projections()
    assert not calls
    unet.disable_adapters()
    unet.delete_adapters("default")
    unet.fuse_qkv_projections()
    assert calls == [unet]


# Better said ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "half", "keys", "weight.x", ""])
def test_names_that_modules_use(pipe, folder, name) -> None:
    before = state(pipe)
    with pytest.raises(ValueError, match="name"):
        pipe.load_s2ft_weights(folder[0], adapter_name=name)
    assert same_state(pipe, before)


@pytest.mark.parametrize("name", ["train", "half", "keys", "weight.x"])
@pytest.mark.parametrize("beside", [False, True])
def test_names_that_modules_use_for_a_new_adapter(pipe, name, beside) -> None:
    if beside:
        add(pipe, "one", text=True)
    before, expected = state(pipe), generate(pipe)
    for model in (pipe.unet, pipe.text_encoder):
        config = S2FTConfig(target_modules=attention_targets(model), n_frequency=30)
        with pytest.raises(ValueError, match="name"):
            model.add_adapter(config, name)
        with pytest.raises(ValueError, match="name"):
            get_peft_model(copy.deepcopy(model), config, adapter_name=name)
        assert list(getattr(model, "peft_config", {})) == (["one"] if beside else [])
    assert same_state(pipe, before)
    assert torch.equal(generate(pipe), expected)
    add(pipe, "good", text=True)  # a second try is like a first one
    assert not torch.equal(generate(pipe), expected)


def test_names_that_modules_use_in_a_peft_model(two_layers) -> None:
    config = S2FTConfig(target_modules=["first"], n_frequency=10)
    model = get_peft_model(two_layers, config, adapter_name="one")
    with pytest.raises(ValueError, match="'train' is a name that PyTorch's modules use themselves"):
        model.add_adapter("train", config)
    with pytest.raises(ValueError, match="'train' is a name that PyTorch's modules use themselves"):
        model.add_weighted_adapter(["one"], [1.0], "train")
    assert list(model.peft_config) == ["one"]


def test_a_denoiser_inside_a_peft_model(pipe, folder) -> None:
    path, expected = folder
    inner = pipe.unet
    pipe.unet = get_peft_model(inner, LoraConfig(target_modules=["to_q"], r=2))
    with pytest.raises(ValueError, match=r"unet is wrapped in a PeftModel.*pipe\.unet = pipe\.unet\.unload\(\)"):
        pipe.load_s2ft_weights(path)
    pipe.unet = pipe.unet.unload()
    pipe.load_s2ft_weights(path)
    assert torch.equal(generate(pipe), expected)
