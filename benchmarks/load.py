"""From a file to fused weights and a first image, beside a LoRA of as many bytes; and switching between adapters.

    python -m benchmarks.load --shape sd15 --json docs/results/load.json

Loading is reading, checking and attaching; the LoRA is read and attached by diffusers. A switch is `set_adapters` and
one token (or pixel) through every adapted layer, so that whatever the adapter needs has been made.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from s2ft_diffusion.pipelines.targets import TARGETS

from .measure import CLOCKS, alternate, medians, parser, report
from .pipelines import around, write_lora, write_s2ft
from .shapes import SHAPES, build


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=[name for name in SHAPES if name.startswith("sd15")], default="sd15")
    arguments.add_argument("--n", type=int, default=8000)
    arguments.add_argument("--targets", choices=TARGETS, default="qv", help="as the trainer's")
    arguments.add_argument("--adapters", type=int, default=10)
    arguments.add_argument("--steps", type=int, default=2, help="of the first image; 0: no image")
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    clock = CLOCKS[args.clock]
    pipe = around(build(args.shape, args.device)).to(args.device)
    pixels = SHAPES[args.shape].pixels
    with tempfile.TemporaryDirectory() as folder:
        files = [
            write_s2ft(pipe, Path(folder) / str(i), args.n, seed=i, targets=args.targets) for i in range(args.adapters)
        ]
        size = files[0].stat().st_size
        per_rank = write_lora(pipe, Path(folder) / "one", 1, args.targets).stat().st_size
        rank = max(1, round(size / per_rank))
        lora = write_lora(pipe, Path(folder) / "lora", rank, args.targets)
        stages: dict[str, dict[str, list[float]]] = {"S2FT": {}, f"LoRA r={rank}": {}}

        def staged(name: str, *actions: tuple[str, object]) -> None:
            for stage, action in actions:
                begun = clock()
                action()
                stages[name].setdefault(stage, []).append(clock() - begun)

        def image() -> None:
            if args.steps:
                pipe("a cat", num_inference_steps=args.steps, height=pixels, width=pixels, output_type="latent")

        def s2ft() -> None:
            staged(
                "S2FT", ("load", lambda: pipe.load_s2ft_weights(files[0])), ("fuse", pipe.fuse_s2ft),
                ("first image", image),
            )  # fmt: skip
            pipe.unfuse_s2ft()
            pipe.unload_s2ft_weights()

        def peer() -> None:
            staged(
                f"LoRA r={rank}", ("load", lambda: pipe.load_lora_weights(lora)), ("fuse", pipe.fuse_lora),
                ("first image", image),
            )  # fmt: skip
            pipe.unfuse_lora()
            pipe.unload_lora_weights()

        alternate({"s2ft": s2ft, "lora": peer}, args.rounds)
        rows = []
        for (name, found), path in zip(stages.items(), (files[0], lora), strict=True):
            times = medians({stage: values[1:] for stage, values in found.items()})
            both = [a + b for a, b in zip(found["load"][1:], found["fuse"][1:], strict=True)]
            rows.append(
                {"adapter": name, "bytes": path.stat().st_size, **{f"{k}, s": v for k, v in times.items()},
                 "load + fuse, s": medians({"": both})[""]}
            )  # fmt: skip
        report("load", args, rows, **switching(pipe, files, args.rounds, clock))


@torch.no_grad()
def switching(pipe, files: list[Path], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of a switch from one loaded adapter to another, with the first pass through every layer."""
    names = [pipe.load_s2ft_weights(path) for path in files]
    layers = [m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    tokens = [torch.zeros(1, w.shape[1], *(1 for _ in w.shape[2:]), device=w.device) for w in weights]
    seconds = []
    for _ in range(rounds):
        for name in names[:2]:
            begun = clock()
            pipe.set_adapters([name])
            for layer, token in zip(layers, tokens, strict=True):
                layer(token)
            seconds.append(clock() - begun)
    return {"switch, s": medians({"": seconds})[""]}


if __name__ == "__main__":
    main()
