"""An adapted model in PEFT's hands: heads that are saved whole, sums of adapters, old folders, defaults of targets."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from s2ft_diffusion import S2FTConfig, S2FTLayer

BOTH = ["first", "second"]


def config(**options) -> S2FTConfig:
    return S2FTConfig(**{"target_modules": BOTH, "n_frequency": 40, "init_weights": False, **options})


def x() -> torch.Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Mixed batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [S2FTConfig, LoraConfig])
def test_rows_of_a_mixed_batch_have_their_own_heads(kind) -> None:
    torch.manual_seed(0)
    bert = BertForSequenceClassification(
        BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40,
            num_labels=3,
        )
    )  # fmt: skip
    options = {"n_frequency": 20, "init_weights": False} if kind is S2FTConfig else {"init_lora_weights": False}
    one = kind(target_modules=["query"], task_type="SEQ_CLS", **options)
    model = get_peft_model(bert, one)
    model.add_adapter("other", copy.deepcopy(one))
    heads = model.base_model.model.classifier.modules_to_save
    nn.init.normal_(heads["other"].weight)
    model.eval()
    ids = torch.randint(3, 40, (4, 5), generator=torch.Generator().manual_seed(0))
    wanted = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = model(input_ids=ids).logits
    with model.disable_adapter():
        wanted["__base__"] = model(input_ids=ids).logits
    names = ["default", "other", "__base__", "other"]
    found = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], wanted[name][row])


def test_a_head_that_only_one_adapter_has(two_layers) -> None:
    model = get_peft_model(two_layers, config(target_modules=["first"], modules_to_save=["second"]))
    model.add_adapter("headless", config(target_modules=["first"], seed=1))
    nn.init.normal_(model.base_model.model.second.modules_to_save["default"].weight)
    model.eval()
    wanted = model(x())
    found = model(x(), adapter_names=["default", "headless", "default", "__base__", "default"])
    torch.testing.assert_close(found[::2], wanted[::2])
    first, second = model.base_model.model.first, model.base_model.model.second
    hidden = first(x(), adapter_names=["headless"] * 5)
    torch.testing.assert_close(found[1], second.original_module(torch.relu(hidden))[1])


def test_adapters_that_are_heads_alone(two_layers) -> None:
    """An adapter's name may be found nowhere but at its head."""
    model = get_peft_model(two_layers, config(target_modules=["first"], modules_to_save=["second"]))
    model.base_model.model.second.update("head")
    model.eval()
    assert model(x(), adapter_names=["head"] * 5).shape == (5, 7)
    with pytest.raises(ValueError, match="nobody"):
        model(x(), adapter_names=["nobody"] * 5)


# Sums -----------------------------------------------------------------------------------------------------------------


def twins(model: nn.Module, **options) -> PeftModel:
    """Two adapters with the same places and orders, and other coefficients."""
    model = get_peft_model(model, config(**options))
    model.add_adapter("other", config(**options))
    for layer in (module for module in model.modules() if isinstance(module, S2FTLayer)):
        for delta in layer.s2ft_delta.values():
            nn.init.normal_(delta.coefficients)
    return model


def test_a_sum_has_no_head(two_layers) -> None:
    model = twins(two_layers, target_modules=["first"], modules_to_save=["second"])
    with pytest.raises(ValueError, match=r"module with modules_to_save, but found 1 such instance"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"default", "other"}


@pytest.mark.parametrize("positions", ["grid", "free"])
def test_a_sum_with_a_scaling_of_zero(two_layers, positions) -> None:
    model = twins(two_layers, positions=positions, scaling=0.0)
    layer = model.base_model.model.first
    model.peft_config["other"].scaling = layer.s2ft_config["other"].scaling = 2.0
    model.add_weighted_adapter(["default", "other"], [3.0, 0.5], "sum")
    assert layer.s2ft_config["sum"].scaling == 1.0
    torch.testing.assert_close(layer.get_delta_weight("sum"), 0.5 * layer.get_delta_weight("other"))


