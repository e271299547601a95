"""Bytes of an adapter file, beside what its content needs at least and beside the files of LoRA and FourierFT.

    python -m benchmarks.size --json docs/results/size.json

The least is the coefficients as they are and the entropy of uniformly random sets of functions, of random orders and of
random signs. FourierFT's file is PEFT's own: its positions follow from a seed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from peft import FourierFTConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from s2ft_diffusion import S2FTConfig, attention_targets, write_adapter
from s2ft_diffusion.adapters.file import DTYPES, GridWeights, collect_adapter
from s2ft_diffusion.pipelines.targets import TARGETS

from .measure import parser, report
from .shapes import SHAPES, build, sharing_weights


def log2_factorial(n: int) -> float:
    return math.lgamma(n + 1) / math.log(2)


def least_bytes(layers: Mapping[str, GridWeights], bits: int, linear: Collection[str]) -> float:
    """Bytes of coefficients of so many bits, and the entropy of what lies beside them."""
    total = 0.0
    for name, layer in layers.items():
        total += bits * layer.coefficients.numel()
        for side, n in zip(("row", "column"), layer.shape, strict=True):
            count = len(getattr(layer, f"{side}_functions"))
            total += log2_factorial(n) - log2_factorial(count) - log2_factorial(n - count)
            if side == "row" or name in linear:  # a convolution's columns stay in order
                total += log2_factorial(n) + n
    return total / 8


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=SHAPES, default="sd15")
    arguments.add_argument("--targets", choices=TARGETS, help="as the trainer's; by default the shape's own")
    arguments.add_argument("--n", type=int, nargs="+", default=[2000, 8000, 32000])
    args = arguments.parse_args()
    base = build(args.shape, args.device)
    targets = attention_targets(base, args.targets) if args.targets else SHAPES[args.shape].targets(base)
    linear = [name for name in targets if isinstance(base.get_submodule(name), nn.Linear)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        for n in args.n:
            model = sharing_weights(base)
            inject_adapter_in_model(S2FTConfig(target_modules=targets, n_frequency=n, init_weights=False), model)
            adapter = collect_adapter({"unet": model}, "default")
            layers = adapter.layers["unet"]
            for name, layer in layers.items():
                orders = ("row", "column") if name in linear else ("row",)
                for side, length in zip(orders, layer.shape, strict=False):
                    getattr(layer, f"{side}_order").copy_(torch.randperm(length))
                    getattr(layer, f"{side}_sign").copy_(torch.randint(0, 2, (length,)) * 2 - 1)
            for dtype in DTYPES:
                size, error = write_adapter(path, adapter, dtype)
                bits = torch.int8.itemsize * 8 if dtype == "int8" else getattr(torch, dtype).itemsize * 8
                least = least_bytes(layers, bits, linear)
                rows.append(
                    {"file": f"S2FT, n={n}, {dtype}", "numbers": adapter.trainable, "bytes": size,
                     "/ least": round(size / least, 3), "relative error": error}
                )  # fmt: skip
        most = max(args.n)
        peers = {
            "LoRA r=4, float16": (LoraConfig(r=4, target_modules=targets), torch.float16),
            "LoRA r=32, float16": (LoraConfig(r=32, target_modules=targets), torch.float16),
            f"FourierFT, n={most}, float32": (FourierFTConfig(n_frequency=most, target_modules=linear), torch.float32),
        }
        for name, (config, dtype) in peers.items():
            model = sharing_weights(base)
            inject_adapter_in_model(config, model)
            state = {key: tensor.to(dtype).contiguous() for key, tensor in get_peft_model_state_dict(model).items()}
            save_file(state, path)
            numbers = sum(tensor.numel() for tensor in state.values())
            rows.append(
                {"file": name, "numbers": numbers, "bytes": path.stat().st_size, "/ least": None,
                 "relative error": None}
            )  # fmt: skip
    report("size", args, rows)


if __name__ == "__main__":
    main()
