"""What images and prompts are compared by: DINO, CLIP and LPIPS, the paper's by default, others by name or folder.

Nothing is silently replaced: an encoder that cannot be had is an error that says which, why, and what to pass instead.
The embedded world has its own (`toybox`), because its 64-pixel drawings are nothing that photographs' encoders know.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoImageProcessor, AutoModel, ViTModel

from . import toybox

DINO, CLIP, LPIPS = "facebook/dino-vits16", "ViT-B-32/openai", "alex"
LPIPS_NETS = ("alex", "vgg", "squeeze")
TOYBOX = "toybox"


class EncoderError(OSError):
    """An encoder that cannot be loaded."""


class FeatureCache:
    """Features kept on disk, by the content of the image and of the encoder's weights."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __call__(
        self, key: str, images: Sequence[Image.Image], encode: Callable[[list[Image.Image]], torch.Tensor]
    ) -> torch.Tensor:
        """Features (n, dim) of images: those kept, and those that `encode` makes of the others."""
        if self.folder is None:
            return encode(list(images))
        paths = [self.folder / key / f"{_image_key(image)}.npy" for image in images]
        missing = {path: image for path, image in zip(paths, images, strict=True) if not path.exists()}
        if missing:
            (self.folder / key).mkdir(parents=True, exist_ok=True)
            for path, feature in zip(missing, encode(list(missing.values())), strict=True):
                temporary = path.with_suffix(".tmp.npy")
                np.save(temporary, feature.numpy())
                temporary.replace(path)
        return torch.from_numpy(np.stack([np.load(path) for path in paths]))


@dataclass
class _Encoder(ABC):
    name: str
    model: nn.Module
    device: str
    batch_size: int
    cache: FeatureCache

    def __post_init__(self) -> None:
        self.model = self.model.float().eval().requires_grad_(False).to(self.device)
        digest = hashlib.sha256(type(self).__name__.encode())
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + tensor.cpu().numpy().tobytes())
        self.key = digest.hexdigest()[:16]

    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features of unit length (n, dim), on the CPU."""
        return self.cache(self.key, images, self._in_batches)

    @torch.no_grad()
    def _in_batches(self, images: Sequence[Any]) -> torch.Tensor:
        parts = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
        return torch.cat([F.normalize(self._encode(part), dim=-1).float().cpu() for part in parts])

    @abstractmethod
    def _encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features (n, dim) of one batch."""


