"""Adapters as LoRA files of other tools, and back: names, shapes, alphas, and the same outputs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import FourierFTConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from s2ft_diffusion import AdapterInfo, attention_targets, convert
from s2ft_diffusion.adapters.extract import extract_adapter
from s2ft_diffusion.adapters.file import Adapter, AdapterFileError, read_adapter, write_adapter
from s2ft_diffusion.adapters.lora import Lora, LoraLayer, add_loras, difference, low_rank, to_lora, truncate
from s2ft_diffusion.adapters.lora_files import read_lora, state_dict, write_lora
from s2ft_diffusion.adapters.tool_names import sdxl_native
from s2ft_diffusion.tuner.config import S2FTConfig
from tests.conftest import generate
from tests.random_adapters import dense, random_adapter, random_layer, tiny_denoisers


@pytest.fixture(scope="module")
def denoisers():
    return tiny_denoisers()


def some_targets(model: nn.Module, text: nn.Module | None = None) -> dict[str, list[str]]:
    """A few layers of every kind: attention, feed-forward, 3x3 and 1x1 convolutions."""
    found = [n for n in attention_targets(model, "all") if "down_blocks.0" in n or "mid_block" in n]
    return {"unet": found} | ({"text_encoder": attention_targets(text, "attention")} if text is not None else {})


@pytest.fixture
def saved(pipe, tmp_path):
    """A file of an adapter of the embedded base's U-Net and text encoder, and what the pipeline makes with it."""
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    info = AdapterInfo("toybox", "a photo of sks cat", "mittens", "cat", "2026-01-02", {"steps": 3, "resolution": 64})
    adapter = random_adapter(models, some_targets(pipe.unet, pipe.text_encoder), info=info)
    for layers in adapter.layers.values():
        for layer in layers.values():
            layer.coefficients *= 0.3
    path = tmp_path / "s2ft.safetensors"
    write_adapter(path, adapter)
    pipe.load_s2ft_weights(path)
    expected = generate(pipe)
    pipe.unload_s2ft_weights()
    return path, adapter, expected


@pytest.fixture
def base(pipe, tmp_path_factory):
    """The pipeline as a folder, in float16."""
    folder = tmp_path_factory.mktemp("base")
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(folder)
    return folder


# Names ---------------------------------------------------------------------------------------------------------------

