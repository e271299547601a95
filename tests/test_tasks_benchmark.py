"""benchmarks/tasks: packing, the queue and training, on tiny models and random data."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from benchmarks.tasks import __main__, cost, data, runs, training, workers


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `pack` writes it: models of width 64, 40 images, 40 texts whose class is in their first token."""
    folder = tmp_path_factory.mktemp("packed")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    models = {
        "dinov2": Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14)),
        "minilm": BertModel(BertConfig(**sizes, intermediate_size=128, vocab_size=50, max_position_embeddings=48)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        path = folder / name / "model.safetensors"
        save_file(data.to_8_bits(load_file(path)), path)
    images, texts = {}, {}
    for split in ("train", "validation", "test"):
        labels = torch.randint(10, (70,), dtype=torch.uint8)
        images[split] = (labels[:, None, None] * 25 + torch.randint(5, (70, 28, 28))).to(torch.uint8)
        images[f"{split}_labels"] = labels
        for task in ("ratings", "sources"):
            tokens = torch.randint(5, 50, (70, 12))
            tokens[:, 0] = torch.arange(70) % 3 + 2
            tokens[:, 9:] = 0
            texts[f"{task}_{split}"] = tokens.to(torch.int16)
            classes = (torch.arange(70) % 3).to(torch.uint8)
            texts[f"{task}_{split}_labels"] = classes if task == "sources" else classes.float() - 1 + torch.rand(70) / 5
    save_file(images, folder / "images.safetensors")
    save_file(texts, folder / "texts.safetensors")
    return folder


@pytest.fixture(scope="module")
def models(packed, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    data.unpack_models(packed, folder)
    return folder


def test_eight_bits() -> None:
    weights = {"a": torch.randn(8, 64), "b": torch.randn(8), "c": torch.randn(3, 5), "d": torch.zeros(1, 128)}
    back = data.from_8_bits(data.to_8_bits(weights))
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert back[name].dtype == torch.float32
        assert (back[name] - weight).abs().max() <= 0.5 / 127 * weight.abs().max().clamp_min(1e-9) + 2e-3
    assert data.to_8_bits(weights)["a"].dtype == torch.int8
    assert not back["d"].any()


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("ratings", "s2ft default"),
        *(pytest.param("ratings", m, marks=pytest.mark.slow) for m in runs.METHODS if m != "s2ft default"),
        pytest.param("sources", "s2ft default", marks=pytest.mark.slow),
    ],
)
def test_a_run_learns(packed, models, task, method) -> None:
    prepared = training.load_task(task, packed, models, torch.device("cpu"), epochs=4.0)
    prepared.head_rate = 1e-2
    run = replace(runs.main_run(task, method, 1, rate=runs.rates(task, method)[-2]), numbers=64)
    (row,) = training.train_together(prepared, [run], [None], until=float("inf"))
    assert "error" not in row, row["error"]
    assert row["steps"] == 20 * 70 // 32
    layers = {"full": None, "lora": 2 * runs.RANK * 64, "s2ft default": 64}.get(method, 64)
    if layers is not None:
        assert row["trained_numbers"] == 4 * layers
    assert row["score"] > 0.5
    again = next(training.train_together(prepared, [run], [None], until=float("inf")))
    assert again["score"] == row["score"]


def test_small_takes_fewer_images_and_epochs(packed, models, monkeypatch) -> None:
    monkeypatch.setattr(training, "SMALL_IMAGES", {"train": 8, "validation": 7, "test": 9})
    whole, small = (training.load_task("images", packed, models, torch.device("cpu"), small=s) for s in (False, True))
    for split, size in training.SMALL_IMAGES.items():
        assert torch.equal(small.inputs[split], whole.inputs[split][:size])
        assert torch.equal(small.labels[split], whole.labels[split][:size])
    assert small.epochs < whole.epochs


def test_small_takes_fewer_and_short_texts(packed, models, monkeypatch) -> None:
    monkeypatch.setattr(training, "SMALL", {"train": 40, "validation": 20, "test": 100})
    monkeypatch.setattr(training, "SMALL_LENGTH", 9)
    task = training.load_task("sources", packed, models, torch.device("cpu"), small=True)
    assert [tuple(task.inputs[split].shape) for split in ("train", "validation", "test")] == [(40, 9), (20, 9), (70, 9)]
    assert [len(task.labels[split]) for split in ("train", "validation", "test")] == [40, 20, 70]
    monkeypatch.setattr(training, "SMALL_LENGTH", 8)
    assert not len(training.load_task("sources", packed, models, torch.device("cpu"), small=True).labels["test"])


def test_a_failing_run_does_not_stop_the_others(packed, models) -> None:
    prepared = training.load_task("images", packed, models, torch.device("cpu"), epochs=0.02)
    good = replace(runs.main_run("images", "s2ft default", 1, rate=1e-3), numbers=64)
    bad = replace(good, numbers=10**9)
    rows = list(training.train_together(prepared, [bad, good], [None, None], until=float("inf")))
    assert "more than" in rows[0]["error"]
    assert 0 <= rows[1]["score"] <= 1
    assert not list(training.train_together(prepared, [good], [None], until=0)) or prepared.epochs * 70 // 64 < 50