def test_a_sum_of_a_kind_that_there_is_not(two_layers) -> None:
    model = twins(two_layers)
    with pytest.raises(ValueError, match="combination_type must be \"linear\", got 'svd'"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="svd")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear")


def test_a_sum_in_half_precision_is_not_rounded(two_layers) -> None:
    model = twins(two_layers)
    layer = model.base_model.model.first
    for name in ("default", "other"):
        layer.s2ft_delta[name].half()
    model.add_weighted_adapter(["default", "other"], [1 / 3, 0.1], "sum")
    wanted = layer.get_delta_weight("default") / 3 + 0.1 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("sum"), wanted)


def test_a_sum_trains_nothing_and_freezes_nothing(two_layers) -> None:
    model = twins(two_layers)
    model.set_requires_grad("other")
    model.base_model.model.first.s2ft_delta["default"].requires_grad_(False)
    before = trained(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert trained(model) == before
    assert model.active_adapters == ["default"]


# Fusing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
def test_nothing_is_fused_into_float8(two_layers, safe) -> None:
    model = get_peft_model(two_layers, config())
    base = model.base_model.model.first.base_layer
    base.to(torch.float8_e4m3fn)
    before = base.weight.data.view(torch.uint8).clone()
    with pytest.raises(TypeError, match=r"cannot be fused into a torch\.float8_e4m3fn weight"):
        model.merge_adapter(safe_merge=safe)
    assert torch.equal(base.weight.data.view(torch.uint8), before)
    assert not model.base_model.model.first.merged


# Folders of older releases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"coefficients": "real", "norm": "backward", "scaling": 100.0}], ids=["default", "paper"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_config_from_before_there_were_grids(two_layers, tmp_path, options, bias) -> None:
    base = copy.deepcopy(two_layers)
    model = get_peft_model(two_layers, config(positions="free", **options))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    del old["positions"], old["oversampling"]
    path.write_text(json.dumps(old | ({"bias": "none"} if bias else {})), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x()), model(x()))
    assert loaded.peft_config["default"].positions == "free"
    if bias:  # as every release without grids wrote it: transformers loads configs by this door
        assert PeftConfig.from_pretrained(tmp_path).positions == "free"


def test_a_config_of_this_release_is_as_it_was(tmp_path) -> None:
    for one in (config(oversampling=3), config(positions="free", coefficients="real")):
        one.save_pretrained(tmp_path)
        for found in (S2FTConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
            assert found.to_dict() == one.to_dict()


# Targets, averages, processes -----------------------------------------------------------------------------------------


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=40)).eval()


@pytest.mark.parametrize(
    ("targets", "layers"),
    [(None, {"mlp.c_proj"}), ("all-linear", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"})],
)
def test_targets_of_a_gpt2(targets, layers) -> None:
    base = gpt2()
    ids = torch.arange(6)[None]
    before = base(ids).logits
    model = get_peft_model(
        base, S2FTConfig(target_modules=targets, n_frequency=40, init_weights=False, task_type="CAUSAL_LM")
    )
    found = [name for name, module in model.named_modules() if isinstance(module, S2FTLayer)]
    prefix = "base_model.model.transformer.h"
    assert set(found) == {f"{prefix}.{block}.{layer}" for block in range(2) for layer in layers}
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("positions", ["grid", "free"])
def test_an_average_of_coefficients_is_what_the_model_uses(two_layers, positions) -> None:
    model = get_peft_model(two_layers, config(positions=positions))
    average = EMAModel([p for p in model.parameters() if p.requires_grad], decay=0.5)
    before = model(x())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(3.0)
    changed = model(x())
    assert not torch.equal(changed, before)
    average.copy_to([p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(model(x()), before)


def test_a_loaded_adapter_trains_on_in_a_process_group(two_layers, tmp_path) -> None:
    base = copy.deepcopy(two_layers)
    get_peft_model(two_layers, config()).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not trained(model)
    model.set_requires_grad("default")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        parallel(x()).square().sum().backward()
    finally:
        dist.destroy_process_group()
    names = trained(model)
    assert len(names) == 2
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n in names)
