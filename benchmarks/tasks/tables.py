"""The rows as Markdown, one table a question."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .runs import METHODS, TASKS, score

TITLES = {
    "images": "DINOv2-S, Fashion-MNIST: accuracy",
    "ratings": "MiniLM, human sentiment ratings: Pearson's r",
    "sources": "MiniLM, source of a text (film, product, news): accuracy",
}
Row = Mapping[str, Any]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    parts = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(part) + " |" for part in parts)


def summary(rows: Sequence[Row]) -> str:
    """Mean, standard deviation and number of the scores, in hundredths."""
    found = [100 * score(row) for row in rows]
    if not found:
        return "–"
    spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.2f}{spread} ({len(found)})"


def difference(rows: Sequence[Row], others: Sequence[Row]) -> str:
    """Mean difference of scores of equal seeds, and a 95 % interval of it (Student's t)."""
    from scipy.stats import t

    mine, theirs = ({row["seed"]: 100 * score(row) for row in part} for part in (rows, others))
    found = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    if len(found) < 2:
        return "–"
    half = t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / len(found) ** 0.5
    return (
        f"{statistics.mean(found):+.2f} ({statistics.mean(found) - half:+.2f} … {statistics.mean(found) + half:+.2f})"
    )


def comparison(rows: Sequence[Row], task: str) -> str:
    """All methods at their best rates."""
    mine = [row for row in rows if row["task"] == task and row["study"] == "comparison"]
    tests = {m: [r for r in mine if r["method"] == m and r["split"] == "test"] for m in METHODS}
    lines = []
    for method in METHODS:
        tried = sorted((r["rate"], 100 * score(r)) for r in mine if (r["method"], r["split"]) == (method, "validation"))
        if not tried:
            continue
        numbers = next(r["trained_numbers"] for r in mine if r["method"] == method)
        best = max(tried, key=lambda pair: pair[1])[0]
        rates = ", ".join(
            f"{'**' if rate == best else ''}{value:.1f}{'**' if rate == best else ''} ({rate:g})"
            for rate, value in tried
        )
        ahead = difference(tests["s2ft default"], tests[method]) if method != "s2ft default" else ""
        lines.append([method, f"{numbers:,}", rates, summary(tests[method]), ahead])
    return table(
        ["method", "numbers", "validation (rate)", "test, mean ± s.d. (seeds)", "S²FT default minus this"], lines
    )


def variant(row: Row) -> str:
    """What an ablation's row varies."""
    study = row["study"]
    if study == "prior":
        kind = row["estimate"] if row["estimate"] != "auto" else "full"
        return f"{kind}, {row['estimate_batches']} batches"
    if study == "numbers":
        return str(row["numbers"])
    return ", ".join(f"{name} {value}" for name, value in row["options"].items())


def ablation(rows: Sequence[Row], study: str, plain: Mapping[str, str]) -> str:
    """One study: variants down, methods across.

    `plain` names what the comparison's rows are, by method; "" names them by their numbers.
    """
    mine: dict[str, dict[str, list[Row]]] = {}
    methods: dict[str, None] = {}
    ablated = {row["task"] for row in rows if row["study"] == study}
    for row in rows:
        if row["task"] not in ablated or row["split"] != "test":
            continue
        if row["study"] == study:
            name = variant(row)
        elif row["study"] == "comparison" and row["method"] in plain:
            name = plain[row["method"]] or str(row["numbers"])
        else:
            continue
        methods.setdefault(row["method"])
        mine.setdefault(name, {}).setdefault(row["method"], []).append(row)
    seeds = {row["seed"] for row in rows if row["study"] == study}
    lines = [
        [name, *(summary([r for r in found.get(method, ()) if r["seed"] in seeds]) for method in methods)]
        for name, found in sorted(mine.items(), key=lambda pair: (len(pair[0]), pair[0]))
    ]
    return table([study, *methods], lines)


def costs(path: Path) -> str:
    """Table 8's."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for row in rows:
        times = [
            f"{row[name]:.4g}" if name in row else "–"
            for name in ("inverse_seconds", "apply_seconds", "prior_seconds", "order_seconds")
        ]
        lines.append(
            [
                row["method"],
                f"{row['trained_numbers']:,}",
                f"{row['seconds_an_epoch']:.2f}",
                f"{row['memory_gb']:.1f}",
                *times,
            ]
        )
    return table(["method", "numbers", "s an epoch", "GB", "T⁻¹, s", "T, s", "prior, s", "orders, s"], lines)


def tables(rows: Sequence[Row], cost_path: Path) -> str:
    """Everything that there are rows for."""
    parts = []
    for task in TASKS:
        if any(row["task"] == task for row in rows):
            parts += [f"### {TITLES[task]}", comparison(rows, task)]
    plain = {
        "numbers": dict.fromkeys(("fourierft", "s2ft paper", "s2ft default"), ""),
        "sampling": {"s2ft paper": "sampling power", "s2ft default": "sampling power"},
        "gamma": {"s2ft paper": "gamma 1.5"},
        "order": {"s2ft paper": "rearrange nearest_neighbor", "s2ft default": "rearrange nearest_neighbor"},
        "prior": {"s2ft paper": "gradient, 16 batches", "s2ft default": "full, 16 batches"},
    }
    for study, names in plain.items():
        if any(row["study"] == study for row in rows):
            parts += [f"### {study}", ablation(rows, study, names)]
    if cost_path.exists():
        parts += ["### cost", costs(cost_path)]
    return "\n\n".join(parts)
