"""LoRA files as other programs write them, and what a file of ours must not be: another change than the adapter's."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from s2ft_diffusion import S2FTConfig, convert
from s2ft_diffusion.adapters.extract import extract_adapter
from s2ft_diffusion.adapters.file import Adapter, AdapterFileError, read_adapter, write_adapter
from s2ft_diffusion.adapters.lora import Lora, LoraLayer
from s2ft_diffusion.adapters.lora_files import LORA_NAME, read_lora, state_dict, write_lora
from s2ft_diffusion.adapters.sources import is_s2ft
from tests.families.pipelines import tiny
from tests.random_adapters import dense, random_adapter, random_layer, some_targets

ATTENTION = ["to_q", "to_v", "q_proj", "v_proj"]


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_of_diffusers_is_as_strong_as_there(pipe, tmp_path, rslora) -> None:
    """Its alphas are in the header, as PEFT's configs; the first layer has one of its own."""
    parts = {}
    for name, model in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        first = next(n for n, _ in model.named_modules() if n.endswith(tuple(ATTENTION)))
        config = LoraConfig(
            r=4, lora_alpha=16, alpha_pattern={first: 2}, use_rslora=rslora, init_lora_weights=False,
            target_modules=ATTENTION,
        )  # fmt: skip
        model.add_adapter(config)
        parts[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
        parts[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, **parts)
    found = read_lora(tmp_path / LORA_NAME)
    for component in ("unet", "text_encoder"):
        model = getattr(pipe, component)
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
        assert len(found.layers[component]) == len(layers)
        for name, layer in layers.items():
            stored = found.layers[component].get(name) or found.layers[component][f"text_model.{name}"]
            torch.testing.assert_close(stored.delta(), layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    tensors = load_file(tmp_path / LORA_NAME)
    save_file(tensors, tmp_path / "b", {"lora_adapter_metadata": '{"unet.r": 4, "unet.what": 1}'})
    with pytest.raises(AdapterFileError, match="lora_adapter_metadata cannot be read"):
        read_lora(tmp_path / "b")


def test_a_layer_has_one_name(tmp_path) -> None:
    """CLIP's layers as transformers has called them before 5.6 and since."""
    names = ["text_model.encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.q_proj"]
    layers = [LoraLayer(torch.randn(32, 2), torch.randn(2, 32)) for _ in names]
    for number, (layer, name) in enumerate(zip(layers, names, strict=True)):
        key = f"text_encoder.{name}.lora_{{}}.weight"
        save_file({key.format("A"): layer.down, key.format("B"): layer.up}, tmp_path / str(number))
    convert.add([(tmp_path / "0", 1.0), (tmp_path / "1", 1.0)], tmp_path / "sum", dtype="float32")
    (found,) = read_lora(tmp_path / "sum").layers["text_encoder"].values()
    torch.testing.assert_close(found.delta(), layers[0].delta() + layers[1].delta(), rtol=1e-4, atol=1e-5)
    save_file(load_file(tmp_path / "0") | load_file(tmp_path / "1"), tmp_path / "both")
    with pytest.raises(AdapterFileError, match="under two names"):
        read_lora(tmp_path / "both")
    both = Lora({"text_encoder": dict.fromkeys(names, found)})
    with pytest.raises(ValueError, match="under two names"):
        state_dict(both, "lora")


def test_an_adapter_that_peft_saved_belongs_where_its_names_do(pipe, tmp_path) -> None:
    for component, model, layer in (
        ("transformer", tiny("FluxPipeline").transformer, "single_transformer_blocks.0.attn.to_q"),
        ("text_encoder", pipe.text_encoder, "encoder.layers.0.self_attn.q_proj"),
    ):
        named = next(name for name, _ in model.named_modules() if name.endswith(layer))
        config = S2FTConfig(n_frequency=9, target_modules=[named], init_weights=False)
        get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / component)
        for source in (tmp_path / component, tmp_path / component / "adapter_model.safetensors"):
            assert is_s2ft(source)
            assert list(convert.read(source).layers) == [component]
        convert.convert(tmp_path / component, tmp_path / "a", to="lora")
        assert all(key.startswith(f"{component}.") for key in load_file(tmp_path / "a"))


def test_what_is_no_whole_lora(tmp_path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    save_file({}, tmp_path / "empty")
    key = "unet.a.lora_{}.weight"
    save_file({key.format("A"): torch.ones(0, 3), key.format("B"): torch.ones(4, 0)}, tmp_path / "rank-0")
    for name, said in (("other", "no key of a LoRA"), ("empty", "no LoRA weights"), ("rank-0", "factors of shapes")):
        with pytest.raises(AdapterFileError, match=said):
            read_lora(tmp_path / name)


def test_an_alpha_is_the_rank_in_any_precision() -> None:
    layer = LoraLayer(torch.ones(300, 267), torch.ones(267, 300)).to(torch.bfloat16)
    (alpha,) = (x for key, x in state_dict(Lora({"unet": {"a": layer}}), "kohya").items() if key.endswith("alpha"))
    assert float(alpha) == 267


def test_a_depthwise_convolution_is_refused() -> None:
    """PEFT's LoRA of a convolution reads all its inputs, whatever its groups are."""
    layer = LoraLayer(torch.ones(8, 2), torch.ones(2, 9), (3, 3))
    with pytest.raises(ValueError, match=r"transformer\.conv_depth: a depthwise convolution.*merge it into the base"):
        state_dict(Lora({"transformer": {"conv_depth": layer}}), "lora")


def test_extracted_convolutions_stay_convolutions(tmp_path) -> None:
    layers = {"a": LoraLayer(torch.randn(8, 2), torch.randn(2, 36), (3, 3)), "b": LoraLayer(*torch.ones(2, 4, 4))}
    write_lora(tmp_path / "a", Lora({"transformer": layers}), "lora")
    adapter, _ = extract_adapter(read_lora(tmp_path / "a"), S2FTConfig(n_frequency=16))
    write_adapter(tmp_path / "b", adapter)
    assert convert.find_kernels(read_adapter(tmp_path / "b")) == {"transformer": {"a": (3, 3), "b": ()}}
    silent = Adapter(adapter.configs, {"transformer": {"ff.conv_in": adapter.layers["transformer"]["a"]}})
    with pytest.raises(ValueError, match="give the base model"):
        convert.find_kernels(silent)


def test_adding_says_what_is_lost(tmp_path) -> None:
    """Of one adapter the error is the true one; of several, no less than that."""
    generator = torch.Generator().manual_seed(0)
    paths, changes = [], []
    for number in range(2):
        layer = random_layer((24, 20), generator, free=True)
        adapter = Adapter({"unet": S2FTConfig(positions="free")}, {"unet": {"a": layer}}, kernels={"unet": {}})
        paths.append(tmp_path / f"{number}.safetensors")
        write_adapter(paths[-1], adapter)
        changes.append(dense(adapter, "unet", "a"))
    for count in (1, 2):
        sources = [(path, 0.5) for path in paths[:count]]
        written = convert.add(sources, tmp_path / "sum", rank=2, dtype="float32")
        found, wanted = read_lora(tmp_path / "sum").layers["unet"]["a"].delta(), 0.5 * sum(changes[:count])
        error = float((found - wanted).norm())
        said, change = written.errors.layers["unet", "a"]
        assert error > 0.1 * float(wanted.norm())
        if count == 1:
            assert (said, change) == pytest.approx((error, float(wanted.norm())), rel=1e-3)
        assert said >= error * 0.999


def test_nothing_is_written_over_any_file_that_is_read(pipe, tmp_path) -> None:
    adapter = random_adapter({"unet": pipe.unet}, some_targets(pipe.unet))
    write_adapter(tmp_path / "s2ft", adapter)
    lora, peft = tmp_path / "lora", tmp_path / "peft"
    convert.convert(tmp_path / "s2ft", lora / LORA_NAME, to="lora")
    convert.convert(tmp_path / "s2ft", peft / "unet", to="peft")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for run in (
        lambda: convert.add([(lora, 0.5), (tmp_path / "s2ft", 1.0)], lora / LORA_NAME),
        lambda: convert.extract(lora, lora / LORA_NAME, n_frequency=16),
        lambda: convert.extract(peft, peft / "unet" / "adapter_model.safetensors", n_frequency=16),
    ):
        with pytest.raises(ValueError, match="would be written over"):
            run()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_base_of_links_is_merged_whole(pipe, tmp_path) -> None:
    """People share autoencoders and text encoders between bases to save disk."""
    base, elsewhere = tmp_path / "base", tmp_path / "elsewhere"
    pipe.save_pretrained(base)
    for component in ("vae", "unet"):
        shutil.move(base / component, elsewhere / component)
        (base / component).symlink_to(elsewhere / component)
    (base / "unet" / "all").symlink_to(base)  # which has no end
    adapter = random_adapter({"unet": pipe.unet}, some_targets(pipe.unet))
    write_adapter(tmp_path / "a", adapter)
    convert.merge(base, [(tmp_path / "a", 1.0)], tmp_path / "merged")
    assert (tmp_path / "merged" / "vae" / "config.json").is_file()
    name = next(iter(adapter.layers["unet"]))
    weights = [
        load_file(next((p / "unet").glob("*.safetensors")))[f"{name}.weight"] for p in (base, tmp_path / "merged")
    ]
    change = dense(adapter, "unet", name).view(weights[0].shape)
    torch.testing.assert_close(weights[1] - weights[0], change, rtol=1e-3, atol=1e-5)


def test_only_what_is_needed_of_a_base_is_read(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "base")
    (weights,) = (tmp_path / "base" / "text_encoder").glob("*.safetensors")
    weights.rename(weights.with_name("pytorch_model.bin"))
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    write_adapter(tmp_path / "a", random_adapter({"unet": pipe.unet}, some_targets(pipe.unet)))
    assert convert.verify(tmp_path / "a", tmp_path / "base") == []
    write_adapter(tmp_path / "b", random_adapter(models, some_targets(pipe.unet, pipe.text_encoder)))
    (problem,) = convert.verify(tmp_path / "b", tmp_path / "base")
    assert problem == "the base, a StableDiffusionPipeline, has no text_encoder in safetensors files."


def test_a_lora_of_another_base_does_not_fit(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "base")
    layer = LoraLayer(torch.ones(4, 1), torch.ones(1, 4))
    write_lora(tmp_path / "a", Lora({"unet": {"mid_block.attentions.9.x": layer}}), "kohya")
    (problem,) = convert.verify(tmp_path / "a", tmp_path / "base")
    assert problem.endswith("the base model has no such layer.")