LINEAR = ("lora_down.weight", "lora_up.weight", "alpha")
TABLE = {
    ("sd15", "kohya", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"):
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    ("sd15", "comfyui", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"):
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
    ("sd15", "kohya", "up_blocks.1.resnets.2.conv_shortcut"): "lora_unet_up_blocks_1_resnets_2_conv_shortcut",
    ("sd15", "lora", "up_blocks.1.resnets.2.conv1"): "unet.up_blocks.1.resnets.2.conv1",
    ("sd15", "peft", "up_blocks.1.resnets.2.conv1"): "base_model.model.up_blocks.1.resnets.2.conv1",
    ("sdxl", "kohya", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"):
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k",
    ("sdxl", "comfyui", "mid_block.resnets.1.conv2"): "lora_unet_middle_block_2_out_layers_3",
    ("sdxl", "kohya", "up_blocks.0.upsamplers.0.conv"): "lora_unet_output_blocks_2_2_conv",
    ("sdxl", "kohya", "down_blocks.0.downsamplers.0.conv"): "lora_unet_input_blocks_3_0_op",
    ("sd3", "comfyui", "transformer_blocks.0.attn.add_k_proj"): "transformer.transformer_blocks.0.attn.add_k_proj",
    ("flux", "comfyui", "single_transformer_blocks.0.attn.to_v"): "transformer.single_transformer_blocks.0.attn.to_v",
    ("flux2", "comfyui", "single_transformer_blocks.0.attn.to_qkv_mlp_proj"):
        "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    ("qwen", "lora", "transformer_blocks.0.attn.to_q"): "transformer.transformer_blocks.0.attn.to_q",
    ("zimage", "comfyui", "layers.0.attention.to_q"): "transformer.layers.0.attention.to_q",
}  # fmt: skip


@pytest.mark.parametrize(("place", "wanted"), TABLE.items(), ids=lambda x: "-".join(x[:2]) if len(x) == 3 else None)
def test_names_shapes_and_alphas(denoisers, place, wanted) -> None:
    family, tool, name = place
    component = "unet" if family in ("sd15", "sdxl") else "transformer"
    model = denoisers[family]
    # beside a cross-attention layer, which says what the base is
    beside = [n for n in attention_targets(model) if n.endswith("attn2.to_v")][:1]
    adapter = random_adapter({component: model}, {component: list(dict.fromkeys([name, *beside]))})
    lora, _ = to_lora(adapter, kernels=adapter.kernels)
    tensors = state_dict(lora, tool)
    weight = model.get_submodule(name).weight
    kernel = tuple(weight.shape[2:])
    ends = (
        LINEAR if tool == "kohya" or (tool == "comfyui" and component == "unet") else ("lora_A.weight", "lora_B.weight")
    )
    assert {key.removeprefix(wanted + ".") for key in tensors if key.startswith(wanted + ".")} == set(ends)
    assert tuple(tensors[f"{wanted}.{ends[0]}"].shape) == (3, *weight.shape[1:])
    assert tuple(tensors[f"{wanted}.{ends[1]}"].shape) == (weight.shape[0], 3, *[1] * len(kernel))
    if "alpha" in ends:
        assert float(tensors[f"{wanted}.alpha"]) == 3


def test_names_of_text_encoders(pipe) -> None:
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapter = random_adapter(models, {"unet": [], "text_encoder": attention_targets(pipe.text_encoder)[:1]})
    layer = adapter.layers["text_encoder"]
    (name,) = layer
    assert name.startswith("text_model.encoder.layers.0.self_attn.")
    projection = name.rpartition(".")[2]
    lora, _ = to_lora(adapter)
    assert f"lora_te_text_model_encoder_layers_0_self_attn_{projection}.alpha" in state_dict(lora, "kohya")
    for tool in ("lora", "comfyui"):
        assert f"text_encoder.{name}.lora_A.weight" in state_dict(lora, tool)
    lora.layers["text_encoder_2"] = lora.layers["text_encoder"]
    assert {key[:8] for key in state_dict(lora, "kohya")} == {"lora_te1", "lora_te2"}
    lora.layers = {"text_encoder_2": {"encoder.block.0.layer.0.SelfAttention.q": lora.layers["text_encoder_2"][name]}}
    for tool in ("kohya", "comfyui"):
        with pytest.raises(ValueError, match=r"text_encoder_2\.encoder\.block\.0.*no layer of a CLIP"):
            state_dict(lora, tool)


def test_all_of_sdxl_has_native_names_of_its_own(denoisers) -> None:
    layers = attention_targets(denoisers["sdxl"], "all")
    assert len({sdxl_native(name) for name in layers}) == len(layers) > 100
    with pytest.raises(ValueError, match="no layer of Stable Diffusion XL"):
        sdxl_native("transformer_blocks.0.attn.to_q")


def test_a_transformer_has_no_names_of_kohyas(denoisers) -> None:
    adapter = random_adapter({"transformer": denoisers["flux"]})
    with pytest.raises(ValueError, match=r"transformer\..*: kohya's names .* use comfyui"):
        state_dict(to_lora(adapter)[0], "kohya")


# The same outputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["lora", "kohya"])
def test_diffusers_makes_the_same_images(pipe, saved, tmp_path, tool) -> None:
    """Text encoder, convolutions, and a weight and a scale below 1, which must act alike."""
    path, _, expected = saved
    written = convert.convert(path, tmp_path / f"{tool}.safetensors", to=tool, dtype="float32")
    assert written.relative_error < 1e-6
    assert written.ranks == (3, 3)
    base = generate(pipe)
    pipe.load_lora_weights(tmp_path, weight_name=f"{tool}.safetensors", adapter_name="x")
    assert float((expected - base).norm() / base.norm()) > 0.05
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    pipe.set_adapters("x", 0.5)
    half = generate(pipe)
    pipe.unload_lora_weights()
    pipe.load_s2ft_weights(path, "x")
    pipe.set_adapters("x", 0.5)
    torch.testing.assert_close(half, generate(pipe), rtol=1e-3, atol=1e-3)


def test_peft_has_the_same_outputs(pipe, saved, tmp_path) -> None:
    path, _, expected = saved
    convert.convert(path, tmp_path / "peft", to="peft", dtype="float32")
    unet = PeftModel.from_pretrained(pipe.unet, tmp_path / "peft" / "unet")
    text = PeftModel.from_pretrained(pipe.text_encoder, tmp_path / "peft" / "text_encoder")
    pipe.unet, pipe.text_encoder = unet.base_model.model, text.base_model.model
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)


def test_peft_takes_only_the_named_layers_and_their_own_ranks(two_layers, tmp_path) -> None:
    outer = nn.ModuleDict({"first": nn.Linear(5, 6), "inner": two_layers})
    generator = torch.Generator().manual_seed(0)
    layers = {"first": random_layer((6, 5), generator, rank=2), "inner.second": random_layer((7, 16), generator)}
    adapter = Adapter({"unet": S2FTConfig()}, {"unet": layers}, kernels={"unet": {}})
    write_lora(tmp_path, to_lora(adapter)[0], "peft")
    model = PeftModel.from_pretrained(copy.deepcopy(outer), tmp_path)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        layer = name.removesuffix(".weight")
        wanted = outer.get_parameter(name) + (dense(adapter, "unet", layer) if layer in layers else 0)
        torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-6)


def test_the_pipelines_verb(pipe, saved, tmp_path) -> None:
    path, _, expected = saved
    pipe.load_s2ft_weights(path)
    written = pipe.save_s2ft_as_lora(tmp_path / "out", dtype="float32")
    assert pipe.save_s2ft_as_lora(tmp_path / "peft", to="peft").is_dir()
    pipe.unload_s2ft_weights()
    pipe.load_lora_weights(written.parent)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-3, atol=1e-3)
    with safe_open(written, "pt") as file:
        assert file.metadata()["modelspec.title"] == "mittens"


