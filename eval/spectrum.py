"""`python -m eval spectrum`: what rearranging does to the spectrum of true weight changes, and what positions reach.

The paper's Figures 2, 4, 5 and 6 for any base and subject. The true change of the adapted projections comes from full
fine-tuning of them alone, up to the plateau of the loss, with seeds of its own for order and noise.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from s2ft_diffusion.adapters.file import Adapter, GridWeights, LayerWeights
from s2ft_diffusion.dreambooth.arguments import amount
from s2ft_diffusion.dreambooth.base import find_family
from s2ft_diffusion.dreambooth.draws import DrawStream
from s2ft_diffusion.dreambooth.folders import check_apart
from s2ft_diffusion.dreambooth.settings import BaseSettings, EstimateSettings
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.pipelines.attach import denoiser_name, inject_adapter
from s2ft_diffusion.pipelines.sources import find_adapter_file, read_any_adapter
from s2ft_diffusion.pipelines.targets import TARGETS
from s2ft_diffusion.text import printable
from s2ft_diffusion.toybox.captions import UNSEEN_TOKEN
from s2ft_diffusion.tuner.config import S2FTConfig

from . import energy
from .constructions import PRIORS, Construction, constructions
from .generation import claim
from .plots import plot_spectrum
from .prompts import check_all_read
from .statistics import mean_and_error
from .subjects import Subject, add_subject_arguments, find_subjects
from .training import ADAPTER, Run, Session

TRUTH_SEED, FIXED_SEED = 1_000_003, 2_000_003  # the true change shares no draw with a prior
TRUTH_RATE, CHECK_EVERY, PATIENCE, PLATEAU = 1e-4, 100, 3, 0.01
SHARES = torch.tensor([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4])
BINS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", default="toybox", help="base: hub id, folder, toybox, or toybox-flow")
    add_subject_arguments(parser)
    add("--adapter", help="adapter file, folder or hub id: what its own positions reach of the first subject's change")
    add("--n_frequency", type=amount, default=0.02, help="real numbers a layer, or a share of d * k")
    add("--targets", choices=[name for name in TARGETS if name != "all"], default="qv")
    add("--token", default=UNSEEN_TOKEN, help="the unique token")
    add("--truth_steps", type=int, default=3000, help="most steps of full fine-tuning")
    add("--batch", type=int, default=4, help="images a step of full fine-tuning")
    add("--resolution", type=int, help="by default the base's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output_dir", type=Path, default=Path("outputs/spectrum"))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write `spectrum.json`, `spectrum.md` and a plot; returns the report. Finished subjects are not done again.

    Raises InputError or AdapterFileError before anything is trained.
    """
    if args.truth_steps < CHECK_EVERY:
        raise InputError(f"--truth_steps must be at least {CHECK_EVERY}, got {args.truth_steps}.")
    _, subjects = find_subjects(args)
    for subject in subjects:
        words = f"{args.token} {subject.class_name}"
        check_all_read(args.base, [f"a photo of {words}"], words)
    n_frequency = args.n_frequency
    adapter = None
    if args.adapter:
        try:
            file = find_adapter_file(args.adapter)
            check_apart({"the folder of --adapter": file.parent}, {"--output_dir": args.output_dir})
            adapter = read_any_adapter(file, find_family(BaseSettings(args.base))[0].denoiser)
        except OSError as error:
            raise InputError(str(error)) from None
    settings = {
        "base": args.base, "n_frequency": n_frequency, "targets": args.targets, "truth_steps": args.truth_steps,
        "batch": args.batch, "resolution": args.resolution, "token": args.token, "priors": PRIORS,
    }  # fmt: skip
    claim(args.output_dir, json.loads(json.dumps(settings)))
    reports = []
    for subject in subjects:
        path = args.output_dir / f"{subject.name}.json"
        if path.exists():
            reports.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        prompt = f"a photo of {args.token} {subject.class_name}"
        plan = Run(
            args.base, subject.photos, prompt, 0, n_frequency, args.targets, args.truth_steps, args.batch,
            args.resolution,
        )  # fmt: skip
        if adapter is not None and subject == subjects[0]:
            common_layers(adapter, Session(plan).targets)
        truth, losses = true_change(plan, args.output_dir / f"{subject.name}.safetensors", args.device)
        found = describe_subject(subject, truth, priors(plan, args.device), n_frequency)
        found["truth"] = losses
        path.write_text(json.dumps(found), encoding="utf-8")
        reports.append(found)
    report = summarize(reports)
    report["adapter"] = None
    if adapter is not None:
        report["adapter"] = describe_adapter(adapter, load_file(args.output_dir / f"{subjects[0].name}.safetensors"))
    command = shlex.join(["python", "-m", "eval", *sys.argv[1:]])
    report = {"command": command, "settings": settings, "subjects": [s.name for s in subjects], **report}
    (args.output_dir / "spectrum.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.output_dir / "spectrum.md").write_text(printable(markdown(report)) + "\n", encoding="utf-8")
    plot_spectrum(report, args.output_dir / "spectrum.png")
    print((args.output_dir / "spectrum.md").read_text(encoding="utf-8"))
    return report


def true_change(plan: Run, path: Path, device: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The change (d, k) of every adapted weight by full fine-tuning to the plateau, kept in `path`, and its losses.

    The loss is looked at every `CHECK_EVERY` steps on draws that stay the same; the plateau is reached when it has
    fallen by less than `PLATEAU` of itself over `PATIENCE` looks.
    """
    record = path.with_suffix(".losses.json")
    if path.exists():
        return load_file(path), json.loads(record.read_text(encoding="utf-8"))
    session = Session(plan, device=device)
    weights = {name: session.denoiser.get_submodule(name).weight for name in session.targets}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)

    def samples(draws: list) -> list:
        return [(draw, session.source, plan.instance_prompt, 1.0) for draw in draws]

    def stream(seed: int) -> DrawStream:
        return DrawStream("instance", seed, len(session.source), session.plan.latent_shape, random_flip=False)

    fixed, draws = stream(FIXED_SEED).stratified(8), stream(TRUTH_SEED)
    parts = [samples(fixed[i : i + 8]) for i in range(0, len(fixed), 8)]
    optimizer = torch.optim.AdamW(weights.values(), lr=TRUTH_RATE, weight_decay=0.0)
    losses: list[float] = []
    for step in tqdm(range(plan.steps + 1), desc="true change", mininterval=2):
        if step % CHECK_EVERY == 0:
            with torch.no_grad():
                losses.append(statistics.fmean(float(session.loss(part)) for part in parts))
            before, latest = losses[:-PATIENCE], losses[-PATIENCE:]
            if before and min(latest) > (1 - PLATEAU) * min(before):
                break
        numbers = range(step * plan.batch, (step + 1) * plan.batch)
        session.loss(samples([draws.sample(i) for i in numbers])).backward()
        nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    change = {name: (weight.detach() - start[name]).float().cpu().contiguous() for name, weight in weights.items()}
    found = {"steps": step, "losses": [round(value, 5) for value in losses], "every": CHECK_EVERY, "rate": TRUTH_RATE}
    record.write_text(json.dumps(found), encoding="utf-8")
    save_file(change, path)
    return change, found


def priors(plan: Run, device: str) -> dict[str, dict[str, torch.Tensor]]:
    """Every prior of `PRIORS`, by layer."""
    found = {}
    for name, (estimate, draws) in tqdm(PRIORS.items(), desc="priors"):
        session = Session(plan, device=device)
        config = S2FTConfig(target_modules=session.targets, n_frequency=plan.n_frequency)
        inject_adapter(session.denoiser, config, ADAPTER)
        estimated = session.prior(EstimateSettings(estimate, draws))
        found[name] = {layer: matrix.float().cpu() for layer, matrix in estimated.items()}
    return found


def describe_subject(
    subject: Subject,
    truth: Mapping[str, torch.Tensor],
    estimated: Mapping[str, Mapping[str, torch.Tensor]],
    n_frequency: int | float,
) -> dict[str, Any]:
    """What every construction makes of one subject's true change, layer by layer."""
    rows = {}
    for construction in tqdm(constructions(), desc=f"{subject.name}: constructions"):
        prior = truth if construction.prior == "true change" else estimated[construction.prior]
        rows[construction.name] = {
            layer: _describe_layer(construction, matrix, prior[layer], layer, n_frequency)
            for layer, matrix in truth.items()
        }
    cosines = {
        name: statistics.fmean(_cosine(truth[layer], matrix) for layer, matrix in prior.items())
        for name, prior in estimated.items()
    }
    return {"subject": subject.name, "prior_cosine": cosines, "constructions": rows}


def _describe_layer(
    construction: Construction, truth: torch.Tensor, prior: torch.Tensor, layer: str, n_frequency: int | float
) -> dict[str, Any]:
    rearrangement = construction.rearrangement(prior, layer)
    latent = rearrangement.invert(truth)
    reached = {
        sampling: construction.share_reached(truth, prior, rearrangement, layer, sampling, n_frequency)
        for sampling in ("power", "top")
    }
    return {
        "sampled": round(reached["power"], 5),
        "top": round(reached["top"], 5),
        "objective": round(energy.objective(latent), 4),
        "objective_squared": round(energy.objective(latent, squared=True), 4),
        "error": {
            other: [round(v, 4) for v in energy.reconstruction_error(latent, SHARES, other).tolist()]
            for other in ("real", "complex")
        },
        "radial_power": [round(v, 5) for v in energy.radial_power(latent, BINS).tolist()],
        "amplitude": [round(v, 4) for v in energy.amplitude_quantiles(latent, torch.linspace(0, 1, BINS + 1)).tolist()],
    }


def common_layers(adapter: Adapter, targets: Collection[str]) -> dict[str, LayerWeights]:
    """An adapter's layers among those looked at here. Raises InputError where there is none."""
    found = {name: layer for name, layer in adapter.layers[denoiser_name(adapter.layers)].items() if name in targets}
    if not found:
        raise InputError("The adapter adapts none of the layers that are looked at here: other --targets may do.")
    return found


def describe_adapter(adapter: Adapter, truth: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """What a trained adapter's positions reach of a true change, and how much its own change is like it."""
    reached, likeness = [], []
    for name, layer in common_layers(adapter, truth).items():
        if isinstance(layer, GridWeights):
            reached.append(energy.share_on_grid(truth[name], layer.grid, layer.rearrangement))
        else:
            reached.append(energy.share_reached(truth[name], layer.positions, layer.rearrangement, layer.kind))
        likeness.append(_cosine(layer.delta(), truth[name]))
    return {"layers": len(reached), "reached": statistics.fmean(reached), "cosine": statistics.fmean(likeness)}


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def summarize(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over layers and subjects, with the standard error over subjects, and ratios to the paper's construction."""
    names = list(reports[0]["constructions"])
    paper = names[1]
    rows = []
    for name in names:
        layers = [list(report["constructions"][name].values()) for report in reports]
        row: dict[str, Any] = {"construction": name}
        for key in ("sampled", "top", "objective", "objective_squared"):
            row[key] = mean_and_error([statistics.fmean(layer[key] for layer in each) for each in layers])
        for key in ("sampled", "top"):
            row[f"{key}_to_paper"] = row[key]["mean"] / statistics.fmean(
                statistics.fmean(layer[key] for layer in report["constructions"][paper].values()) for report in reports
            )
        everything = [layer for each in layers for layer in each]
        row["error"] = {kind: _mean_curve([x["error"][kind] for x in everything]) for kind in ("real", "complex")}
        for key in ("radial_power", "amplitude"):
            row[key] = _mean_curve([x[key] for x in everything])
        rows.append(row)
    cosines = {
        name: mean_and_error([report["prior_cosine"][name] for report in reports])
        for name in reports[0]["prior_cosine"]
    }
    return {
        "shares": SHARES.tolist(),
        "rows": rows,
        "prior_cosine": cosines,
        "truth": {report["subject"]: report["truth"] for report in reports},
        "layers": {report["subject"]: _layer_shares(report) for report in reports},
    }


def _layer_shares(report: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    return {
        name: {key: [layer[key] for layer in layers.values()] for key in ("sampled", "top")}
        for name, layers in report["constructions"].items()
    }


def _mean_curve(curves: list[list[float]]) -> list[float]:
    return [round(value, 5) for value in torch.tensor(curves).mean(0).tolist()]


def markdown(report: dict[str, Any]) -> str:
    """The table of what each construction reaches."""
    lines = [
        "| construction | sampled | × paper | largest n | × paper | Eq. 5 | error at 2 %, real | complex |",
        "| --- |" + " --- |" * 7,
    ]
    place = report["shares"].index(next(s for s in report["shares"] if abs(s - 0.02) < 1e-6))
    for row in report["rows"]:
        cells = [
            _share(row["sampled"]), f"{row['sampled_to_paper']:.2f}", _share(row["top"]), f"{row['top_to_paper']:.2f}",
            f"{row['objective']['mean']:.1f}", f"{row['error']['real'][place]:.3f}",
            f"{row['error']['complex'][place]:.3f}",
        ]  # fmt: skip
        lines.append(f"| {row['construction']} | " + " | ".join(cells) + " |")
    cosines = ", ".join(f"{name} {value['mean']:.2f}" for name, value in report["prior_cosine"].items())
    lines += [
        "",
        f"Share of the true change's energy that {report['settings']['n_frequency']} of d·k real numbers reach; mean ± "
        f"standard error over {len(report['subjects'])} subjects. Cosine of priors with the true change: {cosines}.",
    ]
    if report["adapter"]:
        lines.append(
            f"In the {report['adapter']['layers']} of these layers that the adapter adapts, its own positions reach "
            f"{report['adapter']['reached']:.3f}; the cosine of its change with the true one is "
            f"{report['adapter']['cosine']:.2f}."
        )
    return "\n".join(lines)


def _share(value: Mapping[str, float | None]) -> str:
    return f"{value['mean']:.3f}" + (f" ± {value['stderr']:.3f}" if value["stderr"] is not None else "")
