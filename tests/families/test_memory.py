"""Packed and offloaded bases, and the estimate of memory."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

import train_dreambooth_s2ft as recipe
from s2ft_diffusion import read_adapter
from s2ft_diffusion.dreambooth import memory
from s2ft_diffusion.dreambooth.base import empty_model, load_base, plan_base
from s2ft_diffusion.dreambooth.memory import check_memory, run_memory, step_memory
from s2ft_diffusion.dreambooth.settings import (
    AdapterSettings,
    BaseSettings,
    ComputeSettings,
    LengthSettings,
    PhotoSettings,
    Settings,
)
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.families import quantization
from s2ft_diffusion.families.blank import AllocationTracker, GPUPasses, PackedLinear
from s2ft_diffusion.families.offloading import AwayParameter, offload_blocks, transformer_blocks
from s2ft_diffusion.families.quantization import QUANTIZATIONS, parameter_count, quantizable, quantize_model
from s2ft_diffusion.families.sharding import shard_blocks
from s2ft_diffusion.pipelines.attach import inject_adapter
from tests.test_trainer import train_here

PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "float8": "torchao"}


def flags(base, *more: str) -> tuple[str, ...]:
    return ("--pretrained_model_name_or_path", str(base), "--resolution", "16", "--targets", "blocks",
            "--n_frequency", "100", "--max_train_steps", "2", "--estimate_draws", "1", *more)  # fmt: skip


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_training_on_a_packed_base(tiny_base, photos, tmp_path, kind) -> None:
    pytest.importorskip(PACKAGES[kind])
    path = train_here(photos, tmp_path / "out", *flags(tiny_base, "--quantize", kind))
    adapter = read_adapter(path)
    assert all(bool(layer.coefficients.any()) for layer in adapter.layers["unet"].values())
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["estimate"] == "scaled"
    plan = plan_base(BaseSettings(str(tiny_base)), AdapterSettings(options={"n_frequency": 100}), 16, 0)
    numbers = sum(p.numel() for p in load_base(plan).pipeline.unet.parameters())
    assert facts["share"] == facts["trainable"] / numbers  # packed numbers count as those they stand for


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_packed_layer_is_near_the_plain_one(two_layers, kind) -> None:
    pytest.importorskip(PACKAGES[kind])
    data = torch.randn(9, 12)
    expected, count = two_layers(data), parameter_count(two_layers)
    assert quantize_model(two_layers, kind, torch.float32) == ["first", "second"]
    error = (two_layers(data) - expected).norm() / expected.norm()
    assert 0 < error < {"nf4": 0.2, "int8": 0.02, "float8": 0.08}[kind]
    assert parameter_count(two_layers) == count
    assert quantizable(two_layers) == []


def test_what_stays_as_it_is() -> None:
    t5 = T5EncoderModel(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    names = quantizable(t5)
    assert any(name.endswith("SelfAttention.q") for name in names)
    assert not any(name.endswith(".wo") for name in names)  # transformers keeps it in float32


def test_refused_by_name(photos, tiny_base, tmp_path, monkeypatch) -> None:
    def refused(*more: str) -> str:
        with pytest.raises(InputError) as caught:
            train_here(photos, tmp_path / "out", *flags(tiny_base, *more))
        return str(caught.value)

    pytest.importorskip("bitsandbytes")
    assert "contradict each other" in refused("--offload", "--quantize", "nf4")
    assert "--estimate full" in refused("--quantize", "int8", "--estimate", "full")
    assert "--estimate full" in refused("--offload", "--estimate", "full")
    assert "there is one: accelerate launch --num_processes 2" in refused("--shard")
    assert "and --offload contradict each other" in refused("--shard", "--offload")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--estimate full" in refused("--shard", "--estimate", "full")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(InputError, match="Sequential has no linear layers"):
        quantize_model(nn.Sequential(nn.Conv2d(3, 3, 1)), "nf4", torch.float32)
    with pytest.raises(InputError, match="TwoLayers has no transformer blocks"):
        offload_blocks(type("TwoLayers", (nn.Module,), {})(), torch.device("cpu"))
    with pytest.raises(InputError, match="TwoLayers has no transformer blocks"):
        shard_blocks(type("TwoLayers", (nn.Module,), {})(), torch.device("cpu"))
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    assert refused("--quantize", "nf4") == "--quantize nf4 needs bitsandbytes: pip install bitsandbytes."
    assert "needs torchao" in refused("--quantize", "float8")


def test_offloading_changes_no_bit(tiny_base, photos, tmp_path) -> None:
    more = ("--estimate", "scaled", "--gradient_checkpointing", "--train_text_encoder")
    plain = train_here(photos, tmp_path / "plain", *flags(tiny_base, *more))
    away = train_here(photos, tmp_path / "away", *flags(tiny_base, *more, "--offload"))
    assert away.read_bytes() == plain.read_bytes()


def test_blocks_are_away_between_their_passes(tiny_base) -> None:
    plan = plan_base(BaseSettings(str(tiny_base)), AdapterSettings(options={"n_frequency": 100}), 16, 0)
    unet = load_base(plan).pipeline.unet
    offload_blocks(unet, torch.device("cpu"))
    inside = [p for block in transformer_blocks(unet) for p in block.parameters()]
    assert len(inside) > 10
    assert all(isinstance(p, AwayParameter) and p.numel() == 0 for p in inside)
    assert all(p.numel() for name, p in unet.named_parameters() if "transformer_blocks" not in name)
    unet(torch.randn(1, 4, 8, 8), torch.tensor(5), torch.randn(1, 7, 32))
    assert all(isinstance(p, AwayParameter) for block in transformer_blocks(unet) for p in block.parameters())


# The estimate --------------------------------------------------------------------------------------------------------


def test_allocations_by_hand() -> None:
    with FakeTensorMode(), AllocationTracker() as tracker:
        x = torch.empty(256, 1024)  # 1 MiB each
        weight = torch.empty(1024, 1024, requires_grad=True)  # 4 MiB
        y = torch.relu(x @ weight)  # 1 MiB for the product, which is let go, 1 MiB for the result
        assert tracker.now == 6 * 2**20
        assert tracker.peak == 7 * 2**20
        torch.autograd.backward(y.sum())
        assert tracker.now == 10 * 2**20  # with the weight's gradient
        del y, x
        weight.grad = None
    assert tracker.now == 4 * 2**20


def test_attention_keeps_no_table_of_scores() -> None:
    shape, size = (1, 8, 4096, 64), 8 * 4096 * 64 * 2
    with FakeTensorMode(), GPUPasses(torch.bfloat16), AllocationTracker() as tracker:
        query, key, value = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        output = nn.functional.scaled_dot_product_attention(query, key, value=value)
        assert tracker.now == 4 * size + 8 * 4096 * 4
        torch.autograd.backward(output.sum())
        assert query.grad.shape == shape


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.5 + 1 / 64 + 4 / 64 / 256), ("int8", 1.0), ("float8", 1.0)])
def test_a_packed_layer_takes_what_the_real_one_does(kind, share) -> None:
    layer = nn.Linear(512, 1024, bias=False)
    packed = PackedLinear(layer, kind, torch.bfloat16)
    assert packed.weight.numel() == round(512 * 1024 * share)
    pytest.importorskip(PACKAGES[kind])
    model = nn.Sequential(layer)
    quantize_model(model, kind, torch.bfloat16)
    real = model[0].weight
    if kind == "nf4":
        state = real.quant_state
        held = [real, state.absmax, state.state2.absmax]
        assert sum(t.numel() * t.element_size() for t in held) == packed.weight.numel()
    elif kind == "int8":
        assert real.numel() * real.element_size() == packed.weight.numel()
    else:
        assert real.qdata.numel() * real.qdata.element_size() == packed.weight.numel()


def base_of(saved, name: str, side: int, **adapter):
    settings = AdapterSettings(targets="blocks", options={"n_frequency": 0.2, **adapter})
    return plan_base(BaseSettings(str(saved(name))), settings, side, 0)


def blank_step(plan, compute: ComputeSettings, dtype: torch.dtype = torch.bfloat16):
    with init_empty_weights():
        models = {
            name: empty_model(plan.family, name, plan.index, plan.base_configs, plan.location, {})
            for name in plan.configs
        }
    adapt = lambda name, model: inject_adapter(model, plan.configs[name], "default")  # noqa: E731
    return step_memory(plan.family, plan.base_configs, models, adapt, plan.latent_shape, 1, dtype, compute)


@pytest.mark.slow
def test_the_estimate_of_a_step_by_hand(tiny_base) -> None:
    plan = plan_base(BaseSettings(str(tiny_base)), AdapterSettings(targets="qv", options={"n_frequency": 100}), 16, 0)
    found = blank_step(plan, ComputeSettings())
    unet = load_base(plan, torch.bfloat16).pipeline.unet
    inject_adapter(unet, plan.configs["unet"], "default")
    rounded = lambda size: -(-size // 512) * 512  # noqa: E731
    trained = [p for p in unet.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    weights = sum(rounded(p.numel() * 2) for p in unet.parameters() if not p.requires_grad)
    weights += sum(rounded(p.numel() * 4) for p in trained)
    weights += sum(rounded(b.numel() * b.element_size()) for b in unet.buffers())
    assert found.weights == weights
    assert found.trained == 2 * numbers * 4 + 4 * len(trained)  # AdamW: two moments, and a count of steps each
    assert found.host == sum(layer.numel() * 2 for name, layer in unet.named_parameters()
                             if name.endswith("base_layer.weight"))  # fmt: skip
    assert 0 < found.passes < 100e6


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_the_estimate_beside_tensors_that_are_there(saved, kind) -> None:
    """Run for real on a CPU, with the same steps and the count of what is allocated."""
    if kind:
        pytest.importorskip("bitsandbytes")
    plan = base_of(saved, "FluxPipeline", 256)
    compute = ComputeSettings(quantize=kind)
    expected = blank_step(plan, compute, torch.float32)
    base = load_base(plan, torch.float32, kind)
    model = base.pipeline.transformer
    inject_adapter(model, plan.configs["transformer"], "default")
    loss = memory.step_loss(plan.family, plan.base_configs, {"transformer": model}, plan.latent_shape, 1, torch.float32)
    loss()
    with AllocationTracker() as tracker:
        loss().backward()
    assert expected.passes == pytest.approx(tracker.peak, rel=0.1)


@pytest.mark.slow
def test_a_share_of_the_weights(saved) -> None:
    """In bfloat16: a process's share of all, what is in no block, and three blocks or what is in none once more."""
    plan = base_of(saved, "Flux2KleinPipeline", 64)
    plain, shared = (blank_step(plan, ComputeSettings(gradient_checkpointing=True, shard=n)) for n in (1, 4))
    model = load_base(plan).pipeline.transformer
    size = lambda module: 2 * sum(p.numel() for p in module.parameters())  # noqa: E731
    blocks = [size(block) for block in transformer_blocks(model)]
    rest = size(model) - sum(blocks)
    assert len(blocks) == 2
    held = size(model) // 4 + rest + max(rest + blocks[0], sum(blocks))
    assert plain.weights - shared.weights == size(model) - held
    assert shared.passes == plain.passes


