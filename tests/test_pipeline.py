"""The pipeline verbs on the embedded base, beside everything diffusers does to a pipeline."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DDPMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from s2ft_diffusion import AdapterFileError, AdapterInfo, S2FTConfig, S2FTLinear, attention_targets
from s2ft_diffusion.adapter_file import read_adapter
from s2ft_diffusion.seeding import seeded
from tests.conftest import generate


def add(pipe, name="one", *, text=False, **options) -> None:
    """Put a random adapter on the denoiser (and the text encoder)."""
    for model in [pipe.unet, *([pipe.text_encoder] if text else [])]:
        config = S2FTConfig(
            target_modules=attention_targets(model), n_frequency=300, scaling=2.0, init_weights=False, **options
        )
        model.add_adapter(config, name)


@pytest.fixture
def folder(pipe, tmp_path):
    """A folder with an adapter file of random coefficients, and what the adapted pipeline makes."""
    torch.manual_seed(1)
    add(pipe)
    expected = generate(pipe)
    pipe.save_s2ft_weights(tmp_path / "one", info=AdapterInfo(base_model="toybox", subject="cat"))
    pipe.unload_s2ft_weights()
    return tmp_path / "one", expected


def second_folder(pipe, tmp_path):
    torch.manual_seed(2)
    add(pipe, "two", seed=1)
    pipe.save_s2ft_weights(tmp_path / "two")
    pipe.unload_s2ft_weights()
    return tmp_path / "two"


def state(pipe) -> dict[str, torch.Tensor]:
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {f"{n}.{k}": v.clone() for n, m in models.items() for k, v in m.state_dict().items()}


def same_state(pipe, before) -> bool:
    after = state(pipe)
    return after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


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


def test_fuse_beside_a_fused_lora(pipe, folder) -> None:
    path, _ = folder
    pipe.load_s2ft_weights(path)
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], r=2, init_lora_weights=False), "lora")
    pipe.set_adapters(["s2ft_0", "lora"])
    both = generate(pipe)
    pipe.fuse_s2ft()
    pipe.unet.fuse_lora(adapter_names=["lora"])
    torch.testing.assert_close(generate(pipe), both, rtol=1e-3, atol=1e-3)
    pipe.unfuse_s2ft()  # something else changed the weights meanwhile: the delta is subtracted
    torch.testing.assert_close(generate(pipe), both, rtol=1e-3, atol=1e-3)


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
    deltas = {n: layer.s2ft_delta[n]() for n in "ab"}
    hidden = torch.randn(3, layer.in_features)
    weight = layer.base_layer.weight + 2.0 * (0.5 * deltas["a"] + 2.0 * deltas["b"])
    torch.testing.assert_close(layer(hidden), torch.nn.functional.linear(hidden, weight), rtol=1e-4, atol=1e-4)
    pipe.delete_adapters("b")
    pipe.set_adapters("a")
    assert torch.equal(generate(pipe), expected)
    with pytest.raises(ValueError, match="already"):
        pipe.load_s2ft_weights(path, adapter_name="a")


def copy_of(pipe) -> StableDiffusionPipeline:
    clean = copy.deepcopy(pipe.unet)
    other = StableDiffusionPipeline(**{**pipe.components, "unet": clean}, requires_safety_checker=False)
    other.unload_s2ft_weights()
    return other


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


@pytest.mark.parametrize("lora_first", [True, False])
def test_loras_before_and_after(pipe, folder, tmp_path, lora_first) -> None:
    path, expected = folder
    other = copy_of(pipe)
    other.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k"], r=2, lora_alpha=2, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(other.unet))
    lora_alone = generate(other)
    loads = [lambda: pipe.load_lora_weights(tmp_path / "lora"), lambda: pipe.load_s2ft_weights(path)]
    for load in loads if lora_first else loads[::-1]:
        load()
    pipe.set_adapters(["s2ft_0"])
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
    lora_name = next(n for n in pipe.get_list_adapters()["unet"] if n != "s2ft_0")
    pipe.set_adapters([lora_name])
    torch.testing.assert_close(generate(pipe), lora_alone, rtol=1e-4, atol=1e-4)
    pipe.set_adapters(["s2ft_0", lora_name])
    both = generate(pipe)
    assert not torch.allclose(both, expected)
    pipe.unload_s2ft_weights()
    torch.testing.assert_close(generate(pipe), lora_alone, rtol=1e-4, atol=1e-4)
    pipe.load_s2ft_weights(path)
    pipe.set_adapters(["s2ft_0", lora_name])
    torch.testing.assert_close(generate(pipe), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("lora_first", [True, False])
def test_unloading_loras_keeps_s2ft(pipe, folder, lora_first, fused) -> None:
    """diffusers strips every PEFT layer; ours come back, with their weights, and fused ones can still be unfused."""
    path, expected = folder
    before = state(pipe)
    lora = LoraConfig(target_modules=["to_q", "to_k"], r=2, init_lora_weights=False)
    loads = [lambda: pipe.unet.add_adapter(lora, "lora"), lambda: pipe.load_s2ft_weights(path)]
    for load in loads if lora_first else loads[::-1]:
        load()
    pipe.set_adapters(["s2ft_0", "lora"], [0.5, 1.0])
    if fused:
        pipe.fuse_s2ft()
    pipe.unload_lora_weights()
    if fused:
        pipe.unfuse_s2ft()
    half = generate(pipe)
    assert not torch.equal(half, expected)
    assert pipe.get_list_adapters() == {"unet": ["s2ft_0"]}
    pipe.set_adapters("s2ft_0", 1.0)
    assert torch.equal(generate(pipe), expected)
    pipe.unload_s2ft_weights()
    assert same_state(pipe, before)


def test_loading_beside_a_fused_adapter_is_refused(pipe, folder) -> None:
    path, _ = folder
    pipe.load_s2ft_weights(path)
    pipe.fuse_s2ft()
    with pytest.raises(ValueError, match="unfuse_s2ft"):
        pipe.load_s2ft_weights(path, adapter_name="b")
    pipe.delete_adapters("s2ft_0")
    assert not any(m.merged for m in pipe.unet.modules() if isinstance(m, S2FTLinear))


def test_loading_into_fused_projections_is_refused(pipe, folder) -> None:
    path, _ = folder
    pipe.fuse_qkv_projections()
    with pytest.raises(AdapterFileError, match="unfuse_qkv_projections"):
        pipe.load_s2ft_weights(path)


def test_unfusing_after_a_change_of_type(pipe, folder) -> None:
    path, _ = folder
    half = {k: v.half() for k, v in state(pipe).items() if k.startswith("unet")}
    pipe.load_s2ft_weights(path)
    pipe.fuse_s2ft()
    pipe.unet.to(torch.float16)
    pipe.unfuse_s2ft()
    pipe.unload_s2ft_weights()
    assert all(torch.equal(state(pipe)[k], v) for k, v in half.items())


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
    pipe.unfuse_qkv_projections()
    pipe.unfuse_s2ft()
    after = state(pipe)  # diffusers leaves its fused copies behind
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_compile(pipe, folder) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path)
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    pipe.fuse_s2ft()  # the verbs find the model inside
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_compiled_block_samples_and_trains(pipe) -> None:
    add(pipe)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    compiled = torch.compile(block, fullgraph=True)
    hidden = torch.randn(2, 16, 192, generator=seeded("hidden"))
    context = torch.randn(2, 77, 192, generator=seeded("context"))
    coefficients = [p for n, p in block.named_parameters() if "coefficients" in n]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                compiled(hidden, encoder_hidden_states=context), block(hidden, encoder_hidden_states=context)
            )
            for parameter in coefficients:
                parameter.mul_(2)  # a graph that had taken them as constants would go on as before
    gradients = [
        torch.autograd.grad(f(hidden, encoder_hidden_states=context).square().mean(), coefficients)
        for f in (compiled, block)
    ]
    assert len(gradients[0]) == 4
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_hotswap(pipe, folder, tmp_path) -> None:
    path, expected = folder
    other = second_folder(pipe, tmp_path)
    pipe.load_s2ft_weights(other)
    wanted = generate(pipe)
    pipe.unload_s2ft_weights()
    name = pipe.load_s2ft_weights(path, adapter_name="place")
    assert torch.equal(generate(pipe), expected)
    layers = [module for module in pipe.unet.modules() if isinstance(module, S2FTLinear)]
    assert pipe.load_s2ft_weights(other, adapter_name=name, hotswap=True) == "place"
    assert torch.equal(generate(pipe), wanted)
    assert [module for module in pipe.unet.modules() if isinstance(module, S2FTLinear)] == layers
    saved = pipe.save_s2ft_weights(tmp_path / "again", dtype="float32")
    again = read_adapter(saved)
    for layer, found in read_adapter(other / saved.name).layers["unet"].items():
        for key, tensor in found.tensors().items():
            assert torch.equal(again.layers["unet"][layer].tensors()[key], tensor)
    assert again.configs["unet"].seed == 1


def test_hotswap_into_another_scaling(pipe, folder) -> None:
    path, expected = folder
    add(pipe, "place")
    for module in pipe.unet.modules():
        if isinstance(module, S2FTLinear):
            module.s2ft_scaling["place"] = module.s2ft_config["place"].scaling = 0.5
    pipe.load_s2ft_weights(path, adapter_name="place", hotswap=True)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    assert pipe.unet.peft_config["place"].scaling == 0.5


def test_what_cannot_be_swapped_changes_nothing(pipe, folder, tmp_path) -> None:
    path, _ = folder
    with pytest.raises(ValueError, match="needs the name of a loaded"):
        pipe.load_s2ft_weights(path, hotswap=True)
    with pytest.raises(ValueError, match="needs the name of a loaded"):
        pipe.load_s2ft_weights(path, adapter_name="place", hotswap=True)
    config = S2FTConfig(target_modules=attention_targets(pipe.unet), n_frequency=200, init_weights=False)
    pipe.unet.add_adapter(config, "fewer")
    before = state(pipe)
    with pytest.raises(ValueError, match=r"coefficients \(150, 2\).*the place \(100, 2\)"):
        pipe.load_s2ft_weights(path, adapter_name="fewer", hotswap=True)
    assert same_state(pipe, before)
    pipe.unload_s2ft_weights()
    pipe.unet.add_adapter(S2FTConfig(target_modules=attention_targets(pipe.unet)[:3], n_frequency=300), "some")
    with pytest.raises(ValueError, match="only one of the two adapters has unet"):
        pipe.load_s2ft_weights(path, adapter_name="some", hotswap=True)


def test_hotswap_compiles_nothing_again(pipe, folder, tmp_path) -> None:
    path, expected = folder
    other = second_folder(pipe, tmp_path)
    pipe.load_s2ft_weights(other)
    wanted = generate(pipe)
    pipe.unload_s2ft_weights()
    pipe.load_s2ft_weights(path, adapter_name="place")
    torch.compiler.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.load_s2ft_weights(other, adapter_name="place", hotswap=True)
        torch.testing.assert_close(generate(pipe), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_other_pipelines_share_the_models(pipe, tmp_path, kind) -> None:
    torch.manual_seed(0)
    # diffusers' inpainting wants latents of four channels
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 4, "out_channels": 4})
    vae = AutoencoderKL.from_config({**pipe.vae.config, "latent_channels": 4})
    pipe = StableDiffusionPipeline(**{**pipe.components, "vae": vae}, requires_safety_checker=False)
    add(pipe)
    pipe.save_s2ft_weights(tmp_path)
    pipe.unload_s2ft_weights()
    options = {"image": Image.new("RGB", (64, 64), "teal"), "strength": 1.0}
    if kind is AutoPipelineForInpainting:
        options["mask_image"] = Image.new("L", (64, 64), 255)
    other = kind.from_pipe(pipe)
    base = generate(other, **options)
    other.load_s2ft_weights(tmp_path, adapter_name="x")
    assert not torch.equal(generate(other, **options), base)
    assert any(isinstance(m, S2FTLinear) for m in pipe.unet.modules())
    pipe.unload_s2ft_weights()
    assert torch.equal(generate(other, **options), base)


@torch.no_grad()
def errors_of_effects(pipe, dtype: torch.dtype) -> list[float]:
    """How far each adapted layer's own output is from a float32 product with its delta weight, relatively.

    At |dW| / |W| = 1e-3 the base's rounding would hide the answer, so the base is silenced once the scale is set.
    """
    errors = []
    for layer in (m for m in pipe.unet.modules() if isinstance(m, S2FTLinear)):
        linear = layer.get_base_layer()
        layer.set_scale("s2ft_0", float(1e-3 * linear.weight.float().norm() / layer.get_delta_weight("s2ft_0").norm()))
        linear.weight.zero_()
        assert linear.bias is None
        x = torch.randn(64, layer.in_features, generator=seeded("effect")).to(dtype)
        wanted = x.float() @ layer.get_delta_weight("s2ft_0").T
        found = layer(x)
        assert found.dtype == dtype
        errors.append(float((found.float() - wanted).norm() / wanted.norm()))
    assert len(errors) == 28
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases(pipe, folder, dtype) -> None:
    path, _ = folder
    pipe.unet.to(dtype)
    pipe.text_encoder.to(dtype)
    pipe.load_s2ft_weights(path)
    assert torch.isfinite(generate(pipe)).all()
    assert max(errors_of_effects(pipe, dtype)) < 0.01


def test_one_evaluation_of_a_low_precision_denoiser(pipe, folder) -> None:
    """One step, so that sampling does not amplify rounding: the effect, beside what rounding does to the base."""
    path, _ = folder
    exact, rounded = pipe.unet, copy.deepcopy(pipe.unet).to(torch.bfloat16)
    inputs = (
        torch.randn(4, 16, 8, 8, generator=seeded("x")),
        torch.tensor(500),
        pipe.encode_prompt("a photo", "cpu", 4, False)[0],
    )

    @torch.no_grad()
    def predictions() -> tuple[torch.Tensor, torch.Tensor]:
        low = [i.bfloat16() if i.is_floating_point() else i for i in inputs]
        return exact(*inputs).sample, rounded(*low).sample.float()

    base, low_base = predictions()
    pipe.load_s2ft_weights(path)
    pipe.unet = rounded
    pipe.load_s2ft_weights(path)
    adapted, low_adapted = predictions()
    rounding = (low_base - base).norm()
    assert ((low_adapted - low_base) - (adapted - base)).norm() < 3 * rounding


def test_converting_a_loaded_pipeline_keeps_it_usable(pipe, folder) -> None:
    path, expected = folder
    pipe.load_s2ft_weights(path)
    pipe.unet.to(torch.float16)
    pipe.unet.to(torch.float32)
    pipe_change = (generate(pipe) - expected).norm()
    assert pipe_change < 0.1 * expected.norm()


def test_fusing_into_bf16_warns_when_it_rounds_the_change_away(pipe, folder) -> None:
    path, _ = folder
    pipe.unet.to(torch.bfloat16)
    pipe.load_s2ft_weights(path)
    pipe.set_adapters("s2ft_0", 1e-2)
    with pytest.warns(UserWarning, match="rounds an adapter's change"):
        pipe.fuse_s2ft()
    before = {k: v for k, v in pipe.unet.state_dict().items() if "base_layer" in k}
    pipe.unfuse_s2ft()
    assert any(not torch.equal(v, pipe.unet.state_dict()[k]) for k, v in before.items())


def test_layerwise_casting(pipe, folder) -> None:
    """Weights stored in bfloat16 or 8 bits, coefficients in full: the adapter's effect is not rounded at all."""
    path, _ = folder
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    base = generate(pipe)
    pipe.load_s2ft_weights(path)
    assert not torch.equal(generate(pipe), base)
    layer = next(m for m in pipe.unet.modules() if isinstance(m, S2FTLinear))
    assert layer.get_base_layer().weight.dtype == torch.float8_e4m3fn
    assert layer.s2ft_delta["s2ft_0"].coefficients.dtype == torch.float32
    x = torch.randn(8, layer.in_features, generator=seeded("x"))
    stored = layer.get_base_layer().weight.float()
    torch.testing.assert_close(layer(x), x @ (stored + layer.get_delta_weight("s2ft_0")).T, rtol=1e-4, atol=1e-4)
    pipe.unload_s2ft_weights()
    assert torch.equal(generate(pipe), base)


