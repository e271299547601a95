"""The paper's Table 8: seconds an epoch, memory, and the time of T and its inverse, on ViT-B/16 at 224 pixels.

Weights and images are random: neither counts for time or memory. An epoch is VTAB's 1,000 images, 16 steps of 64.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from finetuning import MethodArguments, adapt, peak_memory
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from s2ft_diffusion import S2FTLayer, estimate_prior, place_from_prior

METHODS = {  # the paper's numbers, and of its LoRA's about
    "full": MethodArguments(method="full"),
    "lora": MethodArguments(method="lora", rank=8),
    "fourierft": MethodArguments(method="fourierft", n_frequency=6000),
    "s2ft paper": MethodArguments(preset="paper", n_frequency=3000),
    "s2ft default": MethodArguments(n_frequency=3000),
}
BATCH, STEPS_AN_EPOCH, CLASSES = 64, 16, 100
ROUNDS, STEPS = 5, 8


def seconds(call: Callable[[], Any]) -> float:
    """Of a call, with what it has put on a GPU."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(
    path: Path, device_name: str, size: int = 768, side: int = 224, batch: int = BATCH, rounds: int = ROUNDS
) -> None:
    """Write a row a method to a JSON file; other widths and sides of images are for trials."""
    torch.set_float32_matmul_precision("high")
    device = torch.device(device_name)
    torch.manual_seed(0)
    config = ViTConfig(num_labels=CLASSES, hidden_size=size, intermediate_size=4 * size, image_size=side)
    template = ViTForImageClassification(config)
    pixels, labels = torch.randn(batch, 3, side, side, device=device), torch.randint(CLASSES, (batch,), device=device)
    heads = sum(parameter.numel() for parameter in template.classifier.parameters())
    rows = []
    for method, arguments in METHODS.items():
        model = adapt(copy.deepcopy(template).to(device), arguments, seed=0, heads=["classifier"])
        for module in model.modules():  # as `training` does
            if isinstance(indices := getattr(module, "indices", None), dict):
                indices.update({name: value.to(device) for name, value in indices.items()})
        row: dict[str, Any] = {"method": method}
        if method.startswith("s2ft"):
            row |= place(model, pixels, labels, "gradient" if arguments.preset == "paper" else "full")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

        def steps(count: int, model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for _ in range(count):
                optimizer.zero_grad()
                model(pixel_values=pixels, labels=labels).loss.backward()
                optimizer.step()

        model.train()
        steps(2)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        measured = [seconds(partial(steps, STEPS)) / STEPS for _ in range(rounds)]
        rows.append(
            row
            | {
                "trained_numbers": sum(p.numel() for p in trained) - heads,
                "seconds_an_epoch": statistics.median(measured) * STEPS_AN_EPOCH,
                "seconds_an_epoch_all": [value * STEPS_AN_EPOCH for value in measured],
                "memory_gb": peak_memory() / 1e9,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
            }
        )
        del model, optimizer, trained, steps
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def place(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, estimate: str) -> dict[str, float]:
    """Estimate a prior from an epoch, find orders and positions; the seconds of each, and of T and its inverse."""
    found: dict[str, Any] = {}

    def prior() -> None:
        loss = lambda _: model(pixel_values=pixels, labels=labels).loss  # noqa: E731
        found["prior"] = estimate_prior(model, loss, list(range(STEPS_AN_EPOCH)), estimate=estimate)

    row = {"prior_seconds": seconds(prior)}
    row["order_seconds"] = seconds(lambda: place_from_prior(model, found["prior"]))
    pairs = [
        (module.s2ft_delta["default"].rearrangement, found["prior"][name].to(pixels.device))
        for name, module in model.named_modules()
        if isinstance(module, S2FTLayer)
    ]
    for name, method in (("inverse_seconds", "invert"), ("apply_seconds", "apply")):
        call = lambda method=method: [getattr(order, method)(matrix) for order, matrix in pairs]  # noqa: E731
        call()
        row[name] = statistics.median(seconds(call) for _ in range(5))
    return row