# Exactness -----------------------------------------------------------------------------------------------------------


def test_the_error_that_is_said_is_the_error(denoisers) -> None:
    adapter = random_adapter({"unet": denoisers["sd15"]}, some_targets(denoisers["sd15"]))
    for dtype, low, high in ((torch.float32, 0, 1e-6), (torch.float16, 1e-5, 1e-3), (torch.bfloat16, 1e-4, 1e-2)):
        lora, errors = to_lora(adapter, dtype=dtype)
        assert low <= errors.total <= high
        for (component, name), (error, change) in errors.layers.items():
            wanted = dense(adapter, component, name)
            stored = lora.layers[component][name]
            assert stored.up.dtype == dtype
            assert error == pytest.approx(float((stored.delta() - wanted).norm()), rel=1e-2, abs=1e-5)
            assert change == pytest.approx(float(wanted.norm()), rel=1e-4)


def test_half_precision_keeps_small_changes() -> None:
    """A trained change is of 1e-4 or less beside functions of 1e-1: both factors stay normal numbers of float16."""
    layer = random_layer((320, 320), torch.Generator().manual_seed(0), rank=20)
    for scaling in (1e-5, 1.0, 1e3):
        found = low_rank(layer, scaling)
        assert difference(found, found.to(torch.float16)) < 1e-3 * found.norm()


def test_free_positions_by_rank_and_by_error() -> None:
    layer = random_layer((40, 24), torch.Generator().manual_seed(0), free=True)
    change = layer.delta() * 2.0
    values = torch.linalg.svdvals(change)
    with pytest.raises(ValueError, match="free"):
        low_rank(layer, 2.0)
    for rank in (1, 4, 100):
        found = low_rank(layer, 2.0, rank=rank)
        assert found.rank == min(rank, int(torch.linalg.matrix_rank(change)))
        assert float((found.delta() - change).norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-4)
    for error in (0.5, 0.1, 1e-4):
        found = low_rank(layer, 2.0, error=error)
        assert float((found.delta() - change).norm()) <= error * float(change.norm()) * (1 + 1e-3)
        smaller = truncate(change, rank=found.rank - 1)
        assert float((smaller.delta() - change).norm()) > error * float(change.norm())
    assert truncate(torch.zeros(4, 3), rank=2).delta().abs().max() == 0


