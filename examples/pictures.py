"""Pictures as an image classifier reads them: sizes, pixels, and what cannot be read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import DatasetDict, Image
from finetuning import readable
from PIL import Image as PILImage
from torchvision.transforms import v2
from transformers import BaseImageProcessor, PreTrainedModel

from s2ft_diffusion.errors import InputError


def check_pictures(data: DatasetDict) -> None:
    """Raise InputError for a picture that cannot be read: in training it would end an epoch in its middle."""
    for name, part in data.items():
        if not isinstance(part.features["image"], Image):
            raise InputError("--image_column names a column without pictures.")
        for number in range(len(part)):
            with readable(f"Picture {number + 1} of the {name} split"):
                part[number]


def transforms(processor: BaseImageProcessor, size: int | None, *, augment: bool) -> tuple[v2.Compose, int]:
    """From a PIL picture to what the model reads, as its processor says; and the size in pixels."""
    read = (
        processor.crop_size if getattr(processor, "do_center_crop", None) else getattr(processor, "size", None)
    ) or {}
    side = size or read.get("height") or read.get("shortest_edge")
    if side is None:
        raise InputError(f"{type(processor).__name__} does not say how large pictures are; give --image_size.")
    random = [v2.RandomResizedCrop(side, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()]
    resized = random if augment else [v2.Resize((side, side))]
    values = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if getattr(processor, "do_normalize", None):
        values.append(v2.Normalize(processor.image_mean, processor.image_std))
    if getattr(processor, "do_flip_channel_order", None):
        values.append(v2.Lambda(lambda pixels: pixels.flip(0)))
    return v2.Compose([v2.RGB(), *resized, *values]), side


def check_pixels(processor: BaseImageProcessor, transform: Callable[[PILImage.Image], torch.Tensor]) -> None:
    """Raise InputError where a picture of one colour is not the pixels that a model's own processor makes of it."""
    picture = PILImage.new("RGB", (640, 640), (255, 128, 0))
    with readable("The image processor"):
        theirs, ours = processor(picture, return_tensors="pt")["pixel_values"][0], transform(picture)
    middles = [pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2] for pixels in (theirs, ours)]
    if not torch.allclose(*middles, atol=1e-2):
        raise InputError(f"{type(processor).__name__} makes other pixels of a picture than this program can.")


def reader(transform: Callable[[Any], torch.Tensor]) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    """Rows with pictures to rows with pixels, as they are asked for."""
    return lambda rows: {"pixel_values": [transform(image) for image in rows["image"]], "labels": rows["label"]}


def prepare_position_embeddings(model: PreTrainedModel, side: int) -> dict[str, Any]:
    """What a batch must say besides pixels for a model made for another size of picture."""
    parameters = inspect.signature(model.forward).parameters
    other = side != getattr(model.config, "image_size", side)
    return {"interpolate_pos_encoding": True} if other and "interpolate_pos_encoding" in parameters else {}


def check_size(model: PreTrainedModel, side: int, more: Mapping[str, Any]) -> None:
    """Raise InputError for pictures of a size that a model, called with `more`, does not take."""
    try:
        with torch.no_grad():
            model(pixel_values=torch.zeros(1, 3, side, side), **more)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"The model does not take pictures of {side} pixels: {str(error).splitlines()[0]}") from None
