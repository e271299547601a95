"""The pipeline verbs on the embedded base, beside everything diffusers does to a pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDPMPipeline,
    DiffusionPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from peft import get_peft_model, get_peft_model_state_dict
from PIL import Image

from s2ft_diffusion import AdapterFileError, S2FTConfig, S2FTLinear, attention_targets
from s2ft_diffusion.adapters.file import read_adapter, read_header
from s2ft_diffusion.tuner.delta import GridDelta
from tests.conftest import add, copy_of, generate, same_state, second_folder, state


def test_every_pipeline_has_the_verbs() -> None:
    for verb in ("load_s2ft_weights", "save_s2ft_weights", "unload_s2ft_weights", "fuse_s2ft", "unfuse_s2ft"):
        assert callable(getattr(DDPMPipeline, verb))


def test_load_save_unload_leaves_no_trace(pipe, folder, tmp_path) -> None:
    path, expected = folder
    before, base = state(pipe), generate(pipe)
    assert not torch.equal(base, expected)
    name = pipe.load_s2ft_weights(path)
    assert name == "s2ft_0"
    assert torch.equal(generate(pipe), expected)
    again = pipe.save_s2ft_weights(tmp_path / "again")
    assert again.read_bytes() == (path / again.name).read_bytes()
    pipe.unload_s2ft_weights()
    assert same_state(pipe, before)
    assert torch.equal(generate(pipe), base)
    assert not any("s2ft" in type(m).__module__ for m in pipe.unet.modules())
    assert not hasattr(pipe.unet, "peft_config")


def test_text_encoder_too(pipe, tmp_path) -> None:
    base = generate(pipe)
    add(pipe, text=True)
    expected = generate(pipe)
    pipe.save_s2ft_weights(tmp_path)
    pipe.unload_s2ft_weights()
    assert torch.equal(generate(pipe), base)
    pipe.load_s2ft_weights(tmp_path, adapter_name="a")
    assert torch.equal(generate(pipe), expected)
    assert pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]}


def test_from_a_state_dict_and_from_peft(pipe, folder, tmp_path) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path, adapter_name="a")
    weights = get_peft_model_state_dict(pipe.unet, adapter_name="a")
    config = pipe.unet.peft_config["a"]
    config.base_model_name_or_path = ""
    config.save_pretrained(tmp_path / "peft")
    from safetensors.torch import save_file

    save_file({f"base_model.model.{k}": v for k, v in weights.items()}, tmp_path / "peft" / "adapter_model.safetensors")
    weights = {k: v.clone() for k, v in weights.items()}
    pipe.unload_s2ft_weights()
    pipe.load_s2ft_weights(weights, config=config)
    assert torch.equal(generate(pipe), expected)
    pipe.unload_s2ft_weights()
    with pytest.raises(ValueError, match="config"):
        pipe.load_s2ft_weights(weights)
    pipe.load_s2ft_weights(tmp_path / "peft")
    assert torch.equal(generate(pipe), expected)


def test_fuse_and_unfuse(pipe, folder) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path)
    before = state(pipe)
    pipe.fuse_s2ft()
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="nobody"):
        pipe.fuse_s2ft(adapter_names=["nobody"])
    pipe.unfuse_s2ft()
    assert same_state(pipe, before)
    assert torch.equal(generate(pipe), expected)
    pipe.fuse_s2ft(0.5, safe_fusing=True)
    half = generate(pipe)
    pipe.unfuse_s2ft()
    pipe.set_adapters("s2ft_0", 0.5)
    torch.testing.assert_close(generate(pipe), half, rtol=1e-4, atol=1e-4)


def test_two_adapters_add_up(pipe, folder, tmp_path) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path, adapter_name="a")
    pipe.unload_s2ft_weights()
    pipe.load_s2ft_weights(path, adapter_name="a")
    pipe.load_s2ft_weights(second_folder(copy_of(pipe), tmp_path), adapter_name="b")
    assert pipe.get_active_adapters() == ["b"]  # as load_lora_weights does: the last; set_adapters activates more
    pipe.set_adapters("a")
    assert torch.equal(generate(pipe), expected)
    pipe.set_adapters(["a", "b"], [0.5, 2.0])
    layer = next(m for m in pipe.unet.modules() if isinstance(m, S2FTLinear))
    deltas = {n: layer.s2ft_delta[n].dense() for n in "ab"}
    hidden = torch.randn(3, layer.in_features)
    weight = layer.base_layer.weight + 2.0 * (0.5 * deltas["a"] + 2.0 * deltas["b"])
    torch.testing.assert_close(layer(hidden), torch.nn.functional.linear(hidden, weight), rtol=1e-4, atol=1e-4)
    pipe.delete_adapters("b")
    pipe.set_adapters("a")
    assert torch.equal(generate(pipe), expected)
    with pytest.raises(ValueError, match="already"):
        pipe.load_s2ft_weights(path, adapter_name="a")


def test_scale_zero_is_the_base(pipe, folder) -> None:
    path, expected = folder
    base = generate(pipe)
    pipe.load_s2ft_weights(path)
    pipe.set_adapters("s2ft_0", 0.7)
    weaker = generate(pipe)
    for scale in (0.0, 0.3, 1.0):
        generate(pipe, cross_attention_kwargs={"scale": scale})
        assert torch.equal(generate(pipe), weaker)  # a passing scale leaves no trace, 0 included
    assert torch.equal(generate(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    pipe.disable_lora()
    assert torch.equal(generate(pipe), base)
    pipe.enable_lora()
    assert torch.equal(generate(pipe), weaker)
    pipe.set_adapters("s2ft_0", 0.0)
    assert torch.equal(generate(pipe), base)
    pipe.set_adapters("s2ft_0", 1.0)
    assert torch.equal(generate(pipe), expected)


def test_deleting_a_fused_adapter_takes_it_out(pipe, folder) -> None:
    path, _ = folder
    before = state(pipe)
    pipe.load_s2ft_weights(path)
    pipe.fuse_s2ft()
    pipe.delete_adapters("s2ft_0")
    assert same_state(pipe, before)


def test_loading_into_fused_projections_is_refused(pipe, folder) -> None:
    path, _ = folder
    pipe.fuse_qkv_projections()
    with pytest.raises(AdapterFileError, match="unfuse_qkv_projections"):
        pipe.load_s2ft_weights(path)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, lambda: SlicedAttnProcessor(1)])
def test_attention_processors(pipe, folder, processor) -> None:
    path, expected = folder
    pipe.unet.set_attn_processor(processor())
    pipe.load_s2ft_weights(path)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)


def test_custom_processor_and_slicing_after_loading(pipe, folder) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path)
    calls = []

    class Counting(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return super().__call__(*args, **kwargs)

    pipe.unet.set_attn_processor(Counting())
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
    assert calls
    pipe.enable_attention_slicing()
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)


def test_fuse_qkv_projections(pipe, folder) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path)
    before = state(pipe)
    with pytest.raises(ValueError, match=r"fuse_s2ft\(\) before fuse_qkv"):
        pipe.fuse_qkv_projections()
    assert same_state(pipe, before)
    pipe.fuse_s2ft()
    pipe.fuse_qkv_projections()
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\) before unfuse_s2ft"):
        pipe.unfuse_s2ft()
    pipe.unfuse_qkv_projections()
    pipe.unfuse_s2ft()
    assert len(attention_targets(pipe.unet)) == 28
    after = state(pipe)  # diffusers leaves its fused copies behind
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("kind", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_other_pipelines_share_the_models(pipe, tmp_path, kind) -> None:
    add(pipe)
    pipe.save_s2ft_weights(tmp_path)
    pipe.unload_s2ft_weights()
    options = {"image": Image.new("RGB", (16, 16), "teal"), "strength": 1.0}
    if kind is AutoPipelineForInpainting:
        options["mask_image"] = Image.new("L", (16, 16), 255)
    other = kind.from_pipe(pipe)
    base = generate(other, **options)
    other.load_s2ft_weights(tmp_path, adapter_name="x")
    assert not torch.equal(generate(other, **options), base)
    assert any(isinstance(m, S2FTLinear) for m in pipe.unet.modules())
    pipe.unload_s2ft_weights()
    assert torch.equal(generate(other, **options), base)


class OneModel(DiffusionPipeline):
    """A pipeline of a transformer alone."""

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


@pytest.mark.parametrize("targets", ["all-linear", "proj_out"])
def test_names_that_end_like_others(tmp_path, targets) -> None:
    def flux() -> FluxTransformer2DModel:
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip

    source = OneModel(flux())
    linear = [name for name, module in source.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert "proj_out" in linear
    names = linear if targets == "all-linear" else "proj_out"  # a str: the root's layer alone
    source.transformer.add_adapter(S2FTConfig(target_modules=names, n_frequency=0.1, init_weights=False), "a")
    path = source.save_s2ft_weights(tmp_path)
    pipe = OneModel(flux())
    pipe.load_s2ft_weights(path)
    kinds = [sum(isinstance(m, S2FTLinear) for m in p.transformer.modules()) for p in (source, pipe)]
    assert kinds[0] == kinds[1] == (len(linear) if targets == "all-linear" else 1)
    layers = read_adapter(pipe.save_s2ft_weights(tmp_path / "again")).layers["transformer"]
    for name, layer in read_adapter(path).layers["transformer"].items():
        assert torch.equal(layers[name].coefficients, layer.coefficients)


def test_a_state_dict_stays_its_owners(pipe, folder) -> None:
    path, _ = folder
    pipe.load_s2ft_weights(path, adapter_name="a")
    config = pipe.unet.peft_config["a"]
    weights = get_peft_model_state_dict(pipe.unet, adapter_name="a")
    pipe.load_s2ft_weights(weights, adapter_name="b", config=config)
    layer = next(m for m in pipe.unet.modules() if isinstance(m, S2FTLinear))
    assert layer.s2ft_delta["a"].coefficients.data_ptr() != layer.s2ft_delta["b"].coefficients.data_ptr()


def test_what_is_known_of_an_adapter_goes_with_it(pipe, folder, tmp_path) -> None:
    path, _ = folder
    pipe.load_s2ft_weights(path, adapter_name="dog")
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    header = read_header(other.save_s2ft_weights(tmp_path / "other"))  # another pipeline of the same models
    assert header.info.subject == "cat"
    pipe.delete_adapters("dog")
    add(pipe, "dog")
    assert read_header(pipe.save_s2ft_weights(tmp_path / "new")).info.subject is None


def test_whole_modules_have_no_place_in_the_file(pipe, tmp_path) -> None:
    before = state(pipe)
    config = S2FTConfig(target_modules=["to_q"], n_frequency=100, modules_to_save=["conv_out"])
    pipe.unet.add_adapter(config, "m")
    with pytest.raises(ValueError, match=r"\['conv_out'\] whole"):
        pipe.save_s2ft_weights(tmp_path)
    pipe.unload_s2ft_weights()
    assert same_state(pipe, before)


# What is refused -----------------------------------------------------------------------------------------------------


def test_wrong_base_changes_nothing(pipe, folder) -> None:
    path, _ = folder
    small = dict(pipe.unet.config)
    small.update(block_out_channels=(64, 128))
    pipe.unet = UNet2DConditionModel.from_config(small)
    before = state(pipe)
    with pytest.raises(AdapterFileError, match=r"trained on toybox with 32x32 at unet\.\S+, this model has 64x64"):
        pipe.load_s2ft_weights(path)
    assert same_state(pipe, before)
    assert not hasattr(pipe.unet, "peft_config")


def test_another_kind_of_model(pipe, folder) -> None:
    path, _ = folder
    ddpm = DDPMPipeline(
        unet=UNet2DConditionModel.from_config(
            {**pipe.unet.config, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        ),
        scheduler=pipe.scheduler,
    )
    with pytest.raises(AdapterFileError, match="no linear layer or convolution there"):
        ddpm.load_s2ft_weights(path)


def test_a_failure_while_attaching_is_undone(pipe, folder, monkeypatch) -> None:
    path, _ = folder
    calls = []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return torch.nn.Module.load_state_dict(self, *args, **kwargs)

    add(pipe, "trained")
    before, base = state(pipe), generate(pipe)
    trainable = {name for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}
    monkeypatch.setattr(GridDelta, "load_state_dict", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe.load_s2ft_weights(path)
    assert same_state(pipe, before)
    assert torch.equal(generate(pipe), base)
    assert trainable == {name for name, parameter in pipe.unet.named_parameters() if parameter.requires_grad}


def test_names_that_pytorch_has_no_place_for(pipe, folder) -> None:
    with pytest.raises(ValueError, match="empty or contain a dot"):
        pipe.load_s2ft_weights(folder[0], adapter_name="my.dog")


def test_sources_that_do_not_exist(pipe, tmp_path) -> None:
    with pytest.raises(AdapterFileError, match="no such file"):
        pipe.load_s2ft_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(AdapterFileError, match="there is no pytorch_s2ft"):
        pipe.load_s2ft_weights(tmp_path)
    with pytest.raises(AdapterFileError, match="neither"):
        pipe.load_s2ft_weights("not a repo/at all/really")
    with pytest.raises(OSError, match="hub"):
        pipe.load_s2ft_weights("someone/s2ft-dog")


@pytest.mark.parametrize("options", [{}, {"oversampling": 2}, {"positions": "free"}])
def test_the_default_device_does_not_matter(pipe, folder, options) -> None:
    """As under `torch.set_default_device("cuda")`, where what is made without a device is not in host memory."""
    path, expected = folder
    model = torch.nn.Sequential(torch.nn.Linear(16, 12))
    with torch.device("meta"):
        pipe.load_s2ft_weights(path)
        get_peft_model(model, S2FTConfig(target_modules=["0"], n_frequency=20, init_weights=False, **options))
    assert torch.equal(generate(pipe), expected)
    assert model(torch.ones(1, 16)).isfinite().all()