def test_a_dense_file_is_exact(denoisers, tmp_path) -> None:
    adapter = random_adapter({"unet": denoisers["sd15"]}, some_targets(denoisers["sd15"]), free=True)
    write_adapter(tmp_path / "a", adapter)
    convert.convert(tmp_path / "a", tmp_path / "b.safetensors", to="kohya", dense=True, dtype="float32")
    tensors = load_file(tmp_path / "b.safetensors")
    for name in adapter.layers["unet"]:
        found = tensors.pop(f"lora_unet_{name.replace('.', '_')}.diff")
        assert found.shape == denoisers["sd15"].get_submodule(name).weight.shape
        torch.testing.assert_close(found.flatten(1), dense(adapter, "unet", name))
    assert not tensors
    with pytest.raises(ValueError, match="kohya or comfyui"):
        convert.convert(tmp_path / "a", tmp_path / "c", to="lora", dense=True)
    with pytest.raises(ValueError, match="give a rank or an error"):
        convert.convert(tmp_path / "a", tmp_path / "c", to="lora")


# Reading and adding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["lora", "kohya", "comfyui", "peft"])
def test_what_is_written_is_read(base, saved, tmp_path, tool) -> None:
    path, adapter, _ = saved
    convert.convert(path, tmp_path / "out", to=tool, dtype="float32")
    lora = read_lora(tmp_path / "out", convert.weight_shapes(base))
    assert {c: set(layers) for c, layers in lora.layers.items()} == {c: set(x) for c, x in adapter.layers.items()}
    for component, layers in lora.layers.items():
        for name, layer in layers.items():
            torch.testing.assert_close(layer.delta(), dense(adapter, component, name), rtol=1e-4, atol=1e-5)
            assert layer.kernel == adapter.kernels[component].get(name, ())
    if tool in ("kohya", "comfyui"):
        with pytest.raises(AdapterFileError, match="give the base model"):
            read_lora(tmp_path / "out")


def test_an_alpha_is_a_scale(tmp_path) -> None:
    from safetensors.torch import save_file

    up, down = torch.randn(6, 2), torch.randn(2, 5)
    keys = {"unet.a.lora_up.weight": up, "unet.a.lora_down.weight": down, "unet.a.alpha": torch.tensor(1.0)}
    save_file(keys, tmp_path / "a")
    torch.testing.assert_close(read_lora(tmp_path / "a").layers["unet"]["a"].delta(), 0.5 * up @ down)
    for key, wrong, message in (
        ("unet.a.dora_scale", torch.ones(1), "no key of a LoRA"),
        ("unet.b.lora_up.weight", up, "lacks one"),
        ("unet.a.lora_up.weight", torch.randn(6, 3), "factors of shapes"),
        ("unet.a.lora_up.weight", up * torch.nan, "NaN"),
    ):
        save_file(keys | {key: wrong.clone()}, tmp_path / "b")
        with pytest.raises(AdapterFileError, match=message):
            read_lora(tmp_path / "b")


def test_adding_is_exact(saved, tmp_path) -> None:
    path, adapter, _ = saved
    convert.convert(path, tmp_path / "lora", to="lora", dtype="float32")
    sources = [(path, 0.5), (tmp_path / "lora", -0.25)]
    written = convert.add(sources, tmp_path / "sum", dtype="float32")
    assert written.ranks == (6, 6)
    for component, layers in read_lora(tmp_path / "sum").layers.items():
        for name, layer in layers.items():
            torch.testing.assert_close(layer.delta(), 0.25 * dense(adapter, component, name), rtol=1e-4, atol=1e-5)
    one, other = (Lora({"unet": {"a": LoraLayer(torch.ones(n, 1), torch.ones(1, 4))}}) for n in (3, 5))
    with pytest.raises(ValueError, match="not for one base"):
        add_loras([(one, 1.0), (other, 1.0)])


