"""How near estimates of a weight change come to what longer training of the weights makes of them, on the toybox.

    python -m benchmarks.prior --base toybox --subjects dash pip perk --json docs/results/prior.json
    python -m benchmarks.prior --base toybox-flow --subjects dash pip perk --json docs/results/prior.json

The true change is `--truth_steps` AdamW steps of four images at 1e-4, of the attention layers alone, with draws of its
own; it is kept in `--truth`. Columns are means over the layers: the cosine with it, and the shares of its energy that
1 % of d * k numbers reach, at free positions drawn by Eq. 7 and in a dense grid, chosen from the estimate. "adam" is
what "full" was before: AdamW in float32, gradients of one norm over all layers. Loss is that on other draws of the
same photos after the estimate's training, relative to the base's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from eval.energy import share_on_grid, share_reached
from eval.training import Run, Session
from s2ft_diffusion import S2FTConfig, estimate_prior
from s2ft_diffusion.dreambooth.draws import Draw, DrawStream
from s2ft_diffusion.toybox.captions import UNSEEN_TOKEN
from s2ft_diffusion.toybox.subjects import ALL_SUBJECTS, write_photos
from s2ft_diffusion.tuner.grid import choose_grid, grid_size
from s2ft_diffusion.tuner.prior import STEP_SIZE, rearrangement_for
from s2ft_diffusion.tuner.seeding import seeded
from s2ft_diffusion.tuner.spectrum import sample_positions

from .measure import parser, report

TRUTH_SEED, OTHER_SEED = 1_000_003, 777  # neither shares a draw with an estimate
SHARE = 0.01


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--base", choices=("toybox", "toybox-flow"), default="toybox")
    arguments.add_argument("--subjects", nargs="+", choices=ALL_SUBJECTS, default=["dash"])
    arguments.add_argument("--estimates", nargs="+", default=["adam .2", f"full {STEP_SIZE}"], help="name, step size")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="the base's")
    arguments.add_argument("--draws", type=int, default=16, help="of each of six photos")
    arguments.add_argument("--truth_steps", type=int, default=150)
    arguments.add_argument("--truth", type=Path, help="folder that keeps true changes")
    args = arguments.parse_args()
    rows = []
    for subject in args.subjects:
        truth = true_change(args, subject)
        for words in args.estimates:
            world = World(args.base, subject, getattr(torch, args.dtype))
            name, _, step_size = words.partition(" ")
            prior, loss = estimated(world, name, float(step_size or STEP_SIZE), args.draws)
            rows.append(
                {"base": args.base, "subject": subject, "estimate": words, **compared(prior, truth), "loss": loss}
            )
            print(rows[-1], flush=True)
    for words in args.estimates if len(args.subjects) > 1 else ():
        mean = {
            key: statistics.fmean(row[key] for row in rows if row["estimate"] == words)
            for key in rows[0]
            if key not in ("base", "subject", "estimate")
        }
        rows.append({"base": args.base, "subject": "mean", "estimate": words, **mean})
    report("prior", args, rows)


class World:
    """A denoiser, a subject's photos as latents, and the training loss of draws of them."""

    def __init__(self, base: str, subject: str, dtype: torch.dtype = torch.float32) -> None:
        toy, self.dtype = ALL_SUBJECTS[subject], dtype
        self.prompt = f"a photo of {UNSEEN_TOKEN} {toy.kind}"
        with tempfile.TemporaryDirectory() as folder:
            photos = Path(folder)
            write_photos(subject, photos)
            self.session = Session(Run(base, photos, self.prompt, 0, SHARE, "attention"))
        self.model = self.session.denoiser.to(dtype).requires_grad_(False)
        self.targets = self.session.targets

    def stream(self, seed: int) -> DrawStream:
        return DrawStream("instance", seed, len(self.session.source), self.session.plan.latent_shape, random_flip=False)

    def loss(self, draws: Sequence[Draw]) -> torch.Tensor:
        """The recipe's loss, the mean over the draws."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return self.session.loss([(draw, self.session.source, self.prompt, 1.0) for draw in draws])

    @torch.no_grad()
    def other_loss(self) -> float:
        """The mean over draws that no estimate has seen."""
        draws = self.stream(OTHER_SEED).stratified(8)
        batches = [draws[i : i + 8] for i in range(0, len(draws), 8)]
        return statistics.fmean(float(self.loss(batch)) for batch in batches for _ in batch)


def true_change(args: argparse.Namespace, subject: str) -> dict[str, torch.Tensor]:
    path = args.truth and args.truth / f"{args.base}-{subject}-attention-{args.truth_steps}.safetensors"
    if path and path.exists():
        return load_file(path)
    world = World(args.base, subject)
    weights = {name: world.model.get_submodule(name).weight for name in world.targets}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-4, weight_decay=0.0)
    stream = world.stream(TRUTH_SEED)
    for step in tqdm(range(args.truth_steps), desc=f"{subject}: true change", mininterval=5):
        world.loss([stream.sample(i) for i in range(4 * step, 4 * step + 4)]).backward()
        nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    change = {name: (weight.detach() - start[name]).contiguous() for name, weight in weights.items()}
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(change, path)
    return change


def estimated(world: World, name: str, step_size: float, draws: int) -> tuple[dict[str, torch.Tensor], float]:
    """An estimate by layer, and the loss on other draws with it added to the weights, relative to the base's."""
    before = world.other_loss()
    batches = [[draw] for draw in world.stream(0).stratified(draws)]
    if name == "adam":
        prior = _by_adam(world, batches, step_size)
    else:
        world.model.add_adapter(S2FTConfig(target_modules=world.targets, n_frequency=64))
        prior = dict(estimate_prior(world.model, world.loss, batches, estimate=name, step_size=step_size).items())
        world.model.delete_adapters("default")
    with torch.no_grad():
        for layer, change in prior.items():
            weight = _weight(world, layer)
            weight.copy_(weight.float() + change)
    return prior, world.other_loss() / before


