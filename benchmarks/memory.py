"""Peak memory of a training step, from shapes alone: nothing is computed, and no device is needed.

    python -m benchmarks.memory --json docs/results/memory.json

Batch 1, 512 pixels, bfloat16, all layers of the blocks; gigabytes are of 10^9 bytes. What several GPUs share out
(`--shard`) is of one of them, and only estimated. `--measure` on a GPU builds each denoiser there, with random weights,
and gives PyTorch's own peak of two steps; on a CPU, a count of the tensors made:

    python -m benchmarks.memory --measure --estimates docs/results/memory.json --json docs/results/memory-gpu.json
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.training_utils import cast_training_params
from peft import FourierFTConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from s2ft_diffusion import S2FTConfig, S2FTLayer, attention_targets
from s2ft_diffusion.dreambooth.memory import StepMemory, prior_passes, step_loss, step_memory
from s2ft_diffusion.dreambooth.settings import NUMBERS, ComputeSettings
from s2ft_diffusion.families import FAMILIES, Configs, Family
from s2ft_diffusion.families.blank import AllocationTracker, weight_bytes
from s2ft_diffusion.families.quantization import quantize_model

from .measure import parser, report
from .shapes import SHAPES, random_weights
from .train_step import place_anywhere

GIGA = 10**9


@dataclass(frozen=True)
class Base:
    """A denoiser of a published size, of which family, and how the trainer's flags for 512 pixels hold it."""

    build: Callable[[], nn.Module]
    pipeline: str
    compute: ComputeSettings
    latent_channels: int = 4
    blocks: int = 4  # of the autoencoder: latents are smaller by two to one less than that

    @property
    def family(self) -> type[Family]:
        return FAMILIES[self.pipeline]

    def configs(self, model: nn.Module) -> Configs:
        vae = {"block_out_channels": (1,) * self.blocks, "latent_channels": self.latent_channels}
        vae |= {"encoder_block_out_channels": (1,) * self.blocks}
        vae |= {"z_dim": self.latent_channels, "temperal_downsample": (True,) * (self.blocks - 1)}
        return {self.family.denoiser: dict(model.config), "vae": vae}


PLAIN = ComputeSettings()
CHECKPOINTED = ComputeSettings(gradient_checkpointing=True)
NF4 = ComputeSettings(gradient_checkpointing=True, quantize="nf4")
TWO, FOUR = (ComputeSettings(gradient_checkpointing=True, shard=gpus) for gpus in (2, 4))


def _pixart_sigma() -> nn.Module:
    return PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False)


def _sd35_medium() -> nn.Module:
    return SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    )  # fmt: skip


def _flux_dev() -> nn.Module:
    return FluxTransformer2DModel(guidance_embeds=True)


BASES = {
    "sd15": Base(SHAPES["sd15"].build, "StableDiffusionPipeline", CHECKPOINTED),
    "sdxl": Base(SHAPES["sdxl"].build, "StableDiffusionXLPipeline", CHECKPOINTED),
    "pixart-sigma": Base(_pixart_sigma, "PixArtSigmaPipeline", CHECKPOINTED),
    "sana": Base(SanaTransformer2DModel, "SanaPipeline", CHECKPOINTED, 32, 6),
    "lumina2": Base(lambda: Lumina2Transformer2DModel(cap_feat_dim=2304), "Lumina2Pipeline", CHECKPOINTED, 16),
    "sd35-medium": Base(_sd35_medium, "StableDiffusion3Pipeline", CHECKPOINTED, 16),
    "klein": Base(SHAPES["klein"].build, "Flux2KleinPipeline", NF4, 32),
    "z-image": Base(ZImageTransformer2DModel, "ZImagePipeline", NF4, 16),
    "flux-dev": Base(_flux_dev, "FluxPipeline", NF4, 16),
    "flux-dev-2-gpus": Base(_flux_dev, "FluxPipeline", TWO, 16),
    "flux-dev-4-gpus": Base(_flux_dev, "FluxPipeline", FOUR, 16),
    "qwen-image": Base(QwenImageTransformer2DModel, "QwenImagePipeline", NF4, 16),
    "flux2-dev": Base(Flux2Transformer2DModel, "Flux2Pipeline", NF4, 32),
    "sd15-small": Base(SHAPES["sd15-small"].build, "StableDiffusionPipeline", PLAIN),
    "sdxl-small": Base(SHAPES["sdxl-small"].build, "StableDiffusionXLPipeline", CHECKPOINTED),
    "klein-small": Base(SHAPES["klein-small"].build, "Flux2KleinPipeline", NF4, 32),
}


def method_config(method: str, targets: list[str], n: int | float) -> Any:
    """A method's config for these layers: as many numbers a layer for FourierFT as for S²FT."""
    if method == "S2FT":
        return S2FTConfig.from_preset("default", n_frequency=n, target_modules=targets)
    if method == "FourierFT":
        return FourierFTConfig(n_frequency=n, target_modules=targets)
    return LoraConfig(r=int(method.removeprefix("LoRA r=")), target_modules=targets)