def test_merging_into_a_base(base, saved, tmp_path) -> None:
    path, adapter, expected = saved
    convert.convert(path, tmp_path / "k.safetensors", to="kohya", dtype="float32")
    convert.merge(base, [(path, 0.5), (tmp_path / "k.safetensors", 0.5)], tmp_path / "merged")
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", torch_dtype=torch.float32)
    torch.testing.assert_close(generate(merged), expected, rtol=0.05, atol=0.05)  # the base's files are float16
    stored = load_file(next((base / "unet").glob("*.safetensors")))
    changed = load_file(next((tmp_path / "merged" / "unet").glob("*.safetensors")))
    for key, weight in stored.items():
        layer, wanted = key.removesuffix(".weight"), weight.float()
        if layer in adapter.layers["unet"]:
            wanted = wanted + dense(adapter, "unet", layer).view(weight.shape)
        assert changed[key].dtype == weight.dtype
        torch.testing.assert_close(changed[key].float(), wanted.to(weight.dtype).float(), rtol=1e-3, atol=1e-6)
    for file in base.rglob("*.safetensors"):
        other = tmp_path / "merged" / file.relative_to(base)
        with safe_open(file, "pt") as before, safe_open(other, "pt") as after:
            assert before.metadata() == after.metadata()
            assert {k: before.get_slice(k).get_dtype() for k in before.keys()} == {  # noqa: SIM118
                k: after.get_slice(k).get_dtype()
                for k in after.keys()  # noqa: SIM118
            }
        if file.parent.name == "vae":
            assert file.read_bytes() == other.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        convert.merge(base, [(path, 1.0)], tmp_path / "merged")
    adapter.layers["unet"]["nowhere"] = random_layer((4, 4), torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "b", adapter)
    with pytest.raises(AdapterFileError, match=r"does not fit .*: unet\.nowhere: the base has no such layer"):
        convert.merge(base, [(tmp_path / "b", 1.0)], tmp_path / "other")
    assert convert.verify(path, base) == []
    assert convert.verify(tmp_path / "b", base) == ["unet.nowhere: the base has no such layer."]
    assert not (tmp_path / "other").exists()


