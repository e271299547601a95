"""The nodes: Load S2FT (model, clip, file, two strengths) and S2FT Info (thumbnail and words of a file)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import folder_paths

try:
    import s2ft_diffusion  # noqa: F401
except ImportError:
    # From a clone of the repository that this folder is linked into, without an installation.
    root = Path(__file__).resolve().parents[2]
    if not (root / "s2ft_diffusion").is_dir():
        raise ImportError(
            "Load S2FT: the package s2ft_diffusion is missing; install it into ComfyUI's Python with "
            "`pip install --no-deps s2ft-diffusion`."
        ) from None
    sys.path.append(str(root))

from s2ft_diffusion.adapters.reading import Adapter, AdapterFileError, read_header, read_stored

from .patches import clip_patches, model_patches

FOLDER = "s2ft"  # in ComfyUI's models
BAR = " | "  # between a file's name and what it says about itself

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.folder_names_and_paths[FOLDER][0], {".safetensors"})

_labels: dict[tuple[str, float], str] = {}


def labels() -> list[str]:
    """The folder's files, each with its subject and trigger words where it says them."""
    return [_label(name) for name in folder_paths.get_filename_list(FOLDER)]


def _label(name: str) -> str:
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        return name
    seen = (path, os.path.getmtime(path))
    if seen not in _labels:
        try:
            info = read_header(path).info
            words = [info.subject, info.instance_prompt]
        except AdapterFileError:
            words = ["not an S2FT adapter"]
        _labels[seen] = BAR.join([name, *(word.replace(BAR, " ") for word in words if word)])
    return _labels[seen]


def find(label: str) -> str:
    """The path of a file of the folder, from its name or its label. Raises ValueError where it is not there."""
    name = label.split(BAR)[0]
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(f"Load S2FT: there is no {name} in {' or '.join(folder_paths.get_folder_paths(FOLDER))}.")
    return path


def validated(label: str) -> bool | str:
    """True, or what is wrong with a choice, for ComfyUI to show."""
    try:
        find(label)
    except ValueError as error:
        return str(error)
    return True


class LoadS2FT:
    """Applies an S2FT adapter to a model and its text encoders."""

    CATEGORY = "loaders"
    DESCRIPTION = "Applies an S2FT adapter file (of ComfyUI's models/s2ft) to a model and its text encoders."
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "trigger words")
    FUNCTION = "load"

    def __init__(self) -> None:
        self.read: tuple[tuple[str, float], Adapter] | None = None  # the file last used

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.05}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the adapter was trained on."}),
                "file": (labels(), {"tooltip": "A file in ComfyUI's models/s2ft, with its subject and trigger words."}),
                "strength_model": ("FLOAT", strength),
                "strength_clip": ("FLOAT", strength),
            },
            "optional": {"clip": ("CLIP", {"tooltip": "Needed for adapters of text encoders."})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, file: str) -> bool | str:
        return validated(file)

    @classmethod
    def IS_CHANGED(cls, file: str, **others: Any) -> float:
        return os.path.getmtime(find(file))

    def load(
        self, model: Any, file: str, strength_model: float, strength_clip: float, clip: Any = None
    ) -> tuple[Any, Any, str]:
        adapter = self._adapter(find(file))
        if strength_model != 0 and {"unet", "transformer"} & adapter.layers.keys():
            patches = model_patches(adapter, model)
            model = model.clone()
            model.add_patches(patches, strength_model)
        if strength_clip != 0 and {"text_encoder", "text_encoder_2"} & adapter.layers.keys():
            if clip is None:
                raise ValueError("Load S2FT: this adapter changes the text encoder too: connect clip.")
            patches = clip_patches(adapter, clip)
            clip = clip.clone()
            clip.add_patches(patches, strength_clip)
        return model, clip, adapter.info.instance_prompt or ""

    def _adapter(self, path: str) -> Adapter:
        seen = (path, os.path.getmtime(path))
        if self.read is None or self.read[0] != seen:
            try:
                self.read = (seen, read_stored(path))
            except AdapterFileError as error:
                raise ValueError(f"Load S2FT: {error}") from None
        return self.read[1]


class S2FTInfo:
    """What a file says about itself: its sample image and its words."""

    CATEGORY = "loaders"
    DESCRIPTION = "The sample image, trigger words and training facts of an S2FT adapter file."
    RETURN_TYPES = ("IMAGE", "STRING", "STRING")
    RETURN_NAMES = ("sample", "trigger words", "info")
    FUNCTION = "look"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (labels(),)}}

    @classmethod
    def VALIDATE_INPUTS(cls, file: str) -> bool | str:
        return validated(file)

    @classmethod
    def IS_CHANGED(cls, file: str) -> float:
        return os.path.getmtime(find(file))

    def look(self, file: str) -> tuple[Any, str, str]:
        try:
            header = read_header(find(file))
        except AdapterFileError as error:
            raise ValueError(f"S2FT Info: {error}") from None
        words = header.info.to_json()
        words.pop("thumbnail", None)
        words["numbers"] = header.trainable
        return _image(header.info.thumbnail), header.info.instance_prompt or "", json.dumps(words, indent=2)


def _image(thumbnail: bytes | None) -> Any:
    """ComfyUI's image (1, height, width, 3) in 0..1 of a WebP; a black one of 64 pixels where there is none."""
    import io

    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    if thumbnail is None:
        return torch.zeros(1, 64, 64, 3)
    try:
        picture = Image.open(io.BytesIO(thumbnail), formats=["WEBP"]).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        raise ValueError("S2FT Info: the file's sample image is damaged.") from None
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]


NODE_CLASS_MAPPINGS = {"LoadS2FT": LoadS2FT, "S2FTInfo": S2FTInfo}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadS2FT": "Load S2FT", "S2FTInfo": "S2FT Info"}