def test_what_is_shared_of_a_unet() -> None:
    """Of Stable Diffusion's, as wide as it is, four processes hold about half each."""
    with init_empty_weights():
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).bfloat16()
    every = 2 * sum(p.numel() for p in unet.parameters())
    assert every > 1.6e9
    saved = memory._sharded(unet.requires_grad_(False), 4)
    assert 0.45 * every < saved < 0.75 * every


@pytest.mark.slow
def test_checkpointing_packing_and_offloading_take_less(saved) -> None:
    plan = base_of(saved, "Flux2KleinPipeline", 64)
    plain, checkpointed, packed, away = (
        blank_step(plan, ComputeSettings(gradient_checkpointing=on, quantize=kind, offload=offload))
        for on, kind, offload in ((False, None, False), (True, None, False), (True, "nf4", False), (True, None, True))
    )
    assert checkpointed.passes < plain.passes
    assert checkpointed.weights == plain.weights
    assert packed.weights < plain.weights
    assert away.host > plain.host


def settings_of(plan, **compute) -> Settings:
    return Settings(
        photos=PhotoSettings(None, "dog", "a photo"), base=plan.settings, compute=ComputeSettings(**compute)
    )


@pytest.mark.slow
def test_a_run_says_what_it_needs(saved) -> None:
    plan = base_of(saved, "Flux2KleinPipeline", 16)
    needed = run_memory(plan, settings_of(plan), torch.bfloat16)
    assert set(needed.phases) == {"the photos", "the words", "training"}
    assert needed.device == max(needed.phases.values())
    packed = run_memory(plan, settings_of(plan, quantize="nf4"), torch.bfloat16)
    assert packed.phases["the words"] < needed.phases["the words"]
    text = str(replace(needed, phases={"training": 9_600_000_000}, host=8_100_000_000))
    assert text == "about 9.6 GB on the device (for training), 8.1 GB of host memory"