def adapted(args: argparse.Namespace, method: str) -> Callable[[str, nn.Module], None]:
    """Puts a method on a model's layers."""

    def adapt(_: str, model: nn.Module) -> None:
        layers = {name: model.get_submodule(name) for name in attention_targets(model, args.targets)}
        if method == "FourierFT":  # it adapts no convolutions
            layers = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        if method.startswith("LoRA"):  # nor does it one channel by channel
            layers = {name: layer for name, layer in layers.items() if getattr(layer, "groups", 1) == 1}
        targets = list(layers)
        inject_adapter_in_model(method_config(method, targets, args.n), model)

    return adapt


def estimate(base: Base, method: str, args: argparse.Namespace) -> StepMemory:
    """What the trainer says before it begins, of the denoiser."""
    with torch.device("meta"):
        model = base.build().requires_grad_(False)
    configs, family = base.configs(model), base.family
    shape = family.latent_shape(configs, args.pixels)
    models = {family.denoiser: model}
    return step_memory(family, configs, models, adapted(args, method), shape, 1, torch.bfloat16, base.compute)


def measure(base: Base, method: str, args: argparse.Namespace) -> Mapping[str, int]:
    """PyTorch's own peaks, in bytes, of two steps and of a pass of the estimate, with random weights."""
    model = random_weights(base.build, args.device, torch.bfloat16)
    configs, family = base.configs(model), base.family
    if base.compute.quantize:
        quantize_model(model, base.compute.quantize, torch.bfloat16, args.device)
    adapted(args, method)(family.denoiser, model)
    place_anywhere(model)
    cast_training_params(model, dtype=torch.float32)
    if base.compute.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.train(base.compute.gradient_checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    shape = family.latent_shape(configs, args.pixels)
    with torch.device(args.device), torch.autocast(args.device.split(":")[0], torch.bfloat16):
        loss = step_loss(family, configs, {family.denoiser: model}, shape, 1, torch.bfloat16)
        optimizer = torch.optim.AdamW(trained, lr=1e-6, foreach=True)
        with Peak(args.device, model) as peak:
            for _ in range(2):
                loss().backward()
                optimizer.step()
                optimizer.zero_grad()
        found = {"measured": peak.bytes}
        layers = {name: m for name, m in model.named_modules() if isinstance(m, S2FTLayer)}
        if layers:
            del optimizer
            with Peak(args.device, model) as peak:
                prior_passes(loss, layers, trained)
            found["measured prior"] = peak.bytes
    return found


class Peak:
    """What was allocated at most within the block, in `bytes`: on a GPU as PyTorch's allocator has it, on a CPU a
    model's weights and a count of the tensors that were made."""

    def __init__(self, device: str, model: nn.Module) -> None:
        self.on_gpu, self.model, self.tracker = device.startswith("cuda"), model, AllocationTracker()

    def __enter__(self) -> Peak:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.tracker.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.on_gpu:
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self.tracker.__exit__(*exception)
            self.bytes = weight_bytes(self.model) + self.tracker.peak


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bases", nargs="+", choices=tuple(BASES), default=[n for n in BASES if "small" not in n])
    options.add_argument("--methods", nargs="+", default=["S2FT", "LoRA r=32", "FourierFT"])
    options.add_argument("--targets", default="blocks", help="which layers, as the trainer's --targets")
    options.add_argument("--n", type=int, default=NUMBERS["blocks"], help="numbers a layer of S2FT and FourierFT")
    options.add_argument("--pixels", type=int, default=512)
    options.add_argument("--measure", action="store_true", help="measure instead of estimating")
    options.add_argument("--estimates", type=Path, help="a report to put beside what is measured")
    args = options.parse_args()
    if args.measure:
        args.bases = [name for name in args.bases if BASES[name].compute.shard == 1]
    known = json.loads(args.estimates.read_text(encoding="utf-8")) if args.estimates else []
    rows = []
    for name in args.bases:
        for method in args.methods:
            if args.measure:
                same = (row for run in known for row in run["rows"] if (row["base"], row["method"]) == (name, method))
                row = compared(next(same, {"base": name, "method": method}), measure(BASES[name], method, args))
            else:
                row = described(name, method, estimate(BASES[name], method, args))
            rows.append(row)
            print(json.dumps(row), flush=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    report("memory", args, [{key: row.get(key) for key in columns} for row in rows])


def described(name: str, method: str, needed: StepMemory) -> dict[str, Any]:
    """A row of the table."""
    return {
        "base": name,
        "held as": BASES[name].compute.quantize or "bfloat16",
        "method": method,
        "device GB": round(needed.device / GIGA, 2),
        "weights": round(needed.weights / GIGA, 2),
        "trained": round(needed.trained / GIGA, 3),
        "passes": round(needed.passes / GIGA, 2),
        "prior": round(needed.prior / GIGA, 2) if needed.prior else None,
    }


def compared(row: Mapping[str, Any], found: Mapping[str, int]) -> dict[str, Any]:
    """A row with what was measured, in GB, and the estimate's share of the most of it."""
    row = {**row, **{name: round(size / GIGA, 3) for name, size in found.items()}}
    most = max(found.values()) / GIGA
    return {**row, "estimate / measured": round(row["device GB"] / most, 3)} if "device GB" in row else row


if __name__ == "__main__":
    main()
