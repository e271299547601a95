"""A base's pipeline from a hub id or a folder: loaded, packed, and placed where it is to run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from packaging.version import Version

from ..errors import InputError
from .family import Family
from .quantization import Quantization, check_quantization, quantize_model

DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"  # what diffusers calls it


def load_pipeline(
    location: str,
    family: type[Family],
    dtype: torch.dtype,
    options: Mapping[str, str] | None = None,
    *,
    vae_dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
    device: torch.device | str = "cpu",
    **components: Any,
) -> DiffusionPipeline:
    """A base's pipeline in host memory, its models in `dtype` but for the autoencoder, if that has a type of its own;
    `components` take the place of the base's.

    With `quantize`, the linear layers of the denoiser and of the text encoders are packed, on `device`, one model after
    the other: the device never has more than one packed model and one layer that is not. Raises InputError for a base
    that cannot be loaded, a package that is missing and a denoiser without linear layers.
    """
    if quantize is not None:
        check_quantization(quantize)
    kind = getattr(diffusers, family.pipeline_class)
    dtypes = {DTYPE: {"default": dtype, "vae": vae_dtype or dtype}}
    try:
        pipeline = kind.from_pretrained(location, **dtypes, **family.load_options, **(options or {}), **components)
    except (OSError, ValueError) as error:
        raise InputError(f"The base model {location!r} cannot be loaded: {str(error).strip()}") from None
    if quantize is not None:
        for name in (family.denoiser, *family.text_encoders):
            if getattr(pipeline, name, None) is not None:
                model = getattr(pipeline, name)
                quantize_model(model, quantize, dtype, device)
                model.to("cpu")
    return pipeline


def check_offload(quantize: Quantization | None) -> None:
    """Raise InputError where blocks of weights of this kind cannot be offloaded."""
    if quantize in ("nf4", "int8"):
        raise InputError(
            f"--offload and --quantize {quantize} contradict each other: bitsandbytes holds on to a layer's weight and "
            "scales by place. Choose one of them, or --quantize float8."
        )


def place_pipeline(
    pipeline: DiffusionPipeline,
    family: type[Family],
    device: torch.device | str,
    *,
    offload: bool = False,
) -> DiffusionPipeline:
    """Bring a loaded pipeline to the device that it generates on.

    With `offload`, the denoiser's blocks and the text encoders' stay in host memory and visit the device one by one
    (diffusers' group offloading, on a GPU with a stream that fetches the next one); all else goes to the device.
    """
    device = torch.device(device)
    if not offload:
        return pipeline.to(device)
    packed = (family.denoiser, *family.text_encoders)
    pipeline.enable_group_offload(
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
        exclude_modules=[name for name in pipeline.components if name not in packed],
    )
    return pipeline