def test_too_small_a_device_stops_the_run(saved, monkeypatch) -> None:
    plan = base_of(saved, "Flux2KleinPipeline", 16)
    needed = memory.RunMemory({"training": 9_600_000_000}, 8_100_000_000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8_000_000_000, 12_000_000_000))
    with pytest.raises(InputError, match=r"needs about 9\.6 GB.* and 8\.0 GB of the device are free") as caught:
        check_memory(needed, torch.device("cuda"), settings_of(plan))
    assert "--gradient_checkpointing, --quantize nf4, --offload, a smaller --resolution" in str(caught.value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="--shard, with a process for each GPU"):
        check_memory(needed, torch.device("cuda"), settings_of(plan))
    with pytest.raises(InputError, match="Try --gradient_checkpointing, more GPUs, a smaller"):
        check_memory(needed, torch.device("cuda"), settings_of(plan, shard=2))
    best = replace(settings_of(plan, gradient_checkpointing=True, quantize="nf4"), length=LengthSettings(batch=2))
    with pytest.raises(InputError, match="Try --train_batch_size 1, a smaller --resolution;"):
        check_memory(needed, torch.device("cuda"), best)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000_000_000, 12_000_000_000))
    check_memory(needed, torch.device("cuda"), settings_of(plan))


@pytest.mark.slow
def test_nothing_is_loaded_where_it_does_not_fit(tiny_base, photos, tmp_path, monkeypatch) -> None:
    make = recipe.make_accelerator

    class OnGPU:
        def __init__(self, accelerator) -> None:
            self.accelerator = accelerator

        def __getattr__(self, name):
            return torch.device("cuda") if name == "device" else getattr(self.accelerator, name)

    monkeypatch.setattr(recipe, "make_accelerator", lambda settings: OnGPU(make(settings)))
    monkeypatch.setattr(recipe, "load_base", lambda *args: pytest.fail("loaded"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    with pytest.raises(InputError, match=r"0\.0 GB of the device are free"):
        train_here(photos, tmp_path / "out", *flags(tiny_base))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        train_here(photos, tmp_path / "out", *flags(tiny_base, "--skip_memory_check"))


@pytest.mark.slow
def test_a_dry_run_trains_nothing(tiny_base, photos, tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(recipe, "load_base", lambda *args: pytest.fail("loaded"))
    recipe.main(["--instance_dir", str(photos), "--output_dir", str(tmp_path / "out"), *flags(tiny_base, "--dry_run")])
    assert "The run needs about 0.1 GB on the device" in caplog.text
    assert list((tmp_path / "out").iterdir()) == []
