"""A training step: forward, backward and optimizer, beside PEFT's methods on the same projections.

    python -m benchmarks.train_step --shape sd15 --rounds 9 --json docs/results/train-step.json

Prints seconds, the ratio to LoRA r=32 and peak memory. Timed in one process, the methods in turn around the same base
weights; peak memory on a CPU is that of a process of its own for each method. "base" has nothing to train: forward and
backward to its input. `--preset_n` sets the numbers a layer of FourierFT, WaveFT and S2FT; `--targets all` puts the
methods of `--methods` on convolutions too, which PEFT's FourierFT and WaveFT do not adapt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import FourierFTConfig, LoraConfig, WaveFTConfig, inject_adapter_in_model
from torch import nn
from torch.profiler import profile

from s2ft_diffusion import S2FTConfig, S2FTLayer, attention_targets
from s2ft_diffusion.dreambooth.arguments import amount
from s2ft_diffusion.pipelines.targets import TARGETS
from s2ft_diffusion.tuner.rearrange import Rearrangement

from .measure import alternate, medians, parser, report
from .shapes import SHAPES, build, inputs, sharing_weights

REFERENCE = "LoRA r=32"


def configs(targets: list[str], n: int | float) -> dict[str, Any]:
    """The methods by name; None trains nothing."""
    return {
        "base": None,
        "LoRA r=4": LoraConfig(r=4, target_modules=targets),
        REFERENCE: LoraConfig(r=32, target_modules=targets),
        "FourierFT": FourierFTConfig(n_frequency=n, target_modules=targets),
        "WaveFT": WaveFTConfig(n_frequency=n, target_modules=targets),
        "S2FT default": S2FTConfig.from_preset("default", n_frequency=n, target_modules=targets),
        "S2FT paper": S2FTConfig.from_preset("paper", n_frequency=n, target_modules=targets),
    }


def place_anywhere(model: nn.Module) -> None:
    """Give S2FT layers random orders, signs and positions, as a prior would: without one, nothing is rearranged."""

    def axis(length: int, *, moved: bool, signs: bool) -> tuple[torch.Tensor, torch.Tensor]:
        sign = torch.randint(0, 2, (length,), dtype=torch.int8) * 2 - 1
        order = torch.randperm(length, dtype=torch.int32) if moved else torch.arange(length, dtype=torch.int32)
        return order, sign if signs and moved else torch.ones_like(sign)

    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, S2FTLayer):
            for name, delta in layer.s2ft_delta.items():
                config = layer.s2ft_config[name]
                (rows, row_sign), (columns, column_sign) = (
                    axis(length, moved=moved, signs=config.signs)
                    for length, moved in zip(delta.shape, (True, layer.rearranges_columns), strict=True)
                )
                chosen = delta.choose(replace(config, sampling="random"), None, torch.Generator().manual_seed(0), name)
                delta.place(chosen, Rearrangement(rows, columns, row_sign, column_sign))
            layer.prepare()


def prepare(model: nn.Module, config: Any, args: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """One training step of a model with an adapter, and the numbers it trains."""
    model = sharing_weights(model)
    if config is not None:
        inject_adapter_in_model(config, model)
        place_anywhere(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    run = torch.compile(model) if args.compile else model
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    batch = inputs(args.shape, args.batch, args.pixels, args.device, dtype)
    first = next(iter(batch))
    if not trained:
        batch[first].requires_grad_()
    target = torch.zeros_like(batch[first])
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None

    def step() -> None:
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.dtype == "autocast"):
            loss = F.mse_loss(run(**batch).sample.float(), target.float())
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        else:
            batch[first].grad = None

    return step, sum(p.numel() for p in trained)


def peak_resident_mb() -> float:
    """This process's peak resident memory. (`ru_maxrss` would count what its parent had when it was started.)"""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def peak_on_cpu(method: str, arguments: list[str]) -> float:
    """Peak resident memory in MB of a process that makes two steps of one method."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.json"
        command = [sys.executable, "-m", "benchmarks.train_step", *arguments, "--rounds", "1", "--peak_of", method]
        subprocess.run([*command, "--json", str(path)], check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text(encoding="utf-8"))


def profiled(step: Callable[[], None], rows: int = 16) -> list[dict[str, Any]]:
    """The operators that one step spends most time in itself, after two steps to warm up."""
    step()
    step()
    with profile() as recorded:
        step()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    shown = [(event.key, event.count, event.self_cpu_time_total) for event in events[:rows]]
    shown.append(("all others", sum(event.count for event in events[rows:]), total - sum(time for *_, time in shown)))
    return [
        {"operator": name, "calls": calls, "ms": round(time / 1000, 1), "share": round(time / total, 3)}
        for name, calls, time in [*shown, ("total", sum(event.count for event in events), total)]
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=SHAPES, default="sd15")
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--pixels", type=int, help="by default what the shape was made for; 256 for sd15")
    arguments.add_argument("--dtype", choices=("float32", "autocast", "bfloat16"), default="float32")
    arguments.add_argument("--preset_n", type=amount, default=8000)
    arguments.add_argument("--targets", choices=TARGETS, help="by default the shape's: query and value, for UNets")
    arguments.add_argument("--gradient_checkpointing", action="store_true")
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--methods", nargs="+", help="by default all")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--no_memory", action="store_true")
    arguments.add_argument("--profile", metavar="METHOD", help="instead, where one step of a method spends its time")
    arguments.add_argument("--peak_of", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    args.pixels = args.pixels or SHAPES[args.shape].pixels
    base = build(args.shape, args.device, torch.bfloat16 if args.dtype == "bfloat16" else torch.float32)
    targets = attention_targets(base, args.targets) if args.targets else SHAPES[args.shape].targets(base)
    methods = configs(targets, args.preset_n)
    if args.peak_of:
        step, _ = prepare(base, methods[args.peak_of], args)
        step()
        step()
        args.json.write_text(json.dumps(peak_resident_mb()), encoding="utf-8")
        return
    if args.profile:
        step, _ = prepare(base, methods[args.profile], args)
        report("train_step", args, profiled(step))
        return
    if unknown := sorted(set(args.methods or ()) - set(methods)):
        arguments.error(f"there is no method {unknown[0]!r}; there are {', '.join(methods)}")
    chosen = {name: config for name, config in methods.items() if not args.methods or name in args.methods}
    if isinstance(args.preset_n, float) and {"FourierFT", "WaveFT"} & chosen.keys():
        arguments.error(
            "a share as --preset_n is for S2FT: leave FourierFT and WaveFT out of --methods, or give a count"
        )
    cuda = args.device.startswith("cuda")
    steps, trainable, peaks = {}, {}, {}
    for name, config in chosen.items():
        if cuda:  # a method's peak, while it is alone with the base
            torch.cuda.reset_peak_memory_stats()
        steps[name], trainable[name] = prepare(base, config, args)
        if cuda:
            steps[name]()
            steps[name]()
            peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    seconds = medians(alternate(steps, args.rounds))
    if not cuda and not args.no_memory:
        del base, steps
        forwarded = [a for a in sys.argv[1:] if a != "--no_memory"]
        if "--json" in forwarded:
            del forwarded[forwarded.index("--json") : forwarded.index("--json") + 2]
        peaks = {name: peak_on_cpu(name, forwarded) for name in chosen}

    def ratio(values: dict[str, float], name: str) -> float | None:
        return round(values[name] / values[REFERENCE], 4) if name in values and REFERENCE in values else None

    rows = [
        {
            "method": name,
            "trainable": trainable[name],
            "seconds": round(seconds[name], 4),
            f"/ {REFERENCE}": ratio(seconds, name),
            "peak MB": round(peaks[name]) if name in peaks else None,
            f"peak / {REFERENCE}": ratio(peaks, name),
        }
        for name in chosen
    ]
    report("train_step", args, rows)


if __name__ == "__main__":
    main()
