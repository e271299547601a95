"""Before training: the prior, the rearrangement and the positions of all layers.

    python -m benchmarks.setup --shape sd15 --json docs/results/setup.json
    python -m benchmarks.setup --growth --json docs/results/setup.json
    python -m benchmarks.setup --orders --json docs/results/setup.json

The first times a gradient of the estimate and a training step beside it, and from its prior the search for orders and
the sampling, for presets and choices of layers. The last column is the whole set-up as a share of a default
training run, with five photos. `--growth` goes over sizes of one layer and numbers in it instead, `--orders` over the
layers of FLUX.2-klein: seconds for rows and columns of a layer and of all of its shape (of the clock, of all cores
together, and of the clock with two layers at a time), with the memory that one takes beside the prior. Its rows of
1,280 are the length of the path, relative to that of the search that knows all distances.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from peft import inject_adapter_in_model

from eval.training import peak_memory
from s2ft_diffusion import S2FTConfig, attention_targets, estimate_prior
from s2ft_diffusion.dreambooth.arguments import amount
from s2ft_diffusion.dreambooth.batches import Layout, estimate_draws
from s2ft_diffusion.dreambooth.settings import DEFAULT_STEPS, EstimateSettings
from s2ft_diffusion.pipelines.targets import TARGETS
from s2ft_diffusion.tuner.config import PRESETS
from s2ft_diffusion.tuner.delta import make_delta
from s2ft_diffusion.tuner.long_path import short_path, sketch_rows_and_columns
from s2ft_diffusion.tuner.prior import place_from_prior
from s2ft_diffusion.tuner.rearrange import (
    distance_table,
    find_rearrangement,
    nearest_neighbor_order,
    pairwise_inner_products,
    two_opt,
)

from .measure import CLOCKS, alternate, medians, parser, report
from .shapes import SHAPES, build, inputs, sharing_weights

PHOTOS = 5
GRADIENTS = 2  # that an estimate is timed over


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=SHAPES, default="sd15")
    arguments.add_argument("--pixels", type=int)
    arguments.add_argument("--n", type=amount, default=8000)
    arguments.add_argument("--presets", nargs="+", choices=PRESETS, default=tuple(PRESETS))
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--growth", action="store_true")
    arguments.add_argument("--orders", action="store_true")
    arguments.add_argument("--targets", nargs="+", choices=TARGETS, default=("qv", "attention"))
    args = arguments.parse_args()
    if args.growth:
        report("setup", args, growth(args.rounds))
        return
    if args.orders:
        lengths = {f"path of 1,280 rows, {kind}": path_ratio(kind) for kind in KINDS}
        report("setup", args, klein_orders(args.device), **lengths)
        return
    clock = CLOCKS[args.clock]
    args.pixels = args.pixels or SHAPES[args.shape].pixels
    base = build(args.shape, args.device)
    batch = inputs(args.shape, 1, args.pixels, args.device, torch.float32)
    rows = []
    for preset in args.presets:
        defaults = EstimateSettings.of(preset)
        gradients = PHOTOS * estimate_draws(defaults, Layout(DEFAULT_STEPS), PHOTOS)
        for targets in args.targets:
            model = sharing_weights(base)
            config = S2FTConfig.from_preset(
                preset, n_frequency=args.n, target_modules=attention_targets(model, targets)
            )
            inject_adapter_in_model(config, model)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

            def loss(batch: dict, model=model) -> torch.Tensor:
                return F.mse_loss(model(**batch).sample, torch.zeros_like(next(iter(batch.values()))))

            def step(optimizer=optimizer, loss=loss) -> None:
                loss(batch).backward()
                optimizer.step()
                optimizer.zero_grad()

            priors: list[dict[str, torch.Tensor]] = []

            def estimate(model=model, loss=loss, priors=priors, defaults=defaults) -> None:
                batches = [batch] * GRADIENTS
                priors[:] = [estimate_prior(model, loss, batches, estimate=defaults.kind)]

            seconds = medians(alternate({"estimate": estimate, "step": step}, args.rounds, clock=clock))
            seconds |= medians(
                alternate({"place": lambda m=model, p=priors: place_from_prior(m, p[0])}, args.rounds, 0, clock)
            )
            seconds["estimate"] /= GRADIENTS
            setup = gradients * seconds["estimate"] + seconds["place"]
            rows.append(
                {
                    "preset": preset,
                    "layers": f"{len(priors[0])} {targets}",
                    "gradients": gradients,
                    "one gradient, s": round(seconds["estimate"], 3),
                    "rearrange + sample, s": round(seconds["place"], 3),
                    "training step of one image, s": round(seconds["step"], 3),
                    "set-up / default run": round(setup / (setup + DEFAULT_STEPS * seconds["step"]), 4),
                }
            )
    report("setup", args, rows, steps=DEFAULT_STEPS)


def growth(rounds: int) -> list[dict]:
    """Seconds by size of a layer and numbers in it, for a prior like a gradient: few directions, and noise."""
    rows = []
    for d, k, n in [(w, w, 8000) for w in (320, 640, 1280, 2560, 3072)] + [
        (1280, 1280, n) for n in (1000, 4000, 32000)
    ]:
        torch.manual_seed(0)
        directions = torch.logspace(0, -2, 64)
        prior = (torch.randn(d, 64) * directions) @ torch.randn(64, k) + 0.01 * torch.randn(d, k)
        row = {"d": d, "k": k, "n": n}
        for preset in ("paper", "default"):
            config = S2FTConfig.from_preset(preset)
            delta = make_delta((d, k), config, n)
            searching, sampling = [], []
            for _ in range(rounds):
                begun = time.perf_counter()
                found = find_rearrangement(prior, distance=config.distance, signs=config.signs, refine=config.refine)
                searching.append(time.perf_counter() - begun)
                latent = found.invert(prior)
                begun = time.perf_counter()
                delta.choose(config, latent, torch.Generator().manual_seed(0), "the layer")
                sampling.append(time.perf_counter() - begun)
            row |= {f"{preset} rearrange, s": min(searching), f"{preset} sample, s": min(sampling)}
        rows.append(row)
    return rows


KLEIN_LAYERS = {(27648, 3072): 20, (18432, 3072): 10, (3072, 9216): 10, (3072, 3072): 40}
KINDS = {"few directions": (64, -1.0, 0.05), "many directions": (400, -0.5, 0.5)}


def like_a_prior(d: int, k: int, kind: str, device: str = "cpu") -> torch.Tensor:
    """Directions whose weights fall as a power, and noise."""
    count, power, noise = KINDS[kind]
    generator = torch.Generator(device).manual_seed(0)
    weights = torch.arange(1, count + 1, device=device) ** power
    left = torch.randn(d, count, generator=generator, device=device).mul_(weights)
    prior = torch.randn(d, k, generator=generator, device=device).mul_(noise)
    return prior.addmm_(left, torch.randn(count, k, generator=generator, device=device))


ALL_LAYERS = ("all, s", "all, of cores, s", "all, two at a time, s")


def klein_orders(device: str) -> list[dict]:
    rows, totals = [], [0.0, 0.0, 0.0]
    for (d, k), layers in KLEIN_LAYERS.items():
        prior = like_a_prior(d, k, "many directions", device)

        def search(_: int = 0, prior: torch.Tensor = prior) -> None:
            find_rearrangement(prior, distance="cosine", signs=True, refine="2opt", generator=torch.Generator())

        with peak_memory(device) as peak:
            begun, busy = time.perf_counter(), time.process_time()
            search()
            seconds, busy = time.perf_counter() - begun, time.process_time() - busy
        begun = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:  # as `place_from_prior` does
            list(pool.map(search, range(4)))
        paired = (time.perf_counter() - begun) / 4
        all_of_them = [layers * value for value in (seconds, busy, paired)]
        totals = [total + value for total, value in zip(totals, all_of_them, strict=True)]
        rows.append(
            {"d": d, "k": k, "layers": layers, "one, s": seconds, "memory, MB": peak.bytes // 2**20}
            | dict(zip(ALL_LAYERS, all_of_them, strict=True))
        )
        print(rows[-1], flush=True)
    rows.append(
        {"d": None, "k": None, "layers": sum(KLEIN_LAYERS.values()), "one, s": None, "memory, MB": None}
        | dict(zip(ALL_LAYERS, totals, strict=True))
    )
    return rows


def path_ratio(kind: str) -> float:
    """How long a path from sketches is, relative to one from a table of all distances."""
    matrix = like_a_prior(1280, 1280, kind)
    table = distance_table(pairwise_inner_products(matrix, "cosine"), "cosine", True)
    sketch, _ = sketch_rows_and_columns(matrix, cosine=True, signs=True, generator=torch.Generator().manual_seed(0))
    exact, found = two_opt(table, nearest_neighbor_order(table, 0)), short_path(sketch, 0)
    return round(float(table[found[:-1], found[1:]].sum() / table[exact[:-1], exact[1:]].sum()), 4)


if __name__ == "__main__":
    main()
