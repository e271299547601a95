"""examples/text_classification.py, end to end on a tiny encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import text_classification
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from s2ft_diffusion.dreambooth.process import exit_codes
from s2ft_diffusion.errors import InputError
from tests.examples.conftest import GRID, quick


def flags(bert: str, reviews: Path, output: Path, *more: str) -> list[str]:
    files = ["--train_file", str(reviews / "train.csv"), "--test_file", str(reviews / "test.csv")]
    return quick(output, "--model_name_or_path", bert, *files, "--num_train_epochs", "2", *more)


@pytest.mark.parametrize("method", ["s2ft", "lora", "fourierft"])
def test_trains_saves_and_loads(bert, reviews, tmp_path, method) -> None:
    more = ("--method", method, "--head_learning_rate", "1e-2", "--learning_rate", "1e-1", "--eval_strategy", "no")
    export = ("--export_lora", "0" if method == "s2ft" else "16") if method != "lora" else ()
    facts = text_classification.main(flags(bert, reviews, tmp_path, *more, *export, "--save_strategy", "no"))
    assert 0 <= facts["metrics"]["test_accuracy"] <= 1
    adapted = facts["trainable"] - facts["trainable_head"]
    assert adapted == {"s2ft": 4 * GRID, "lora": 4 * 2 * 2 * 16, "fourierft": 4 * 60}[method]
    assert facts["trainable_head"] == 2 * 16 + 2
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == json.loads(json.dumps(facts))
    assert ("prior" in facts["seconds"]) == (method == "s2ft")
    tokens = AutoTokenizer.from_pretrained(tmp_path)(["great film", "a dull plot"], return_tensors="pt", padding=True)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2).eval()
    logits = loaded(**tokens).logits
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2).eval()
    base.classifier.load_state_dict(loaded.base_model.model.classifier.modules_to_save["default"].state_dict())
    assert not torch.allclose(logits, base(**tokens).logits, atol=1e-4)  # the adapter counts, not the head alone
    if export:
        lora = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
        assert lora.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(lora(**tokens).logits, logits, rtol=1e-4, atol=1e-5)


def test_the_reported_measure_is_the_saved_adapters(bert, reviews, tmp_path) -> None:
    more = ("--label_column", "score", "--learning_rate", "1e-1", "--eval_strategy", "no", "--save_strategy", "no")
    facts = text_classification.main(flags(bert, reviews, tmp_path, *more))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    test = load_dataset("csv", data_files=str(reviews / "test.csv"), split="train")
    tokens = AutoTokenizer.from_pretrained(tmp_path)(list(test["text"]), return_tensors="pt", padding=True)
    with torch.no_grad():
        found = loaded(**tokens).logits.squeeze(-1)
    expected = torch.corrcoef(torch.stack([found, torch.tensor(test["score"])]))[0, 1].item()
    assert facts["metrics"]["test_pearson"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["s2ft", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "fourierft"))])
def test_resumed_run_ends_where_a_whole_one_does(bert, reviews, tmp_path, method) -> None:
    def adapter(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "adapter_model.safetensors")

    more = ("--method", method, "--save_total_limit", "5")
    text_classification.main(flags(bert, reviews, tmp_path / "whole", *more))
    for name in ("checkpoint-8", "checkpoint-16"):
        assert (tmp_path / "whole" / name).is_dir()
    first, half = tmp_path / "whole" / "checkpoint-8", tmp_path / "half"
    text_classification.main(flags(bert, reviews, half, *more, "--resume_from_checkpoint", str(first)))
    whole, resumed = adapter(tmp_path / "whole"), adapter(half)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], value) for name, value in adapter(first).items())


def test_full_fine_tuning_saves_a_model(bert, reviews, tmp_path) -> None:
    facts = text_classification.main(flags(bert, reviews, tmp_path, "--method", "full", "--learning_rate", "1e-3"))
    assert facts["trainable"] == facts["parameters"]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 2


def test_a_rate_of_its_own_for_the_head(bert, reviews, tmp_path) -> None:
    more = ("--learning_rate", "0", "--head_learning_rate", "1e-2", "--save_strategy", "no")
    text_classification.main(flags(bert, reviews, tmp_path, *more))
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert all(not value.any() for name, value in state.items() if "coefficients" in name)
    assert state["base_model.model.classifier.bias"].any()


@pytest.mark.parametrize(
    ("task", "measures"),
    [
        ("cola", {"mcc", "accuracy"}),
        ("mnli", {"accuracy"}),
        ("stsb", {"pearson", "spearman"}),
    ],
)
def test_glue_as_the_benchmark_defines_it(bert, tmp_path, monkeypatch, task, measures) -> None:
    columns, _ = text_classification.GLUE[task]
    label = Value("float32") if task == "stsb" else ClassLabel(num_classes=3 if task == "mnli" else 2)
    features = Features({**{name: Value("string") for name in columns}, "label": label})

    def split(count: int) -> Dataset:
        words = ["a film", "great story", "poor cast", "the plot was dull"]
        rows = {name: [words[(i + len(name)) % 4] for i in range(count)] for name in columns}
        labels = [i % 5 / 2 if task == "stsb" else i % label.num_classes for i in range(count)]
        return Dataset.from_dict({**rows, "label": labels}, features=features)

    names = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    data = DatasetDict({"train": split(16), **{name: split(12) for name in names}, "test": split(4)})
    monkeypatch.setattr(
        text_classification, "load_dataset", lambda *found: data if found == ("nyu-mll/glue", task) else None
    )
    more = ("--num_train_epochs", "1", "--learning_rate", "3e-2")
    facts = text_classification.main(quick(tmp_path, "--model_name_or_path", bert, "--task", task, *more))
    assert {f"validation_{name}" for name in measures} <= facts["metrics"].keys()
    assert ("validation_mismatched_accuracy" in facts["metrics"]) == (task == "mnli")
    assert not any(name.startswith("test") for name in facts["metrics"])  # GLUE's test splits have no labels


def test_a_head_of_another_size_is_made_anew(bert, reviews, tmp_path) -> None:
    three = BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    three.save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "three")
    more = ("--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no")
    facts = text_classification.main(flags(str(tmp_path / "three"), reviews, tmp_path / "out", *more))
    assert facts["steps"] == 1


def test_measures_on_known_numbers() -> None:
    measures = text_classification.MEASURES
    assert measures["mcc"]([0, 0, 1, 1], [0, 1, 1, 1]) == pytest.approx(1 / 3**0.5)
    assert measures["pearson"]([1.0, 2.0, 3.0], [2.0, 4.0, 6.5]) == pytest.approx(4.5 / (61 / 3) ** 0.5)
    assert measures["spearman"]([1.0, 2.0, 3.0], [1.0, 10.0, 11.0]) == pytest.approx(1.0)


def write(folder: Path, name: str, lines: list[str]) -> str:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def refused(argv: list[str], capsys) -> str:
    """The one line of an exit with code 2."""
    with pytest.raises(SystemExit) as stopped, exit_codes("text_classification.py"):
        text_classification.main(argv)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("text_classification.py: ")]
    assert len(lines) == 1
    return lines[0]


def test_bad_input_is_one_line(bert, reviews, tmp_path, capsys) -> None:
    model = ["--model_name_or_path", bert]
    good = write(tmp_path, "good.csv", ["text,label", "a film,good", "a plot,bad"])
    assert "'sst3'" in refused(quick(tmp_path, *model, "--task", "sst3"), capsys)
    assert "either --task" in refused(quick(tmp_path, *model), capsys)
    assert "no column 'words'" in refused(flags(bert, reviews, tmp_path, "--text_column", "words"), capsys)
    unlabelled = write(tmp_path, "unlabelled.csv", ["text,label", "a film,good", "a plot,"])
    pair = ["--train_file", unlabelled, "--validation_file", good]
    assert "Row 2 has no label" in refused(quick(tmp_path, *model, *pair), capsys)
    single = write(tmp_path, "single.csv", ["text,label", "a film,good", "a plot,good"])
    assert "one class" in refused(quick(tmp_path, *model, "--train_file", single, "--validation_file", good), capsys)
    other = write(tmp_path, "other.csv", ["text,label", "a film,ugly"])
    assert "'ugly'" in refused(quick(tmp_path, *model, "--train_file", good, "--validation_file", other), capsys)
    assert "--validation_file" in refused(quick(tmp_path, *model, "--train_file", good), capsys)
    missing = ["--train_file", str(tmp_path / "none.csv"), "--validation_file", good]
    assert "none.csv" in refused(quick(tmp_path, *model, *missing), capsys)
    assert "nowhere" in refused(flags(str(tmp_path / "nowhere"), reviews, tmp_path), capsys)
    assert "--method" in refused(flags(bert, reviews, tmp_path, "--method", "magic"), capsys)
    assert "--no_such_flag" in refused(flags(bert, reviews, tmp_path, "--no_such_flag"), capsys)
    assert "no checkpoint" in refused(flags(bert, reviews, tmp_path, "--resume_from_checkpoint", "latest"), capsys)
    too_many = refused(flags(bert, reviews, tmp_path, "--n_frequency", "5000"), capsys)
    assert "5000" in too_many
    paper = ("--preset", "paper", "--export_lora", "0")
    assert "--export_lora 0" in refused(flags(bert, reviews, tmp_path, *paper), capsys)
    assert "gama" in refused(flags(bert, reviews, tmp_path, "--s2ft_options", '{"gama": 1.0}'), capsys)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--text_column other", "has no texts but int64"),
        ("--text_column label", "three columns"),
        ("--text_pair_column text", "three columns"),
        ("--text_pair_column label", "three columns"),
        ("--max_train_samples 0", "--max_train_samples must be at least 1"),
        ("--max_train_samples -1", "--max_train_samples must be at least 1"),
        ("--max_length 0", "--max_length must be at least 1"),
        ("--max_length 65", "above the 64 tokens"),
        ("--load_best_model_at_end true --save_strategy epoch", "give a --validation_file"),
        ("--eval_strategy steps --load_best_model_at_end true --save_strategy epoch", "--load_best_model_at_end"),
    ],
)
def test_refused_before_training(bert, reviews, tmp_path, ended, given, words) -> None:
    code, line = ended(text_classification, flags(bert, reviews, tmp_path, *given.split()))
    assert code == 2
    assert words in line


def load(train: str, **more: str) -> text_classification.Task:
    return text_classification.load_task(text_classification.Arguments(train_file=train, test_file=train, **more))


def test_columns_of_any_name(tmp_path) -> None:
    lines = ["label,text,kind", "a film,great,x", "a plot,dull,y"]
    task = load(
        write(tmp_path, "swapped.csv", lines), text_column="label", text_pair_column="text", label_column="kind"
    )
    assert task.data["train"][1] == {"text": "a plot", "pair": "dull", "label": 1}
    assert task.columns == ("text", "pair")


def test_none_is_a_class_and_null_a_text(tmp_path) -> None:
    task = load(write(tmp_path, "none.csv", ["text,label", "null,None", "NaN,NA", "a film,good"]))
    assert task.classes == ["NA", "None", "good"]
    assert task.data["train"]["text"][:] == ["null", "NaN", "a film"]


@pytest.mark.parametrize(("labels", "classes"), [("0.0 1.0 2.0", ["0.0", "1.0", "2.0"]), ("0.0 1.5 2.0", None)])
def test_a_fraction_makes_a_regression(tmp_path, labels, classes) -> None:
    rows = [f"a film,{label}" for label in labels.split()]
    assert load(write(tmp_path, "numbers.csv", ["text,label", *rows])).classes == classes


def test_input_errors_are_raised_to_callers(bert, tmp_path) -> None:
    with pytest.raises(InputError, match="GLUE task"):
        text_classification.main(quick(tmp_path, "--model_name_or_path", bert, "--task", "nothing"))