def test_a_failed_merge_leaves_nothing(base, saved, tmp_path, monkeypatch) -> None:
    path, _, _ = saved

    def full(*names: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("s2ft_diffusion.adapters.base_files.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        convert.merge(base, [(path, 1.0)], tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# Convolutions and metadata -------------------------------------------------------------------------------------------


def test_kernels_of_files_that_do_not_say(denoisers, tmp_path) -> None:
    """Files of earlier releases: by the names, else by the base, else an error that asks for it."""
    unet = denoisers["sd15"]
    adapter = random_adapter({"unet": unet}, {"unet": attention_targets(unet, "all")})
    known = {n: adapter.kernels["unet"].get(n, ()) for n in adapter.layers["unet"]}
    assert convert.find_kernels(adapter)["unet"] == known
    adapter.kernels = {}
    assert convert.find_kernels(adapter)["unet"] == known
    shapes = {"unet": {n: tuple(unet.get_submodule(n).weight.shape) for n in known}}
    alone = "down_blocks.0.attentions.0.proj_in"
    adapter.layers["unet"] = {alone: adapter.layers["unet"][alone]}
    with pytest.raises(ValueError, match="give the base model"):
        convert.find_kernels(adapter)
    assert convert.find_kernels(adapter, shapes)["unet"] == {alone: (1, 1)}
    sdxl = random_adapter({"unet": denoisers["sdxl"]}, {"unet": attention_targets(denoisers["sdxl"], "all")})
    known = {n: sdxl.kernels["unet"].get(n, ()) for n in sdxl.layers["unet"]}
    sdxl.kernels = {}
    assert convert.find_kernels(sdxl)["unet"] == known


@pytest.mark.parametrize("kernel", [[3], [3, 0], "33", [2, 2], [1, 1, 1, 1]])
def test_a_wrong_kernel_in_a_file(tmp_path, denoisers, kernel) -> None:
    name = "down_blocks.0.resnets.0.conv1"
    adapter = random_adapter({"unet": denoisers["sd15"]}, {"unet": [name]})
    write_adapter(tmp_path / "a", adapter)
    assert read_adapter(tmp_path / "a").kernels == {"unet": {name: (3, 3)}}
    adapter.kernels["unet"][name] = kernel
    if kernel == [3]:  # which may be a convolution of one dimension
        write_adapter(tmp_path / "a", adapter)
        assert read_adapter(tmp_path / "a").kernels == {"unet": {name: (3,)}}
        return
    if kernel == [2, 2]:
        adapter.layers["unet"][name] = random_layer((32, 27), torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "a", adapter)
    with pytest.raises(AdapterFileError, match="header is damaged"):
        read_adapter(tmp_path / "a")


def test_metadata(saved, tmp_path, denoisers) -> None:
    info = AdapterInfo("a/base", "a photo of sks dog", "rex", "dog", "2026-01-02", {"steps": 300, "resolution": 512})
    info.thumbnail = b"RIFF"
    unet = denoisers["sd15"]
    adapter = random_adapter({"unet": unet}, some_targets(unet), info=info)
    write_adapter(tmp_path / "a", adapter)
    convert.convert(tmp_path / "a", tmp_path / "b.safetensors", to="kohya")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        found = file.metadata()
    assert json.loads(found.pop("ss_tag_frequency")) == {"rex": {"a photo of sks dog": 1}}
    assert found.pop("modelspec.thumbnail") == "data:image/webp;base64,UklGRg=="
    assert float(found.pop("ss_training_started_at")) > 0
    assert found == {
        "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": "3", "ss_network_alpha": "3",
        "ss_output_name": "rex", "ss_sd_model_name": "a/base", "ss_base_model_version": "sd_v1", "ss_v2": "False",
        "ss_resolution": "(512, 512)", "ss_steps": "300", "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.implementation": "diffusers",
        "modelspec.title": "rex", "modelspec.resolution": "512x512", "modelspec.date": "2026-01-02",
        "modelspec.description": "S2FT adapter of a dog, as a LoRA", "modelspec.trigger_phrase": "a photo of sks dog",
    }  # fmt: skip


# From other methods --------------------------------------------------------------------------------------------------


def test_a_fourierft_adapter_is_the_same(pipe, base, tmp_path) -> None:
    names = attention_targets(pipe.unet)[:6]
    config = FourierFTConfig(
        n_frequency=50, scaling=30.0, random_loc_seed=5, init_weights=False, target_modules=names,
        n_frequency_pattern={names[1]: 30},
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(pipe.unet), config)
    model.save_pretrained(tmp_path / "fourierft")
    with pytest.raises(AdapterFileError, match="depend on its base model"):
        convert.convert(tmp_path / "fourierft", tmp_path / "a", to="s2ft")
    convert.convert(tmp_path / "fourierft", tmp_path / "a", to="s2ft", base=base, dtype="float32")
    adapter = read_adapter(tmp_path / "a")
    assert set(adapter.layers["unet"]) == set(names)
    assert adapter.trainable == 5 * 50 + 30
    for name in names:
        wanted = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(dense(adapter, "unet", name), wanted, rtol=1e-4, atol=1e-6)
    pipe.load_s2ft_weights(tmp_path / "a")
    text = json.loads((tmp_path / "fourierft" / "adapter_config.json").read_text())
    (tmp_path / "fourierft" / "adapter_config.json").write_text(json.dumps(text | {"bias": "all"}))
    with pytest.raises(AdapterFileError, match="bias='all', which an S2FT file cannot hold"):
        convert.read(tmp_path / "fourierft", base)


def test_extracting_what_is_on_a_grid_finds_it_again() -> None:
    """The change of a smooth grid is its own prior: without rearrangement the same functions, and nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    layer = random_layer((24, 20), generator, rank=4)
    layer.row_order, layer.column_order = torch.arange(24).int(), torch.arange(20).int()
    layer.row_sign[:], layer.column_sign[:] = 1, 1
    lora = Lora({"unet": {"a": low_rank(layer, 2.0)}})
    config = S2FTConfig(n_frequency=20, rearrange="none", scaling=0.5)
    adapter, errors = extract_adapter(lora, config)
    assert errors.total < 1e-3
    torch.testing.assert_close(dense(adapter, "unet", "a"), 2.0 * layer.delta(), rtol=1e-3, atol=1e-4)


def test_extracting_says_its_error(tmp_path) -> None:
    lora = Lora({"unet": {"a": LoraLayer(torch.randn(24, 2), torch.randn(2, 20))}})
    write_lora(tmp_path / "a", lora, "lora")
    sizes = []
    for numbers in (16, 100, 0.9):
        written = convert.extract(tmp_path / "a", tmp_path / "b", n_frequency=numbers, dtype="float32")
        adapter = read_adapter(tmp_path / "b")
        error = (dense(adapter, "unet", "a") - lora.layers["unet"]["a"].delta()).norm() / lora.layers["unet"][
            "a"
        ].norm()
        assert written.relative_error == pytest.approx(float(error), rel=1e-3)
        sizes.append(written.relative_error)
    assert sizes == sorted(sizes, reverse=True)
