"""examples/finetuning.py: what every example refuses, and what it does for all of them."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import finetuning
import instruction_tuning
import numpy as np
import pictures
import pytest
import text_classification
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPForImageClassification,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipForImageClassification,
    TrainingArguments,
)
from transformers.utils import hub

from s2ft_diffusion.errors import InputError
from tests.examples.conftest import quick, tokenizer
from tests.fake_hub import fake_hub

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def flags(bert: str, reviews: Path, output: Path, *more: str) -> list[str]:
    files = ["--train_file", str(reviews / "train.csv"), "--test_file", str(reviews / "test.csv")]
    common = ["--num_train_epochs", "1", "--save_strategy", "no", "--eval_strategy", "no"]
    return quick(output, "--model_name_or_path", bert, *files, *common, *more)


@pytest.mark.parametrize(
    ("kind", "config"), [(CLIPForImageClassification, CLIPConfig), (SiglipForImageClassification, SiglipConfig)]
)
def test_a_head_is_what_has_no_attention(kind, config) -> None:
    model = kind(config(vision_config={**TINY, "image_size": 16, "patch_size": 8}, text_config=TINY))
    assert finetuning.head_names(model) == ["classifier"]
    adapted = finetuning.adapt(model, finetuning.MethodArguments(n_frequency=20), seed=0, heads=["classifier"])
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("coefficients" in name or "classifier.modules_to_save" in name for name in trained)
    assert len(trained) == 2 + 2


def test_a_classifier_within_its_model_is_refused() -> None:
    """As timm's are in transformers: nothing says which part is the head, and it would stay as it was drawn."""

    class Wrapped(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.inner = BertModel(config)

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    with pytest.raises(InputError, match="Wrapped has no head"):
        finetuning.head_names(Wrapped(config))


def test_more_than_logits() -> None:
    scores = np.ones((2, 3))
    for found in (scores, (scores, np.ones((2, 7, 4)))):
        assert finetuning.logits(EvalPrediction(found, np.ones(2))) is scores


def test_padding() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(InputError, match="no padding token"):
        finetuning.need_padding(tokenizer)
    tokenizer.eos_token = "a"
    finetuning.need_padding(tokenizer)
    assert tokenizer.pad_token == "a"


def test_heads_of_a_text_classifier() -> None:
    config = BertConfig(**TINY, vocab_size=10)
    assert finetuning.head_names(BertForSequenceClassification(config)) == ["classifier"]


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ("", 1e-2),
        ("--preset paper", 1e-1),
        ("--method lora", 1e-3),
        ("--method full --preset paper", 1e-4),
        ("--learning_rate 0.5", 0.5),
    ],
)
def test_a_rate_for_each_method(tmp_path, given, rate) -> None:
    kinds = (text_classification.Arguments, finetuning.MethodArguments, TrainingArguments)
    _, method, training = finetuning.parse(kinds, ["--output_dir", str(tmp_path), *given.split()])
    assert training.learning_rate == rate
    assert method.head_learning_rate == 1e-3


def test_rates_are_what_the_ratings_found_best() -> None:
    path = Path(__file__).parents[2] / "docs" / "results" / "tasks-small.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tried = [row for row in rows if row["split"] == "validation" and row["task"] == "ratings"]
    for method, rate in finetuning.RATES.items():
        assert max((row for row in tried if row["method"] == method), key=lambda row: row["score"])["rate"] == rate


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--n_frequency inf", "--n_frequency"),
        ("--n_frequency nan", "--n_frequency"),
        ("--n_frequency 10.5", "--n_frequency"),
        ("--method fourierft --n_frequency 0.2", "a share, is for S2FT"),
        ("--estimate_batches -1", "--estimate_batches must be at least 1"),
        ("--estimate_batches 0", "--estimate_batches must be at least 1"),
        ("--learning_rate -1", "--learning_rate must be at least 0"),
        ("--head_learning_rate nan", "--head_learning_rate must be at least 0"),
        ("--scaling inf", "--scaling must be finite"),
        ("--export_lora -1", "--export_lora must be at least 0"),
        ("--export_lora 4 --method full", "--method full has none"),
        ("--export_lora 17", "more than the 16"),
        ("--fsdp --fsdp_config none.json", "none.json"),
        ("--fsdp --export_lora 4", "--export_lora does not go with FSDP"),
        ("--output_dir {file}", "--output_dir"),
        ("--output_dir {file}/in_it", "--output_dir"),
        ("--resume_from_checkpoint {folder}", "no folder with a checkpoint"),
        ("--resume_from_checkpoint {folder}/none", "no folder with a checkpoint"),
    ],
)
def test_refused_before_training(bert, reviews, tmp_path, ended, monkeypatch, given, words) -> None:
    monkeypatch.setattr(finetuning, "estimate_prior", None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # which --fsdp sets, for every run that follows
    file = tmp_path / "file"
    file.write_text("")
    given = given.format(file=file, folder=tmp_path)
    code, line = ended(text_classification, flags(bert, reviews, tmp_path / "out", *given.split()))
    assert code == 2
    assert words in line


def test_a_column_without_pictures() -> None:
    with pytest.raises(InputError, match="without pictures"):
        pictures.check_pictures(DatasetDict(train=Dataset.from_dict({"image": [0], "label": [0]})))


def test_fsdp_and_what_one_process_does_alone(bert, llama, reviews, instructions, tmp_path, ended, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, line = ended(text_classification, flags(bert, reviews, tmp_path, "--export_lora", "4"))
    assert (code, "--export_lora does not go with FSDP" in line) == (2, True)
    data = ["--train_file", str(instructions / "chat.jsonl"), "--questions", str(instructions / "questions.jsonl")]
    code, line = ended(instruction_tuning, quick(tmp_path, "--model_name_or_path", llama, *data))
    assert (code, "--questions does not go with FSDP" in line) == (2, True)


def test_the_prior_is_estimated_on_the_trainers_device(monkeypatch) -> None:
    """Under FSDP and with --bf16_full_eval the Trainer leaves the model on the CPU, and gives batches on its device."""
    found = []
    monkeypatch.setattr(
        finetuning, "initialize_s2ft_weights", lambda model, *_, **more: found.append((model.weight.device.type, more))
    )
    args = SimpleNamespace(device=torch.device("meta"), gradient_checkpointing=False, disable_tqdm=True)
    trainer = SimpleNamespace(
        model=torch.nn.Linear(2, 2), args=args, get_train_dataloader=lambda: [], is_world_process_zero=lambda: True
    )
    finetuning.estimate_prior(trainer, finetuning.MethodArguments())
    assert found == [("meta", {"estimate": "full", "progress": False})]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--n_frequency 50", "another n_frequency: 60, not 50"),
        ("--preset paper", "another"),
        ("--targets attention", "another target_modules"),
        ("--method lora", "another peft_type"),
        ("--method full", "another --method"),
        ("", "the run has ended"),
    ],
)
def test_resuming_another_run_is_refused(bert, reviews, tmp_path_factory, ended, more, words) -> None:
    folder = tmp_path_factory.getbasetemp() / "to_resume"
    if not folder.is_dir():
        text_classification.main(flags(bert, reviews, folder, "--save_strategy", "epoch"))
    before = (folder / "results.json").read_bytes()
    again = flags(bert, reviews, folder, "--resume_from_checkpoint", "latest", *more.split())
    code, line = ended(text_classification, again)
    assert code == 2
    assert words in line
    assert (folder / "results.json").read_bytes() == before


