"""What the app costs: images a minute beside the bare pipeline, and a switch between adapters.

    python -m benchmarks.app --json docs/results/app.json

All are asked for the same images in turn: pipelines, with and without the adapter, by a call, the app (`python -m app`,
in a process of its own) over HTTP. The pipelines make images one by one, as the app does, so that an image depends on
its seed alone.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from app.arguments import parse_arguments
from app.engine import load_base
from app.library import Library
from app.server import DEMO_ADAPTERS

from .measure import alternate, machine, medians

STEPS, GUIDANCE, PROMPT = 25, 4.0, "a photo of sks cat in the snow"


def call(address: str, endpoint: str, *values: object) -> list:
    """Call an endpoint over plain HTTP. (Gradio's Python client polls: here it would take a fifth of a core.)"""
    asked = {"data": values, "session_hash": "benchmark"}  # one session for all requests, as a browser has
    begun = httpx.post(f"{address}gradio_api/call/{endpoint}", json=asked).json()
    with httpx.stream("GET", f"{address}gradio_api/call/{endpoint}/{begun['event_id']}", timeout=None) as lines:
        for line in lines.iter_lines():
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
            elif event == "complete" and line.startswith("data: "):
                return json.loads(line.removeprefix("data: "))
            elif event == "error":
                raise RuntimeError(f"{endpoint}: {line}")
    raise RuntimeError(f"{endpoint} ended without a result")


@contextmanager
def serving(base: str, adapters: list[str], outputs: str) -> Iterator[str]:
    """The app in a process of its own; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "app", "--base", base, "--adapters", *adapters, "--outputs", outputs]
    server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        while server.poll() is None:
            with suppress(httpx.HTTPError):
                httpx.get(address)
                break
            time.sleep(0.2)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="toybox")
    parser.add_argument("--adapters", nargs="+", default=[str(DEMO_ADAPTERS)], help="at least two adapters")
    parser.add_argument("--images", type=int, default=8, help="images a request")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as outputs, serving(args.base, args.adapters, outputs) as address:
        options = parse_arguments(["--outputs", outputs])
        bare, adapted = (load_base(args.base, options.device, options.dtype) for _ in range(2))
        for pipe in (bare, adapted):
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        found = call(address, "list_adapters", "", "name")[0]
        first, second = [adapter["id"] for adapter in found if adapter["usable"]][:2]
        components = {"unet": bare.unet, "text_encoder": bare.text_encoder}
        adapted.load_s2ft_weights(Library(args.adapters, Path(outputs) / "own", components).get(first).path)

        def plain(pipe: StableDiffusionPipeline) -> None:
            for seed in range(args.images):
                pipe(
                    PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                    generator=torch.Generator().manual_seed(seed),
                )  # fmt: skip

        def served(adapter: str, images: int = args.images, steps: int = STEPS) -> None:
            call(address, "generate", PROMPT, "", adapter, 1, "", 1, steps, GUIDANCE, 0, images, "DDIM")

        actions = {
            "pipeline": partial(plain, bare),
            "app": partial(served, ""),
            "pipeline, adapter": partial(plain, adapted),
            "app, adapter": partial(served, first),
        }
        per_image = {name: value / args.images for name, value in medians(alternate(actions, args.rounds)).items()}
        switches: dict[str, list[float]] = {"same adapter": [], "other adapter": []}
        served(first, 1, 2)
        served(second, 1, 2)
        for _ in range(4 * args.rounds):
            served(first, 1, 2)
            for name, adapter in (("same adapter", first), ("other adapter", second)):
                begun = time.perf_counter()
                served(adapter, 1, 2)
                switches[name].append(time.perf_counter() - begun)

    per_switch = medians(switches)
    report = {
        "command": f"python -m benchmarks.app --images {args.images} --rounds {args.rounds}",
        "machine": machine(options.device),
        "base": args.base,
        "seconds_per_image": per_image,
        "images_per_minute": {name: 60 / value for name, value in per_image.items()},
        "app_to_pipeline": {
            "no adapter": per_image["pipeline"] / per_image["app"],
            "adapter": per_image["pipeline, adapter"] / per_image["app, adapter"],
        },
        "adapter_to_bare": per_image["pipeline"] / per_image["pipeline, adapter"],
        "short_request_seconds": per_switch,
        "switch_seconds": per_switch["other adapter"] - per_switch["same adapter"],
    }
    for name, value in per_image.items():
        print(f"{name:18}{60 / value:8.1f} images/min")
    for name, value in report["app_to_pipeline"].items():
        print(f"the app's to the pipeline's, {name}: {value:.3f}")
    print(f"a request of one image in two steps: {1000 * per_switch['same adapter']:.0f} ms")
    print(f"a switch of adapters: {1000 * report['switch_seconds']:.1f} ms")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
