"""The table of a comparison: rows of means, paired differences, and how they are shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .cells import Cell, Trial
from .methods import REFERENCES, Method
from .statistics import mean_and_error, paired_difference

METRICS = ("dino", "clip_i", "clip_t", "lpips", "drift", "drift_clip", "held_out")
SIZES = ("trainable", "share", "bytes", "seconds", "peak_mb")
_UNTRAINED = [method.name for method in REFERENCES]
_SCORE_NAMES = {"drift": "drift_lpips"}
HEADS = {
    "dino": "DINO ↑", "clip_i": "CLIP-I ↑", "clip_t": "CLIP-T ↑", "lpips": "LPIPS ↑", "drift": "drift ↓",
    "held_out": "held out ↓",
}  # fmt: skip


def summarize(
    methods: Sequence[Method], cells: Iterable[Cell], trials: Iterable[Trial], beside: str | None = None
) -> dict[str, Any]:
    """Rows of the table, paired differences of every two methods (or of one, `beside` all others), and all cells.

    `trials` are those at the rates that were chosen: on subjects of their own, they say what `held_out` is.
    """
    found = [(cell, result) for cell in cells if (result := cell.result()) is not None]
    tried = [(trial, result) for trial in trials if (result := trial.result()) is not None]
    rows, values = [], {}
    for method in methods:
        own = [(cell, result) for cell, result in found if cell.method == method]
        judged = {_place(t): result["held_out_loss"] for t, result in tried if t.method == method}
        if not own and not judged:
            continue
        row: dict[str, Any] = {"method": method.name, "title": method.title, "cells": len(own)}
        for name in SIZES:
            sizes = [result[name] for _, result in own if name in result]
            row[name] = statistics.median(sizes) if sizes else None
        for metric in METRICS:
            key = _SCORE_NAMES.get(metric, metric)
            scores = judged if metric == "held_out" else {_place(c): result["scores"][key] for c, result in own}
            scores = {place: score for place, score in scores.items() if score is not None}
            row[metric] = mean_and_error(list(scores.values())) if scores else None
            values[method.name, metric] = scores
        rows.append(row)
    real = {cell.subject.name: result["real"] for cell, result in found}
    names = [row["method"] for row in rows if row["method"] not in _UNTRAINED]
    paired = [
        {"a": a, "b": b, "metric": metric, **paired_difference(values[a, metric], values[b, metric])}
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if beside in (None, a, b)
        for metric in METRICS
        if values[a, metric] and values[b, metric]
    ]
    kept = ("rate", "subject", "seed", *(name for name in SIZES if name != "share"), "scores")
    return {
        "rows": rows,
        "real": {m: mean_and_error([r[m] for r in real.values()]) for m in ("dino", "clip_i", "lpips") if real},
        "paired": paired,
        "cells": [{"method": c.method.name, **{key: result.get(key) for key in kept}} for c, result in found],
    }


def _place(cell: Cell) -> tuple[str, int]:
    return cell.subject.name, cell.seed


def markdown(found: dict[str, Any], own: str) -> str:
    """The table of a report, and the differences of one method from every other."""
    lines = [
        "| method | " + " | ".join(HEADS.values()) + " | trainable | share | file | seconds | memory |",
        "| --- |" + " --- |" * (len(HEADS) + 5),
    ]
    if found["real"]:
        real = {metric: f"{_plain(found['real'].get(metric))}" for metric in HEADS}
        lines.append("| real photos | " + " | ".join(real.values()) + " | | | | | |")
    for row in found["rows"]:
        sizes = "0 | | | |" if row["trainable"] == 0 else "– | | | |"
        if row["trainable"]:
            sizes = (
                f"{row['trainable']:,.0f} | {row['share']:.2%} | {row['bytes'] / 1e3:,.0f} kB | {row['seconds']:.0f} | "
                f"{row['peak_mb']:.0f} MB"
            )
        lines.append(f"| {row['title']} | " + " | ".join(_plain(row[m]) for m in HEADS) + f" | {sizes} |")
    titles = {row["method"]: row["title"] for row in found["rows"]}
    if own in titles:
        lines += ["", f"{titles[own]}, minus (95 % interval; bold where it excludes zero):", ""]
        lines += ["| | " + " | ".join(HEADS.values()) + " |", "| --- |" + " --- |" * len(HEADS)]
        for other in titles:
            if other in (own, *_UNTRAINED):
                continue
            cells = [_difference(found["paired"], own, other, metric) for metric in HEADS]
            lines.append(f"| {titles[other]} | " + " | ".join(cells) + " |")
    rates = ", ".join(f"{titles[name]} {rate:.1e}" for name, rate in found["rates"].items() if name in titles)
    used = ", ".join(f"{key.upper()}: {name}" for key, name in found["protocol"]["encoders"])
    lines += [
        "",
        f"{_counted(found['subjects'], found['seeds'])}; held out: loss on unseen pictures, relative to the base's, "
        f"{_counted(found['development'], found['trial_seeds'])}, which chose the learning rates; mean ± standard "
        f"error over trainings. Learning rates: {rates}. Drift by LPIPS. Encoders: {used}.",
    ]
    if found["failed"]:
        lines += ["", f"{len(found['failed'])} trainings failed and are not in the table."]
    return "\n".join(lines)


def markdown_of_trials(found: dict[str, Any], own: str) -> str:
    """The table of a report without images: the loss on unseen pictures, one method's minus each other's, and rates."""
    title = next(row["title"] for row in found["rows"] if row["method"] == own)
    lines = [f"| method | held out ↓ | {title}, minus | rate |", "| --- | --- | --- | --- |"]
    for row in found["rows"]:
        name = row["method"]
        difference = "" if name == own else _difference(found["paired"], own, name, "held_out")
        lines.append(f"| {row['title']} | {_plain(row['held_out'])} | {difference} | {found['rates'][name]:.1e} |")
    lines += [
        "",
        f"Loss on unseen pictures, relative to the base's, {_counted(found['development'], found['trial_seeds'])}, at "
        "the best of as many learning rates for each; mean ± standard error over trainings, 95 % intervals, bold where "
        "they exclude zero.",
    ]
    return "\n".join(lines)


def _counted(subjects: Sequence[str], seeds: int) -> str:
    return f"{len(subjects)} subjects, {seeds} seed{'s' * (seeds != 1)} each"


def _plain(value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.3f}" + (f" ± {value['stderr']:.3f}" if value["stderr"] is not None else "")


def difference(paired: Sequence[dict[str, Any]], a: str, b: str, metric: str) -> dict[str, float | None] | None:
    """How much method a is above b in a metric: `mean`, and `low` and `high` or None; None where both were not run."""
    for entry in paired:
        if entry["metric"] == metric and (entry["a"], entry["b"]) == (a, b):
            return {key: entry[key] for key in ("mean", "low", "high")}
        if entry["metric"] == metric and (entry["a"], entry["b"]) == (b, a):
            low, high = (None if entry[key] is None else -entry[key] for key in ("high", "low"))
            return {"mean": -entry["mean"], "low": low, "high": high}
    return None


def _difference(paired: Sequence[dict[str, Any]], a: str, b: str, metric: str) -> str:
    found = difference(paired, a, b, metric)
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{found['mean']:+.3f}"
    text = f"{found['mean']:+.3f} ({found['low']:+.3f} … {found['high']:+.3f})"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text
