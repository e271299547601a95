"""Pictures of a comparison: the table as bars, differences with intervals, loss curves, and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .methods import REFERENCES
from .table import difference

if TYPE_CHECKING:
    from .cells import Cell
    from .methods import Method
    from .protocol import Protocol
    from .subjects import Subject

TITLES = {
    "dino": "DINO (higher is better)", "clip_i": "CLIP-I (higher is better)", "clip_t": "CLIP-T (higher is better)",
    "lpips": "LPIPS diversity (higher is more diverse)", "drift": "drift, LPIPS (lower is better)",
}  # fmt: skip
COLOURS = ("#2b303b", "#9aa0a6", "#4c566a", "#d08770", "#b48ead", "#88a36f", "#81a1c1", "#1f5fbf", "#6b4f9e", "#c0392b")
DIFFERENCES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "drift": "drift (lower is better)"}
BETTER, LEVEL, WORSE = "#2e8b57", "#9aa0a6", "#c0392b"
SHEET_COLUMNS = 8


def plot_bars(found: dict[str, Any], path: Path) -> None:
    """The table's scores as bars with standard errors; a dashed line where the real photos are."""
    figure = Figure(figsize=(16, 3.6), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        shown = [i for i, row in enumerate(found["rows"]) if row[metric]]
        rows = [found["rows"][i] for i in shown]
        means = [row[metric]["mean"] for row in rows]
        errors = [row[metric]["stderr"] or 0.0 for row in rows]
        colours = [COLOURS[i % len(COLOURS)] for i in shown]
        axes.bar(range(len(rows)), means, yerr=errors, color=colours, capsize=3)
        axes.set_xticks(range(len(rows)), [row["title"] for row in rows], rotation=40, ha="right", fontsize=8)
        bounds = [m - e for m, e in zip(means, errors, strict=True)] + [
            m + e for m, e in zip(means, errors, strict=True)
        ]
        if real := found["real"].get(metric):
            axes.axhline(real["mean"], color="black", linestyle="--", linewidth=1)
            bounds.append(real["mean"])
        span = max(bounds) - min(bounds)
        axes.set_ylim(max(0.0, min(bounds) - 0.25 * span), max(bounds) + 0.1 * span)  # bars do not begin at zero
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)


