"""Pictures of a comparison: the table as bars, likeness against faithfulness, loss curves, and contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .methods import REFERENCES

if TYPE_CHECKING:
    from .cells import Cell
    from .methods import Method
    from .protocol import Protocol, Subject

TITLES = {
    "dino": "DINO (higher is better)", "clip_i": "CLIP-I (higher is better)", "clip_t": "CLIP-T (higher is better)",
    "lpips": "LPIPS diversity (higher is more diverse)", "drift": "drift, LPIPS (lower is better)",
}  # fmt: skip
COLOURS = ("#2b303b", "#9aa0a6", "#4c566a", "#d08770", "#b48ead", "#88a36f", "#81a1c1", "#1f5fbf", "#6b4f9e", "#c0392b")
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


def plot_tradeoff(found: dict[str, Any], path: Path) -> None:
    """DINO against CLIP-T, with the trainable share as the area of the dots.

    A dashed line leads from the base to what training aims at, the subject as it is drawn.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    scored = [row for row in found["rows"] if row["clip_t"] and row["dino"]]  # not where all trainings failed
    for i, row in enumerate(scored):
        area = 40 + 25 * max(0.0, np.log10(max(row["share"] or 0, 1e-6)) + 5) ** 2
        x, y = row["clip_t"], row["dino"]
        colour = COLOURS[i % len(COLOURS)]
        axes.errorbar(
            x["mean"], y["mean"], xerr=x["stderr"] or 0, yerr=y["stderr"] or 0, color=colour, linewidth=1, zorder=1
        )
        share = f", {row['share']:.2%}" if row["share"] else ""
        label = f"{row['title']}{share}"
        axes.scatter(x["mean"], y["mean"], s=area, color=colour, alpha=0.75, zorder=2, label=label)
    aim = [row for row in scored if row["method"] in [method.name for method in REFERENCES]]
    if len(aim) == len(REFERENCES):
        ends = ([row[metric]["mean"] for row in aim] for metric in ("clip_t", "dino"))
        axes.plot(*ends, color="grey", linestyle="--", linewidth=1, zorder=0, label="from one to the other")
    axes.margins(0.18)
    axes.legend(fontsize=8, loc="lower left", markerscale=0.7, labelspacing=0.6)  # labels at the dots would overlap
    axes.set_xlabel("CLIP-T: faithful to the prompt")
    axes.set_ylabel("DINO: like the subject")
    axes.set_title("Above and to the right is better; larger dots train more", fontsize=9)
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