def test_a_diverged_run_fails(bert, reviews, tmp_path, ended) -> None:
    more = ("--learning_rate", "1e38", "--head_learning_rate", "1e38", "--max_grad_norm", "0", "--weight_decay", "1")
    code, line = ended(text_classification, flags(bert, reviews, tmp_path, *more))
    assert code == 1
    assert "is not finite" in line
    assert not (tmp_path / "results.json").exists()


def test_results_are_valid_json_with_all_flags(bert, reviews, tmp_path, capsys) -> None:
    more = ("--learning_rate", "0", "--head_learning_rate", "0", "--max_train_samples", "30", "--rank", "3")
    text_classification.main(flags(bert, reviews, tmp_path, *more))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    facts = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    expected = {
        "max_train_samples": 30, "train_rows": 30, "test_rows": 32, "rank": 3, "num_train_epochs": 1,
        "per_device_train_batch_size": 8, "max_length": 64, "lr_scheduler_type": "linear", "warmup_steps": 0.06,
        "text_column": "text", "model_name_or_path": bert,
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert "prior" not in capsys.readouterr().err  # --disable_tqdm


def test_a_measure_that_is_no_number_is_null(tmp_path) -> None:
    args = SimpleNamespace(output_dir=str(tmp_path), push_to_hub=False)
    finetuning.report(SimpleNamespace(args=args, is_world_process_zero=lambda: True), {"metrics": {"r": math.nan}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"metrics": {"r": None}}


@pytest.fixture
def no_user(monkeypatch) -> None:
    """huggingface_hub's client as if it had just been made."""
    monkeypatch.setattr(hub, "_hf_api", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_upload(bert, reviews, tmp_path, no_user, monkeypatch, ended) -> None:
    asked = ("--push_to_hub", "true", "--hub_model_id", "me/mine", "--hub_token", "hf_secret")
    with ExitStack() as stack:
        address, files = stack.enter_context(fake_hub())
        monkeypatch.setattr(constants, "ENDPOINT", address)
        text_classification.main(flags(bert, reviews, tmp_path / "out", *asked))
        assert {"me/mine/results.json", "me/mine/adapter_config.json", "me/mine/README.md"} <= files.keys()
        written = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        assert files["me/mine/adapter_model.safetensors"] == written
        monkeypatch.setattr(finetuning, "peak_memory", lambda: stack.close() or 0)  # from here on there is no hub
        code, line = ended(text_classification, flags(bert, reviews, tmp_path / "failed", *asked))
        assert code == 1
        assert "The upload failed" in line
        assert (tmp_path / "failed" / "results.json").is_file()
    code, line = ended(text_classification, flags(bert, reviews, tmp_path / "offline", *asked))
    assert code == 2
    assert "--push_to_hub" in line
    assert not (tmp_path / "offline" / "results.json").exists()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_exported_lora_gives_the_same_logits(instructions, tmp_path, request, name) -> None:
    model = request.getfixturevalue(name)
    data = ["--train_file", str(instructions / "alpaca.json"), "--num_train_epochs", "1", "--max_length", "32"]
    more = ["--learning_rate", "1e-1", "--export_lora", "0", "--save_strategy", "no"]
    instruction_tuning.main(quick(tmp_path, "--model_name_or_path", model, *data, *more))
    tokens = torch.tensor([[1, 5, 6, 7]])
    logits = []
    for adapter in (None, tmp_path, tmp_path / "lora"):
        loaded = AutoModelForCausalLM.from_pretrained(model)
        if adapter is not None:
            loaded = PeftModel.from_pretrained(loaded, adapter)
        with torch.no_grad():
            logits.append(loaded.eval()(input_ids=tokens).logits)
    base, adapted, lora = logits
    assert not torch.allclose(adapted, base, atol=1e-3)
    torch.testing.assert_close(lora, adapted, rtol=1e-4, atol=1e-5)