def _weight(world: World, layer: str) -> torch.Tensor:
    module = world.model.get_submodule(layer)
    return getattr(module, "base_layer", module).weight


def _by_adam(world: World, batches: Sequence[list[Draw]], step_size: float) -> dict[str, torch.Tensor]:
    weights = {name: world.model.get_submodule(name).weight.requires_grad_(True) for name in world.targets}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    rates = [step_size * float(w.detach().square().mean().sqrt()) / w.shape[1] ** 0.5 for w in weights.values()]
    optimizer = torch.optim.AdamW(
        [{"params": [w], "lr": rate} for w, rate in zip(weights.values(), rates, strict=True)], weight_decay=0.0
    )
    growing = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2 * (step + 1) / (len(batches) + 1))
    for batch in batches:
        world.loss(batch).backward()
        norm = nn.utils.get_total_norm([w.grad for w in weights.values() if w.grad is not None])
        for weight in weights.values():
            if weight.grad is not None:
                weight.grad /= norm
        optimizer.step()
        optimizer.zero_grad()
        growing.step()
    change = {name: weight.detach() - start[name] for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.requires_grad_(False).copy_(start[name])
    return change


def compared(prior: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> dict[str, float]:
    cosines, drawn, grids = [], [], []
    config = S2FTConfig(gamma=2.0)
    for layer, change in truth.items():
        estimate = prior[layer]
        if not change.any() or not estimate.any():
            continue
        generator, shape = seeded(0, layer), tuple(change.shape)
        cosines.append(float(F.cosine_similarity(estimate.flatten(), change.flatten(), dim=0)))
        found = rearrangement_for(estimate, config, generator)
        latent = found.invert(estimate)
        options = {"sampling": "power", "gamma": 2.0, "latent": latent, "generator": generator}
        count = round(SHARE * change.numel()) // 2
        drawn.append(share_reached(change, sample_positions(count, shape, kind="complex", **options), found, "complex"))
        grids.append(share_on_grid(change, choose_grid(grid_size(SHARE, shape, 1), shape, **options), found))
    names = ("cosine", "drawn", "dense grid")
    return {name: round(statistics.fmean(x), 4) for name, x in zip(names, (cosines, drawn, grids), strict=True)}


if __name__ == "__main__":
    main()