def plot_differences(found: dict[str, Any], own: str, path: Path) -> None:
    """One method minus each other, a part for each score: means and 95 % intervals, to the right where it is better."""
    titles = {row["method"]: row["title"] for row in found["rows"]}
    known = {other: {m: difference(found["paired"], own, other, m) for m in DIFFERENCES} for other in titles}
    known = {other: scores for other, scores in known.items() if any(scores.values())}
    figure = Figure(figsize=(9.6, 1.5 + 0.42 * max(1, len(known))), layout="constrained")
    for axes, (metric, title) in zip(
        figure.subplots(1, len(DIFFERENCES), sharey=True), DIFFERENCES.items(), strict=True
    ):
        better = -1 if metric == "drift" else 1
        for place, scores in enumerate(known.values()):
            if (value := scores[metric]) is None:
                continue
            ends = [value[end] if value[end] is not None else value["mean"] for end in ("low", "high")]
            worst = min(better * end for end in ends)
            best = max(better * end for end in ends)
            colour = BETTER if worst > 0 else WORSE if best < 0 else LEVEL
            axes.plot(ends, [place, place], color=colour, linewidth=3, solid_capstyle="round")
            axes.plot(value["mean"], place, "o", color=colour, markersize=8)
        axes.axvline(0, color="black", linewidth=1)
        axes.margins(x=0.12, y=0.25)
        axes.set_title(title, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if better < 0:
            axes.invert_xaxis()
    axes = figure.axes[0]
    axes.set_yticks(range(len(known)), [f"minus {titles[other]}" for other in known], fontsize=9)
    axes.invert_yaxis()
    figure.suptitle(
        f"{titles.get(own, own)}, beside others: to the right is better; grey where the interval has zero",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def plot_losses(cells: Sequence[Cell], methods: Sequence[Method], path: Path, window: int = 25) -> None:
    """Mean training losses of the methods over all their trainings, smoothed."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(methods, start=len(REFERENCES)):
        curves = [found["losses"] for cell in cells if cell.method == method and (found := cell.result())]
        if not curves:
            continue
        mean = np.mean(curves, axis=0)
        width = min(window, len(mean))
        smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
        axes.plot(np.arange(len(smooth)) + width, smooth, label=method.title, color=COLOURS[i % len(COLOURS)])
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {window} steps")
    if axes.lines:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_sheet(subject: Subject, cells: Sequence[Cell], protocol: Protocol, path: Path) -> None:
    """A contact sheet: the photos, then one row a method, one column a prompt, all at the same seed."""
    from .generation import image_path

    prompts = protocol.prompts(subject)
    prompts = [prompts[i] for i in np.linspace(0, len(prompts) - 1, min(SHEET_COLUMNS, len(prompts))).astype(int)]
    rows: list[tuple[str, list[Image.Image]]] = [("photos", subject.real()[: len(prompts)])]
    for cell in cells:
        paths = [image_path(cell.images, prompt.text, 0) for prompt in prompts]
        if all(p.exists() for p in paths):
            rows.append((cell.method.title, [Image.open(p) for p in paths]))
    figure = Figure(figsize=(1.2 * len(prompts) + 1.2, 1.25 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), len(prompts), squeeze=False)
    for axes, (title, images) in zip(grid, rows, strict=True):
        for i, cell_axes in enumerate(axes):
            cell_axes.set_xticks([])
            cell_axes.set_yticks([])
            cell_axes.set_frame_on(False)
            if i < len(images):
                cell_axes.imshow(images[i], interpolation="nearest")
        axes[0].set_ylabel(title, fontsize=8)
    for axes, prompt in zip(grid[min(1, len(rows) - 1)], prompts, strict=True):
        axes.set_title("\n".join(wrap(prompt.text.removeprefix("a photo of "), 22)), fontsize=6)
    figure.savefig(path, dpi=110)


def plot_spectrum(report: dict[str, Any], path: Path) -> None:
    """Where energy lies, how amplitudes are spread, what keeping few of them loses, and what positions reach."""
    rows = {row["construction"]: row for row in report["rows"]}
    names = list(rows)
    shown = [name for name in names if name == names[0] or name.startswith(("paper:", "default:", "default, ordered"))]
    figure = Figure(figsize=(15, 3.9), layout="constrained")
    power, amplitude, error, reached = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.25))
    for colour, name in zip(COLOURS[2:], shown, strict=False):
        row = rows[name]
        bins = len(row["radial_power"])
        power.plot((np.arange(bins) + 0.5) / bins, row["radial_power"], label=name, color=colour)
        amplitude.plot(np.linspace(0, 1, len(row["amplitude"])), row["amplitude"], color=colour)
        for kind, style in (("complex", "-"), ("real", ":")):
            error.plot(report["shares"], row["error"][kind], style, color=colour)
    power.set(title="energy of the true change by frequency", xlabel="distance from frequency zero", yscale="log")
    power.legend(fontsize=7)
    amplitude.set(title="amplitudes of its spectrum", xlabel="quantile", ylabel="relative to their RMS", yscale="log")
    amplitude.set_ylim(bottom=1e-2)
    error.set(title="error of keeping the largest (dotted: real)", xlabel="share of numbers kept", xscale="log")
    places = np.arange(len(names))
    for offset, key, label in ((-0.2, "sampled", "sampled"), (0.2, "top", "the largest n")):
        means = [rows[name][key]["mean"] for name in names]
        errors = [rows[name][key]["stderr"] or 0.0 for name in names]
        reached.barh(places + offset, means, 0.4, xerr=errors, label=label)
    reached.set_yticks(places, names, fontsize=7)
    reached.invert_yaxis()
    reached.set_title("share of its energy within reach")
    reached.legend(fontsize=7)
    figure.savefig(path, dpi=110)
