"""Query and value projections of transformers' models, found without a word about any of them in the package."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as t
from peft import get_peft_model
from torch import nn

from s2ft_diffusion import S2FTConfig, attention_targets

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZE, "num_key_value_heads": 2, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**SIZE, "image_size": 28, "patch_size": 14}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40, "bos_token_id": 1}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 40}

# A model, its query and value projections in a layer, and how many linear layers "attention" and "blocks" take there.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], int, int]] = {
    "bert": (lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT)), ("query", "value"), 3, 6),
    "roberta": (lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT)), ("query", "value"), 3, 6),
    "distilbert": (
        lambda: t.DistilBertForSequenceClassification(t.DistilBertConfig(**DISTIL)), ("q_lin", "v_lin"), 4, 6,
    ),
    "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE)), ("q_proj", "v_proj"), 4, 6),
    "dinov2": (lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**DINO)), ("q_proj", "v_proj"), 4, 6),
    "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)), ("q_proj", "v_proj"), 4, 7),
    "qwen2": (lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT)), ("q_proj", "v_proj"), 4, 7),
    "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT)), ("q_proj", "v_proj"), 4, 7),
    "mistral": (lambda: t.MistralForCausalLM(t.MistralConfig(**TEXT)), ("q_proj", "v_proj"), 4, 7),
    "gpt_neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT)), ("query_key_value",), 2, 4),
    "phi3": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**TEXT)), ("qkv_proj",), 2, 4),
    "modernbert": (
        lambda: t.ModernBertForSequenceClassification(
            t.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2)), ("Wqkv",), 2, 4,
    ),
    "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2, eos_token_id=2)), ("c_attn",), 2, 4),
}  # fmt: skip


def inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}
    return {"input_ids": torch.randint(3, 40, (2, 6), generator=generator)}


@pytest.mark.parametrize("name", MODELS)
def test_query_and_value_are_found(name: str) -> None:
    build, expected, attention, blocks = MODELS[name]
    model = build()
    found = attention_targets(model)
    assert len(found) == len(set(found)) == 2 * len(expected)  # in two layers
    assert {path.rpartition(".")[2] for path in found} == set(expected)
    assert len(attention_targets(model, "attention")) == 2 * attention
    assert len(attention_targets(model, "blocks")) == 2 * blocks


@pytest.mark.parametrize("name", MODELS)
def test_they_can_be_adapted(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        before = model(**inputs(model)).logits
        config = S2FTConfig(target_modules=attention_targets(model), n_frequency=40, scaling=5.0, init_weights=False)
        adapted = get_peft_model(model, config).eval()
        after = adapted(**inputs(model)).logits
        assert not torch.allclose(before, after, atol=1e-4)
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(**inputs(model)).logits, after, rtol=1e-4, atol=1e-5)
