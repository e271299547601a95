"""The table of a comparison: rows of means, paired differences, and how they are shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .cells import Cell
from .methods import BASE, Method
from .statistics import mean_and_error, paired_difference

METRICS = ("dino", "clip_i", "clip_t", "lpips", "drift", "drift_clip")
_SCORE_NAMES = {"drift": "drift_lpips"}
HEADS = {
    "dino": "DINO ↑", "clip_i": "CLIP-I ↑", "clip_t": "CLIP-T ↑", "lpips": "LPIPS ↑", "drift": "drift ↓",
}  # fmt: skip


def summarize(methods: Sequence[Method], cells: Iterable[Cell], beside: str | None = None) -> dict[str, Any]:
    """Rows of the table, paired differences of every two methods (or of one, `beside` all others), and all cells."""
    found = [(cell, result) for cell in cells if (result := cell.result()) is not None]
    rows, values = [], {}
    for method in methods:
        own = [(cell, result) for cell, result in found if cell.method == method]
        if not own:
            continue
        row: dict[str, Any] = {"method": method.name, "title": method.title, "cells": len(own)}
        for name in ("trainable", "share", "bytes", "seconds", "peak_mb"):
            row[name] = statistics.median(result[name] for _, result in own)
        for metric in METRICS:
            scores = {
                (cell.subject.name, cell.seed): result["scores"][_SCORE_NAMES.get(metric, metric)]
                for cell, result in own
            }
            row[metric] = mean_and_error(list(scores.values()))
            values[method.name, metric] = scores
        rows.append(row)
    real = {cell.subject.name: result["real"] for cell, result in found}
    names = [row["method"] for row in rows if row["method"] != BASE.name]
    paired = [
        {"a": a, "b": b, "metric": metric, **paired_difference(values[a, metric], values[b, metric])}
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if beside in (None, a, b)
        for metric in METRICS
    ]
    kept = ("rate", "subject", "seed", "trainable", "bytes", "seconds", "peak_mb", "scores")
    return {
        "rows": rows,
        "real": {m: mean_and_error([r[m] for r in real.values()]) for m in ("dino", "clip_i", "lpips")},
        "paired": paired,
        "cells": [{"method": c.method.name, **{key: result[key] for key in kept}} for c, result in found],
    }


def markdown(found: dict[str, Any], own: str) -> str:
    """The table of a report, and the differences of one method from every other."""
    lines = [
        "| method | " + " | ".join(HEADS.values()) + " | held out ↓ | trainable | share | file | seconds | memory |",
        "| --- |" + " --- |" * (len(HEADS) + 6),
    ]
    real = {metric: f"{_plain(found['real'].get(metric))}" for metric in HEADS}
    lines.append("| real photos | " + " | ".join(real.values()) + " | | | | | | |")
    for row in found["rows"]:
        sizes = (
            f"{row['trainable']:,.0f} | {row['share']:.2%} | {row['bytes'] / 1e3:,.0f} kB | {row['seconds']:.0f} | "
            f"{row['peak_mb']:.0f} MB"
            if row["trainable"]
            else "0 | | | |"
        )
        losses = [loss for loss in found["trials"].get(row["method"], {}).values() if loss is not None]
        held_out = f"{min(losses):.3f}" if losses else "–" if row["trainable"] else "1.000"
        scores = " | ".join(_plain(row[m]) for m in HEADS)
        lines.append(f"| {row['title']} | {scores} | {held_out} | {sizes} |")
    titles = {row["method"]: row["title"] for row in found["rows"]}
    if own in titles:
        lines += ["", f"{titles[own]}, minus (95 % interval; bold where it excludes zero):", ""]
        lines += ["| | " + " | ".join(HEADS.values()) + " |", "| --- |" + " --- |" * len(HEADS)]
        for other in titles:
            if other in (own, BASE.name):
                continue
            cells = [_difference(found["paired"], own, other, metric) for metric in HEADS]
            lines.append(f"| {titles[other]} | " + " | ".join(cells) + " |")
    counts = f"{len(found['subjects'])} subjects, {found['seeds']} seeds each; mean ± standard error over trainings"
    rates = ", ".join(f"{titles[name]} {rate:.1e}" for name, rate in found["rates"].items() if name in titles)
    used = ", ".join(f"{key.upper()}: {name}" for key, name in found["protocol"]["encoders"])
    held_out = f"mean loss on unseen pictures of {len(found['development'])} other subjects"
    lines += [
        "",
        f"{counts}. Learning rates: {rates}. Held out: {held_out}, relative to the base's, at that rate. Drift "
        f"by LPIPS. Encoders: {used}.",
    ]
    if found["failed"]:
        lines += ["", f"{len(found['failed'])} trainings failed and are not in the table."]
    return "\n".join(lines)


def _plain(value: dict[str, float | None] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.3f}" + (f" ± {value['stderr']:.3f}" if value["stderr"] is not None else "")


def _difference(paired: list[dict], a: str, b: str, metric: str) -> str:
    for entry in paired:
        if entry["metric"] == metric and {entry["a"], entry["b"]} == {a, b}:
            sign = 1 if entry["a"] == a else -1
            if entry["low"] is None:
                return f"{sign * entry['mean']:+.3f}"
            low, high = sorted((sign * entry["low"], sign * entry["high"]))
            text = f"{sign * entry['mean']:+.3f} ({low:+.3f} … {high:+.3f})"
            return f"**{text}**" if low > 0 or high < 0 else text
    return "–"
