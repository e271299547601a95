"""`to_lora`: an adapter of a model as PEFT's own LoRA, loaded by PEFT, with the same outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from s2ft_diffusion import S2FTConfig, to_lora

LAYERS = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12)),
    "Conv1D": (lambda: Conv1D(9, 12), (2, 5, 12)),
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 5, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 6, 6)),
}


def loaded(base: nn.Module, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """What PEFT makes of a LoRA, which must have all of its tensors and no others."""
    model = get_peft_model(base, config)
    found = set_peft_model_state_dict(model, tensors)
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "lora" in key or "modules_to_save" in key]
    return model.eval()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_peft_computes_the_same(name, in_place) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    base = nn.Sequential(make())
    config = S2FTConfig(target_modules=["0"], n_frequency=12, init_weights=False, scaling=1.5)
    if in_place:
        model = inject_adapter_in_model(config, copy.deepcopy(base), "default")
        layer = model[0]
    else:
        model = get_peft_model(copy.deepcopy(base), config)
        layer = model.base_model.model[0]
    layer.set_scale("default", 0.5)
    x = torch.randn(shape)
    expected = model(x)
    assert float((expected - base(x)).abs().max()) > 1e-3
    lora = loaded(base, *to_lora(model))
    torch.testing.assert_close(lora(x), expected, rtol=1e-4, atol=1e-5)


def test_ranks_heads_and_the_task() -> None:
    torch.manual_seed(0)
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40)
    )
    base = copy.deepcopy(bert)
    pattern = {"0.attention.self.query": 16, "dense": 9}
    config = S2FTConfig(
        target_modules=["query", "output.dense"], n_frequency=40, n_frequency_pattern=pattern, init_weights=False,
        task_type="SEQ_CLS",
    )  # fmt: skip
    model = get_peft_model(bert, config).eval()
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    ids = torch.randint(3, 40, (4, 5))
    config, tensors = to_lora(model)
    assert {config.r, *config.rank_pattern.values()} == {3, 4, 6}
    assert config.task_type == "SEQ_CLS"
    lora = loaded(base, config, tensors)
    torch.testing.assert_close(lora(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the tensors are its own
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        for parameter in model.parameters():
            parameter.mul_(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_one_of_several_adapters_beside_a_lora(two_layers) -> None:
    base = copy.deepcopy(two_layers)
    inject_adapter_in_model(LoraConfig(target_modules=["first"], r=2, init_lora_weights=False), two_layers, "lora")
    options = {"target_modules": ["first", "second"], "n_frequency": 20, "init_weights": False}
    inject_adapter_in_model(S2FTConfig(**options), two_layers, "one")
    inject_adapter_in_model(S2FTConfig(**options, seed=1), two_layers, "two")
    alone = inject_adapter_in_model(S2FTConfig(**options), copy.deepcopy(base), "two")
    for name in ("first", "second"):
        delta = next(m for m in getattr(two_layers, name).modules() if hasattr(m, "s2ft_delta")).s2ft_delta["two"]
        getattr(alone, name).take_state("two", delta.state_dict())
    x = torch.randn(5, 12)
    torch.testing.assert_close(loaded(base, *to_lora(two_layers, "two"))(x), alone(x), rtol=1e-4, atol=1e-5)


def test_what_is_no_lora_of_peft(two_layers) -> None:
    model = get_peft_model(two_layers, S2FTConfig(target_modules=["second"], n_frequency=20, positions="free"))
    with pytest.raises(ValueError, match=r"^second: 'default' has free positions"):
        to_lora(model)
    with pytest.raises(ValueError, match="no S2FT layer with an adapter named 'nobody'"):
        to_lora(model, "nobody")
    for options in ({"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}):
        net = nn.Sequential(nn.Conv2d(4, 6, 3, **options))
        model = get_peft_model(net, S2FTConfig(target_modules=["0"], n_frequency=12))
        with pytest.raises(ValueError, match=r"^0: PEFT's LoRA knows no dilation"):
            to_lora(model)