@pytest.mark.parametrize("offload", ["group", "group_leaf"])
def test_group_offload(pipe, folder, offload) -> None:
    path, expected = folder
    kind = {
        "group": {"offload_type": "block_level", "num_blocks_per_group": 1},
        "group_leaf": {"offload_type": "leaf_level"},
    }
    device = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=device, offload_device=device, **kind[offload])
    pipe.load_s2ft_weights(path)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
    pipe.unload_s2ft_weights()
    assert torch.isfinite(generate(pipe)).all()


def test_hooks_of_sequential_offload_find_the_coefficients(pipe, folder) -> None:
    """What enable_sequential_cpu_offload does, with the CPU as the execution device: weights wait on "meta"."""
    from accelerate import cpu_offload

    path, expected = folder
    pipe.load_s2ft_weights(path)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in pipe.unet.parameters())
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)


# What is refused -----------------------------------------------------------------------------------------------------


def test_wrong_base_changes_nothing(pipe, folder) -> None:
    path, _ = folder
    small = dict(pipe.unet.config)
    small.update(block_out_channels=(64, 192), attention_head_dim=4)
    pipe.unet = UNet2DConditionModel.from_config(small)
    before = state(pipe)
    with pytest.raises(AdapterFileError, match=r"trained on toybox with 128x128 at unet\.\S+, this model has 64x64"):
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
    with pytest.raises(AdapterFileError, match="no linear layer there"):
        ddpm.load_s2ft_weights(path)


