"""Adapters of random numbers for the layers of tiny models, made without models that are adapted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers
import torch
from torch import nn

from s2ft_diffusion import AdapterInfo, S2FTConfig, attention_targets
from s2ft_diffusion.adapters.file import Adapter
from s2ft_diffusion.adapters.names import canonical_name
from s2ft_diffusion.adapters.weights import FreeWeights, GridWeights, LayerWeights
from s2ft_diffusion.tuner.layer import delta_shape
from s2ft_diffusion.tuner.rearrange import Rearrangement, find_rearrangement

ROPE = {"axes_dims_rope": (4, 4, 8), "attention_head_dim": 16, "num_attention_heads": 4}


def tiny_denoisers() -> dict[str, nn.Module]:
    """A model of each family on the meta device, by the family's name."""
    with torch.device("meta"):
        return {
            "sd15": tiny_unet(),
            "sdxl": tiny_unet(sdxl=True),
            "sd3": diffusers.SD3Transformer2DModel(
                sample_size=8, num_layers=2, num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=128,
                pooled_projection_dim=16, pos_embed_max_size=8,
            ),
            "flux": diffusers.FluxTransformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=16,
                **ROPE,
            ),
            "flux2": diffusers.Flux2Transformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=32, **ROPE
            ),
            "qwen": diffusers.QwenImageTransformer2DModel(
                in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=32, **ROPE
            ),
            "zimage": diffusers.ZImageTransformer2DModel(
                in_channels=4, dim=64, n_layers=1, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=32,
                axes_dims=[4, 4, 8], axes_lens=[32, 32, 32],
            ),
        }  # fmt: skip


def tiny_unet(sdxl: bool = False) -> diffusers.UNet2DConditionModel:
    """A U-Net of Stable Diffusion 1.5's or XL's make, and a twentieth of its width."""
    if not sdxl:
        return diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64, 64, 64), attention_head_dim=8, cross_attention_dim=768
        )
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 64), attention_head_dim=(1, 2, 2), cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def random_layer(
    shape: tuple[int, int], generator: torch.Generator, *, rank: int = 3, free: bool = False
) -> LayerWeights:
    """A layer of random numbers on a dense grid (rank, rank + 1), or at free positions."""
    d, k = shape

    def some(n: int, count: int) -> torch.Tensor:
        return torch.randperm(n, generator=generator)[:count].sort().values.int()

    arranged = {
        "row_order": torch.randperm(d, generator=generator).int(),
        "column_order": torch.randperm(k, generator=generator).int(),
        "row_sign": (2 * torch.randint(2, (d,), generator=generator) - 1).to(torch.int8),
        "column_sign": (2 * torch.randint(2, (k,), generator=generator) - 1).to(torch.int8),
    }
    if free:
        flat = torch.randperm((d - 1) // 2 * (k // 2), generator=generator)[:6]  # no mirrors among them
        positions = torch.stack([1 + flat // (k // 2), flat % (k // 2)], dim=1).int()
        numbers = torch.randn(len(positions), 2, generator=generator)
        return FreeWeights(shape=shape, coefficients=numbers, positions=positions, norm="ortho", **arranged)
    rows, columns = some(d, min(rank, d)), some(k, min(rank + 1, k))
    numbers = torch.randn(len(rows), len(columns), generator=generator)
    return GridWeights(shape=shape, coefficients=numbers, row_functions=rows, column_functions=columns, **arranged)


def random_adapter(
    models: Mapping[str, nn.Module],
    targets: Mapping[str, Sequence[str]] | None = None,
    *,
    free: bool = False,
    info: AdapterInfo | None = None,
) -> Adapter:
    """An adapter of random numbers for layers of models by component ("all" targets by default), with scaling 1.5."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, dict[str, LayerWeights]] = {}
    kernels: dict[str, dict[str, tuple[int, ...]]] = {}
    for component, model in models.items():
        layers[component], kernels[component] = {}, {}
        for name in targets[component] if targets else attention_targets(model, "all"):
            module = model.get_submodule(name)
            canonical = canonical_name(component, name)
            layers[component][canonical] = random_layer(delta_shape(module), generator, free=free)
            if not isinstance(module, nn.Linear):
                kernels[component][canonical] = tuple(module.kernel_size)
    choice = {"positions": "free"} if free else {}
    config = S2FTConfig(n_frequency=12, scaling=1.5, inference_mode=True, **choice)
    return Adapter(dict.fromkeys(layers, config), layers, info or AdapterInfo(), kernels)


def dense(adapter: Adapter, component: str, name: str) -> torch.Tensor:
    """A layer's weight change (d, k), scaling included."""
    return adapter.layers[component][name].delta() * adapter.configs[component].scaling


def some_targets(model: nn.Module, text: nn.Module | None = None) -> dict[str, list[str]]:
    """A few layers of every kind: attention, feed-forward, 3x3 and 1x1 convolutions."""
    found = [n for n in attention_targets(model, "all") if "down_blocks.0" in n or "mid_block" in n]
    return {"unet": found} | ({"text_encoder": attention_targets(text, "attention")} if text is not None else {})


def arranged(shape: tuple[int, int], seed: int = 0) -> Rearrangement:
    """Orders and signs of a random matrix."""
    generator = torch.Generator().manual_seed(seed)
    return find_rearrangement(torch.randn(shape, generator=generator), signs=True, generator=generator)
