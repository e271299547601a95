"""One evaluation of the denoiser while sampling: the bare base beside an adapter unfused and fused, and a LoRA.

python -m benchmarks.infer --shape sd15 --json docs/results/infer.json
"""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from s2ft_diffusion import S2FTConfig, S2FTLayer

from .measure import CLOCKS, alternate, medians, parser, report
from .shapes import SHAPES, build, inputs, sharing_weights


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shape", choices=SHAPES, default="sd15")
    arguments.add_argument("--pixels", type=int)
    arguments.add_argument("--batch", type=int, default=2, help="2: one image with guidance")
    arguments.add_argument("--n", type=int, default=8000)
    arguments.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments.add_argument("--rounds", type=int, default=11)
    args = arguments.parse_args()
    dtype = getattr(torch, args.dtype)
    base = build(args.shape, args.device, dtype)
    batch = inputs(args.shape, args.batch, args.pixels or SHAPES[args.shape].pixels, args.device, dtype)
    targets = SHAPES[args.shape].targets(base)

    def adapted(config: S2FTConfig | LoraConfig) -> nn.Module:
        model = sharing_weights(base)
        inject_adapter_in_model(config, model)
        return model.requires_grad_(False)

    def fused() -> nn.Module:
        model = adapted(s2ft)
        for module in model.modules():
            if isinstance(module, S2FTLayer):
                layer = module.get_base_layer()
                layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)  # its own: the others share
                module.merge()
        return model

    s2ft = S2FTConfig(target_modules=targets, n_frequency=args.n, init_weights=False, scaling=1e-3)
    models = {
        "base": base,
        "S2FT": adapted(s2ft),
        "S2FT, fused": fused(),
        "LoRA r=32": adapted(LoraConfig(r=32, target_modules=targets, init_lora_weights=False)),
    }

    @torch.no_grad()
    def evaluate(name: str) -> None:
        models[name](**batch)

    found = medians(
        alternate({name: lambda name=name: evaluate(name) for name in models}, args.rounds, clock=CLOCKS[args.clock])
    )
    rows = [
        {"": name, "seconds": round(found[name], 4), "/ base": round(found[name] / found["base"], 4)} for name in models
    ]
    report("infer", args, rows)


if __name__ == "__main__":
    main()
