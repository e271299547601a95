"""Adapters as LoRAs: exact, read again, added, and merged into a base."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from s2ft_diffusion import AdapterInfo, convert
from s2ft_diffusion.adapters.file import Adapter, AdapterFileError, write_adapter
from s2ft_diffusion.adapters.lora import Lora, LoraLayer, add_loras, difference, low_rank, to_lora, truncate
from s2ft_diffusion.adapters.lora_files import read_lora, write_lora
from s2ft_diffusion.tuner.config import S2FTConfig
from tests.conftest import generate
from tests.random_adapters import dense, random_adapter, random_layer, some_targets


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


@pytest.mark.parametrize("error", [OSError("disk full"), SafetensorError("I/O error: disk full")])
def test_a_failed_merge_leaves_nothing(base, saved, tmp_path, monkeypatch, error) -> None:
    path, _, _ = saved

    def full(*names: object) -> None:
        raise error

    monkeypatch.setattr("s2ft_diffusion.adapters.base_files.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        convert.merge(base, [(path, 1.0)], tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