def test_a_failure_while_attaching_is_undone(pipe, folder, monkeypatch) -> None:
    path, _ = folder
    before, base = state(pipe), generate(pipe)
    from s2ft_diffusion.layer import SpectralDelta

    calls = []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return torch.nn.Module.load_state_dict(self, *args, **kwargs)

    monkeypatch.setattr(SpectralDelta, "load_state_dict", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe.load_s2ft_weights(path)
    assert same_state(pipe, before)
    assert torch.equal(generate(pipe), base)


def test_sources_that_do_not_exist(pipe, tmp_path) -> None:
    with pytest.raises(AdapterFileError, match="no such file"):
        pipe.load_s2ft_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(AdapterFileError, match="there is no pytorch_s2ft"):
        pipe.load_s2ft_weights(tmp_path)
    with pytest.raises(AdapterFileError, match="neither"):
        pipe.load_s2ft_weights("not a repo/at all/really")
    with pytest.raises(OSError, match="hub"):
        pipe.load_s2ft_weights("someone/s2ft-dog")


def test_quantised_linears_take_the_second_product(two_layers) -> None:
    """A linear whose weight is not a plain matrix (as bitsandbytes') is called as it is; fusing is refused by name."""
    from peft import inject_adapter_in_model

    class PackedLinear(torch.nn.Linear):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__(linear.in_features, linear.out_features)
            self.full = linear.weight.detach().clone()
            self.bias = linear.bias
            self.weight = torch.nn.Parameter(torch.zeros(7, dtype=torch.uint8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.full, self.bias)

    two_layers.first = PackedLinear(two_layers.first)
    inject_adapter_in_model(S2FTConfig(target_modules=["first"], n_frequency=40, init_weights=False), two_layers)
    layer, data = two_layers.first, torch.randn(3, 12)
    expected = layer.base_layer(data) + data @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(data), expected)
    with pytest.raises(TypeError, match="uint8"):
        layer.merge()


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_bitsandbytes(kind) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft import inject_adapter_in_model

    linear = torch.nn.Linear(64, 48)
    if kind == "4-bit":
        quantised = bitsandbytes.nn.Linear4bit(64, 48, compute_dtype=torch.float32, quant_type="nf4")
    else:
        quantised = bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    quantised.load_state_dict(linear.state_dict())
    model = torch.nn.Sequential(quantised.to("cpu"))
    x = torch.randn(5, 64)
    base = model(x)
    inject_adapter_in_model(S2FTConfig(target_modules=["0"], n_frequency=100, init_weights=False), model)
    torch.testing.assert_close(model(x), base + x @ model[0].get_delta_weight("default").T)
    model(x).sum().backward()
    assert model[0].s2ft_delta["default"].coefficients.grad.any()
    with pytest.raises(TypeError, match="cannot be fused"):
        model[0].merge()