@pytest.mark.slow
def test_the_queue_ends_with_every_row_and_goes_on(packed, tmp_path) -> None:
    wanted = [r for r in runs.queue(["sources"]) if r.method in ("full", "s2ft paper")]
    wanted = [replace(run, numbers=64) for run in wanted if run.seed < 2]
    path = tmp_path / "rows.jsonl"
    settings = {"device": "cpu", "workers": 1, "together": 1, "seconds": 600, "epochs": 0.2}
    bad = replace(wanted[-1], options=(("sampling", "nonsense"),))
    rows = workers.run_queue([*wanted, bad], path, packed, **settings)
    assert len(rows) == len(wanted) == 2 * (3 + 1)
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]
    for method in ("full", "s2ft paper"):
        (test,) = (row for row in rows if row["method"] == method and row["split"] == "test")
        tried = [row for row in rows if row["method"] == method and row["split"] == "validation"]
        assert test["rate"] == max(tried, key=runs.score)["rate"]
    before = path.read_text()
    workers.run_queue(wanted, path, packed, **settings)
    assert path.read_text() == before
    assert all((row["epochs"], row["small"]) == (0.2, False) for row in rows)


@pytest.mark.parametrize("setting", [{"epochs": 1.0}, {"epochs": 1.0, "small": True}, {"epochs": 0.1, "small": False}])
def test_rows_of_another_setting_are_not_mixed(packed, tmp_path, setting) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(runs.main_run("sources", "lora", 0).row() | setting) + "\n")
    with pytest.raises(ValueError, match="another --rows"):
        workers.run_queue([], path, packed, device="cpu", workers=1, together=1, seconds=1)


@pytest.mark.parametrize(("flags", "name"), [([], "tasks.jsonl"), (["--small"], "tasks-small.jsonl")])
def test_small_rows_have_a_file_of_their_own(monkeypatch, flags, name) -> None:
    paths = []
    monkeypatch.setattr(workers, "run_queue", lambda queue, path, *_, **__: paths.append(path))
    monkeypatch.setattr(sys, "argv", ["benchmarks.tasks", "run", *flags])
    __main__.main()
    assert [path.name for path in paths] == [name]


def test_cost_has_a_row_a_method(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cost, "STEPS", 1)
    cost.measure(tmp_path / "cost.json", "cpu", size=96, side=32, batch=2, rounds=2)
    rows = {row["method"]: row for row in json.loads((tmp_path / "cost.json").read_text())}
    assert tuple(rows) == runs.METHODS
    assert all(row["seconds_an_epoch"] > 0 and row["memory_gb"] > 0 for row in rows.values())
    assert rows["lora"]["trained_numbers"] == 24 * 8 * 2 * 96
    assert rows["fourierft"]["trained_numbers"] == 24 * 6000
    for preset in ("paper", "default"):
        row = rows[f"s2ft {preset}"]
        assert 24 * 2900 < row["trained_numbers"] <= 24 * 3000
        assert all(row[f"{name}_seconds"] > 0 for name in ("prior", "order", "inverse", "apply"))


@pytest.mark.slow
@pytest.mark.skipif("S2FT_ASSETS" not in os.environ, reason="S2FT_ASSETS names no folder with the downloaded packages")
def test_real_models_and_data(tmp_path) -> None:
    """The packed DINOv2 tells clothes apart, untrained, and the packed MiniLM sources, after some steps of training."""
    data.pack(Path(os.environ["S2FT_ASSETS"]), tmp_path / "packed")
    data.unpack_models(tmp_path / "packed", tmp_path / "models")
    places, cpu = (tmp_path / "packed", tmp_path / "models"), torch.device("cpu")
    images = training.load_task("images", *places, cpu)
    assert len(images.labels["test"]) == data.IMAGES["test"]
    features, labels = {}, {}
    for split in ("train", "test"):
        batch = images.batch(split, torch.arange(200))
        labels[split] = batch.pop("labels")
        with torch.no_grad():
            features[split] = images.model.dinov2(**batch).last_hidden_state[:, 0]
    features = {split: torch.nn.functional.normalize(f - f.mean(0), dim=-1) for split, f in features.items()}
    nearest = (features["test"] @ features["train"].T).argmax(1)
    assert (labels["train"][nearest] == labels["test"]).float().mean() > 0.5  # one in ten by chance
    texts = training.load_task("sources", *places, cpu, small=True)
    run = runs.main_run("sources", "s2ft default", 1, rate=1e-2)
    (row,) = training.train_together(texts, [run], [None], until=float("inf"))
    assert row["score"] > 0.6  # a third by chance


def test_choosing_waits_for_rates() -> None:
    queue = runs.queue(["images"])
    assert len({run.key() for run in queue}) == len(queue)
    assert {run.task for run in runs.queue(ablated="ratings") if run.study != "comparison"} == {"ratings"}
    pending = list(queue)
    assert len(workers.choose(pending, [], 100)) == 4 * len(runs.METHODS)
    assert not workers.choose(pending, [], 100)
    rows = [
        {"task": "images", "method": "lora", "split": "validation", "rate": r, "score": float("nan")} for r in (1, 2, 4)
    ]
    assert runs.best_rate(rows, "images", "lora") is None
    rows.append({"task": "images", "method": "lora", "split": "validation", "rate": 3, "score": 0.1})
    assert runs.best_rate(rows, "images", "lora") == 3
    chosen = workers.choose(pending, rows, 100)
    assert {run.method for run in chosen} == {"lora"}
    assert {run.rate for run in chosen} == {3}