@dataclass
class Dino(_Encoder):
    """A self-supervised ViT through transformers; its class token (Caron et al., 2021)."""

    processor: Any = None

    def _encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = self.processor([image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        return self.model(pixels.to(self.device)).last_hidden_state[:, 0]


@dataclass
class Clip(_Encoder):
    """A CLIP through open_clip (Radford et al., 2021)."""

    transform: Callable[[Image.Image], torch.Tensor] | None = None
    tokenizer: Callable[[list[str]], torch.Tensor] | None = None

    def _encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = torch.stack([self.transform(image.convert("RGB")) for image in images])
        return self.model.encode_image(pixels.to(self.device))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Features of unit length (n, dim) of prompts."""
        found = self.model.encode_text(self.tokenizer(list(prompts)).to(self.device))
        return F.normalize(found, dim=-1).float().cpu()


@dataclass
class Lpips:
    """LPIPS distances (Zhang et al., 2018), through the authors' package; images of a call are of one size."""

    name: str
    model: lpips.LPIPS
    device: str
    batch_size: int

    def __post_init__(self) -> None:
        self.model = self.model.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> torch.Tensor:
        """Distances (n,) of images with their counterparts."""
        found = []
        for i in range(0, len(first), self.batch_size):
            a, b = (_pixels(images[i : i + self.batch_size]).to(self.device) for images in (first, second))
            found.append(self.model(a, b).flatten().cpu())
        return torch.cat(found)

    def among(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """The symmetric matrix (n, n) of distances among images."""
        rows, columns = torch.triu_indices(len(images), len(images), 1)
        matrix = torch.zeros(len(images), len(images))
        if len(rows):
            matrix[rows, columns] = self([images[i] for i in rows], [images[i] for i in columns])
        return matrix + matrix.T


@dataclass(frozen=True)
class Encoders:
    """The three, by which everything is scored."""

    dino: Dino
    clip: Clip
    lpips: Lpips

    @property
    def names(self) -> dict[str, str]:
        return {"dino": self.dino.name, "clip": self.clip.name, "lpips": self.lpips.name}


def load_encoders(
    dino: str = DINO,
    clip: str = CLIP,
    perceptual: str = LPIPS,
    *,
    device: str = "cpu",
    batch_size: int = 32,
    cache: Path | None = None,
) -> Encoders:
    """Load the encoders.

    Args:
        dino: a ViT for transformers, on the hub or in a folder, or "toybox".
        clip: open_clip's "architecture/pretraining" or "hf-hub:owner/name", a folder in its layout, or "toybox".
        perceptual: LPIPS' "alex", "vgg" or "squeeze", or "toybox".
        device, batch_size: where, and how many images at once.
        cache: a folder to keep features in.

    Raises EncoderError for one that cannot be had.
    """
    kept = FeatureCache(cache)
    return Encoders(
        _load_dino(dino, device, batch_size, kept),
        _load_clip(clip, device, batch_size, kept),
        _load_lpips(perceptual, device, batch_size),
    )


def _load_dino(name: str, device: str, batch_size: int, cache: FeatureCache) -> Dino:
    location = toybox.DINO_FOLDER if name == TOYBOX else name
    try:
        processor = AutoImageProcessor.from_pretrained(location)
        model = AutoModel.from_pretrained(location, add_pooling_layer=False)
    except (OSError, ValueError, TypeError) as error:
        raise EncoderError(
            f"The DINO encoder {name!r} cannot be had ({_first_line(error)}). Pass --dino with a ViT's name on the "
            "hub, its folder, or toybox for the embedded world's."
        ) from None
    return Dino(name, model, device, batch_size, cache, processor)


def _load_clip(name: str, device: str, batch_size: int, cache: FeatureCache) -> Clip:
    architecture, _, pretraining = name.partition("/")
    if name == TOYBOX:
        architecture, pretraining = f"local-dir:{toybox.CLIP_FOLDER}", ""
    elif name.startswith("hf-hub:") or Path(name).is_dir():
        architecture, pretraining = name if name.startswith("hf-hub:") else f"local-dir:{name}", ""
    try:
        model, _, transform = open_clip.create_model_and_transforms(architecture, pretraining or None)
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # open_clip raises what the hub's client, torch or json raise
        raise EncoderError(
            f"The CLIP encoder {name!r} cannot be had ({_first_line(error)}). Pass --clip with ARCHITECTURE/WEIGHTS "
            "or hf-hub:OWNER/NAME as open_clip knows them, a folder in its layout, or toybox for the embedded world's."
        ) from None
    return Clip(name, model, device, batch_size, cache, transform, tokenizer)


def _load_lpips(name: str, device: str, batch_size: int) -> Lpips:
    if name == TOYBOX:
        return Lpips("toybox (unweighted, its ViT's patch tokens)", ToyboxLpips(), device, batch_size)
    if name not in LPIPS_NETS:
        raise EncoderError(f"There is no LPIPS network {name!r}. Pass --lpips with one of {LPIPS_NETS}, or toybox.")
    try:
        model = lpips.LPIPS(net=name, verbose=False)
    except (OSError, RuntimeError) as error:
        raise EncoderError(
            f"LPIPS' {name!r} network cannot be had ({_first_line(error)}): torchvision's ImageNet weights are "
            "downloaded once. Pass --lpips toybox for the embedded world's."
        ) from None
    return Lpips(name, model, device, batch_size)


class ToyboxLpips(lpips.LPIPS):
    """LPIPS with the embedded world's self-supervised ViT as its trunk, layers averaged without weights.

    Neither ImageNet networks nor human judgements exist of this world. Zhang et al. find that what a network has
    learned matters more than the calibration: self-supervised trunks without it come close to supervised ones. Patch
    tokens after each block are its feature maps. Whether it ranks distortions as one would expect is tested.
    """

    def __init__(self) -> None:
        super().__init__(net="alex", lpips=False, pnet_rand=True, verbose=False)
        self.net = _PatchTokens(ViTModel.from_pretrained(toybox.DINO_FOLDER, add_pooling_layer=False).float())
        self.scaling_layer = nn.Identity()  # this ViT takes pixels in [-1, 1]
        self.L = self.net.layers


class _PatchTokens(nn.Module):
    def __init__(self, vit: ViTModel) -> None:
        super().__init__()
        self.vit, self.layers = vit, vit.config.num_hidden_layers

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        states = self.vit(pixels, output_hidden_states=True).hidden_states[1:]
        side = int((states[0].shape[1] - 1) ** 0.5)
        return [state[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for state in states]


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Images (n, 3, height, width) in [-1, 1]."""
    return torch.stack([transforms.pil_to_tensor(image.convert("RGB")) for image in images]).float() / 127.5 - 1


def _image_key(image: Image.Image) -> str:
    rgb = image.convert("RGB")
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()[:32]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
