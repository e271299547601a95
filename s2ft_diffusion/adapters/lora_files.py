"""LoRA files in other tools' names, written and read, with the metadata that those tools show."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ..text import printable
from . import tool_names
from .lora import Lora, LoraLayer
from .names import CLIP_WRAPPER, canonical_name
from .reading import COMPONENTS, AdapterFileError, AdapterInfo, unreadable
from .tool_names import Tool

if TYPE_CHECKING:
    from peft import LoraConfig

PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"
LORA_NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # a base's weights, by component and layer


def state_dict(lora: Lora, tool: Tool) -> dict[str, torch.Tensor]:
    """A LoRA's tensors in a tool's names; kohya's and ComfyUI's U-Nets have an `alpha` equal to the rank besides.

    Raises ValueError for a layer that the tool has no name for, and for a depthwise convolution.
    """
    tensors: dict[str, torch.Tensor] = {}
    sdxl = tool_names.is_sdxl(_shapes(lora))
    for component, layers in lora.layers.items():
        down_end, up_end = tool_names.ends(tool, component)
        for name, layer in layers.items():
            try:
                key = tool_names.key(tool, component, name, sdxl=sdxl)
            except ValueError as error:
                raise ValueError(f"{component}.{name}: {error}.") from None
            if math.prod(layer.kernel) > 1 and layer.down.shape[1] == math.prod(layer.kernel):
                raise ValueError(
                    f"{component}.{name}: a depthwise convolution, for which LoRA files have no form; merge it into "
                    "the base."
                )
            if key + down_end in tensors:
                raise ValueError(f"{component}.{name} is there under two names.")
            tensors[key + down_end] = _spread(layer.down, layer.kernel)
            tensors[key + up_end] = _spread(layer.up, (1,) * len(layer.kernel))
            if down_end == ".lora_down.weight":
                tensors[key + ".alpha"] = torch.tensor(float(layer.rank))  # half precision has not every rank
    return tensors


def dense_state_dict(changes: Mapping[str, Mapping[str, torch.Tensor]], tool: Tool) -> dict[str, torch.Tensor]:
    """Whole weight changes in a tool's names (`.diff`), which kohya's successors and ComfyUI read.

    Raises ValueError for "lora" and "peft", which have no such thing, and as `state_dict` does.
    """
    if tool not in ("kohya", "comfyui"):
        raise ValueError(f"{tool} files hold low-rank changes only: dense ones are for kohya or comfyui.")
    sdxl = tool_names.is_sdxl({c: {n: tuple(x.flatten(1).shape) for n, x in ls.items()} for c, ls in changes.items()})
    tensors = {}
    for component, layers in changes.items():
        for name, change in layers.items():
            try:
                tensors[tool_names.key(tool, component, name, sdxl=sdxl) + ".diff"] = change.contiguous()
            except ValueError as error:
                raise ValueError(f"{component}.{name}: {error}.") from None
    return tensors


def _shapes(lora: Lora) -> dict[str, dict[str, tuple[int, int]]]:
    return {c: {name: layer.shape for name, layer in layers.items()} for c, layers in lora.layers.items()}


def _spread(matrix: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """A matrix (n, m * prod(kernel)) as a convolution's weight (n, m, *kernel)."""
    return matrix.reshape(matrix.shape[0], -1, *kernel).contiguous() if kernel else matrix.contiguous()


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Write a safetensors file beside its place and rename it; returns its bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save(dict(tensors), dict(metadata)))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def write_lora(path: str | os.PathLike, lora: Lora, tool: Tool, *, title: str | None = None) -> int:
    """Write a LoRA for a tool; returns the bytes. For "peft", `path` is a folder, else a file.

    A PEFT adapter belongs to one model: of several components each gets a folder of its name in `path`.
    """
    if tool == "peft":
        return _write_peft(Path(path), lora)
    tensors = state_dict(lora, tool)
    described = describe_adapter(lora.info, _shapes(lora), title or printable(Path(path).stem), lora.ranks)
    return write_tensors(path, tensors, described)


def _write_peft(folder: Path, lora: Lora) -> int:
    written = 0
    for component, layers in lora.layers.items():
        place = folder / component if len(lora.layers) > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        layers = {_installed_name(lora, component, name): layer for name, layer in layers.items()}
        one = Lora({component: layers})
        written += write_tensors(place / PEFT_WEIGHTS_NAME, state_dict(one, "peft"), {"format": "pt"})
        text = json.dumps(peft_config(layers, lora.info.base_model), indent=2, sort_keys=True)
        (place / PEFT_CONFIG_NAME).write_text(text, encoding="utf-8")
    return written


def _installed_name(lora: Lora, component: str, name: str) -> str:
    """A layer's name in the installed transformers' model, which PEFT looks for.

    `CLIPTextModel` has no inner `text_model` from 5.6 on. `CLIPTextModelWithProjection` still has: that is the second
    encoder, and of Stable Diffusion 3, a transformer beside two of CLIP's, the first one too.
    """
    second = lora.layers.get("text_encoder_2", {})
    projected = "transformer" in lora.layers and any(layer.startswith(CLIP_WRAPPER) for layer in second)
    unwrapped = component == "text_encoder" and not projected and Version(version("transformers")) >= Version("5.6")
    return name.removeprefix(CLIP_WRAPPER) if unwrapped else name


def peft_config(layers: Mapping[str, LoraLayer], base_model: str | None) -> dict[str, Any]:
    """The `adapter_config.json` of a LoRA, whose alphas equal its ranks."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes an expression for every layer that ends like it, unless it says where a name begins.
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": "|".join(map(re.escape, layers)),
        "inference_mode": True,
        "bias": "none",
    }


# Metadata ------------------------------------------------------------------------------------------------------------

# base model versions as kohya's and Stability AI's conventions (ModelSpec) name them, by the width of cross-attention
_VERSIONS = {
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2-512"),
    tool_names.SDXL_CONTEXT: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
# and by words of the base's name, where layers don't tell transformers apart; the first that is in it counts
_TRANSFORMERS = (
    (r"flux[\W_]*2", "flux2", "flux-2"),
    (r"flux.*schnell", "flux1", "flux-1-schnell"),
    (r"flux", "flux1", "flux-1-dev"),
    (r"stable[\W_]*diffusion[\W_]*3|sd3", "sd3", "stable-diffusion-3"),
    (r"qwen[\W_]*image", "qwen_image", "qwen-image"),
    (r"z[\W_]*image", "z_image", "z-image"),
    (r"lumina", "lumina2", "lumina-2"),
)


def base_version(info: AdapterInfo, shapes: Mapping[str, Mapping[str, tuple[int, int]]]) -> tuple[str, str] | None:
    """A base's version in kohya's words and in ModelSpec's, from the layers or the base's name; None if unknown."""
    if "transformer" in shapes:
        name = (info.base_model or "").lower()
        return next(((kohya, spec) for word, kohya, spec in _TRANSFORMERS if re.search(word, name)), None)
    return (
        _VERSIONS[tool_names.SDXL_CONTEXT]
        if tool_names.is_sdxl(shapes)
        else _VERSIONS.get(tool_names.context_width(shapes))
    )


def describe_adapter(
    info: AdapterInfo,
    shapes: Mapping[str, Mapping[str, tuple[int, int]]],
    title: str,
    ranks: tuple[int, int] | None = None,
) -> dict[str, str]:
    """Header metadata in the words of kohya's sd-scripts (`ss_*`) and ModelSpec 1.0.1 (`modelspec.*`), where known.

    `shapes` are the layers' (d, k) by component, `ranks` the smallest and largest of a LoRA.
    """
    training = info.training
    base = base_version(info, shapes)
    rank = ranks and (str(ranks[1]) if ranks[0] == ranks[1] else "Dynamic")
    resolution = training.get("resolution")
    thumbnail = info.thumbnail and f"data:image/webp;base64,{base64.b64encode(info.thumbnail).decode()}"
    tags = {info.subject or title: {info.instance_prompt: 1}} if info.instance_prompt else None
    started = _timestamp(info.date)
    found = {
        "format": "pt",
        "ss_network_module": rank and "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": title,
        "ss_sd_model_name": info.base_model,
        "ss_base_model_version": base and base[0],
        "ss_v2": base and str(base[0] == "sd_v2"),
        "ss_resolution": resolution and f"({resolution}, {resolution})",
        "ss_steps": training.get("steps"),
        "ss_learning_rate": training.get("learning_rate"),
        "ss_training_started_at": started,
        "ss_tag_frequency": tags and json.dumps(tags, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base and f"{base[1]}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": resolution and f"{resolution}x{resolution}",
        "modelspec.date": info.date,
        "modelspec.description": info.class_name and f"S2FT adapter of a {info.class_name}, as a LoRA",
        "modelspec.trigger_phrase": info.instance_prompt,
        "modelspec.thumbnail": thumbnail,
    }
    return {key: str(value) for key, value in found.items() if value not in (None, "")}


def _timestamp(date: str | None) -> float | None:
    try:
        return datetime.fromisoformat(date).timestamp() if date else None
    except ValueError:
        return None


# Reading -------------------------------------------------------------------------------------------------------------


def read_lora(path: str | os.PathLike, base: Shapes | None = None) -> Lora:
    """Read a LoRA in diffusers', PEFT's (a folder), kohya's or ComfyUI's names.

    `base` is the shapes of a base's weights (`weight_shapes`): kohya's names cannot be told apart without them.
    Raises AdapterFileError for what is no LoRA, or not wholly understood, and of it NoSuchLayer for names in kohya's
    way that the base has no layers for.
    """
    path = Path(path)
    if not path.exists():
        raise AdapterFileError(f"{path}: there is no such file or folder.")
    if path.is_dir():
        return _read_peft(path)
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            configs = _stored_configs(path, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.+?)\.(lora_A|lora_down|lora_B|lora_up|alpha)(\.default)?(\.weight)?", key)
        if found is None:
            raise AdapterFileError(f"{path}: {key!r} is no key of a LoRA.")
        kind = {"lora_A": "down", "lora_down": "down", "alpha": "alpha"}.get(found[2], "up")
        parts.setdefault(found[1], {})[kind] = tensor
    known = _known_names(base)
    lora = Lora({})
    for key, part in parts.items():
        component, _, name = key.partition(".")
        if component in COMPONENTS:
            scale = _scale(configs[component], name, part) if component in configs else 1.0
            name = canonical_name(component, name)
        elif key in known:
            (component, name), scale = known[key], 1.0
        elif base is None:
            raise AdapterFileError(f"{path}: {key!r}: give the base model to read kohya's names.")
        else:
            raise NoSuchLayer(f"{path}: {key!r}: the base model has no such layer.")
        if name in lora.layers.setdefault(component, {}):
            raise AdapterFileError(f"{path}: {component}.{name} is there under two names.")
        lora.layers[component][name] = _layer(path, key, part, scale)
    if not lora.layers:
        raise AdapterFileError(f"{path}: there are no LoRA weights in it.")
    return lora


class NoSuchLayer(AdapterFileError):
    """A LoRA's layer that a base has not."""


def _stored_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, LoraConfig]:
    """PEFT's configs by component, which diffusers writes into a LoRA's header: they have its alphas."""
    from peft import LoraConfig

    try:
        stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        fields: dict[str, dict[str, Any]] = {}
        for key, value in stored.items():
            component, _, field = key.partition(".")
            fields.setdefault(component, {})[field] = value
        return {component: LoraConfig(**found) for component, found in fields.items() if component in COMPONENTS}
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{path}: its lora_adapter_metadata cannot be read ({error}).") from None


def _scale(config: LoraConfig, name: str, part: Mapping[str, torch.Tensor]) -> float:
    """What PEFT multiplies a layer's factors by; 1 where the layer has an alpha of its own, or no factors."""
    from peft.utils.other import get_pattern_key

    if "alpha" in part or "down" not in part or not len(part["down"]):
        return 1.0
    rank = len(part["down"])
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _known_names(base: Shapes | None) -> dict[str, tuple[str, str]]:
    """Layers of a base by the names that kohya's files may have for them."""
    known: dict[str, tuple[str, str]] = {}
    if base is None:
        return known
    for component, shapes in base.items():
        for name in shapes:
            for sdxl in (False, True):
                try:
                    key = tool_names.key("kohya", component, name, sdxl=sdxl)
                except (ValueError, KeyError):
                    continue
                known[key] = (component, canonical_name(component, name))
    return known


def _layer(path: Path, key: str, part: Mapping[str, torch.Tensor], scale: float = 1.0) -> LoraLayer:
    if not {"up", "down"} <= part.keys():
        raise AdapterFileError(f"{path}: {key!r} lacks one of its two factors.")
    up, down = part["up"], part["down"]
    fit = up.ndim > 1 and down.ndim > 1 and up.shape[1] == down.shape[0] and math.prod(up.shape[2:]) == 1
    if not fit or not (up.numel() and down.numel()):
        raise AdapterFileError(f"{path}: {key!r} has factors of shapes {tuple(up.shape)} and {tuple(down.shape)}.")
    if "alpha" in part:
        scale *= float(part["alpha"]) / down.shape[0]
    up = up.flatten(1).float() * scale
    down_matrix = down.flatten(1).float()
    if not (torch.isfinite(up).all() and torch.isfinite(down_matrix).all()):
        raise AdapterFileError(f"{path}: {key!r} has NaN or infinite entries.")
    return LoraLayer(up, down_matrix, tuple(down.shape[2:]))


def _read_peft(folder: Path) -> Lora:
    inner = {c: folder / c for c in COMPONENTS if (folder / c / PEFT_CONFIG_NAME).is_file()}
    if not (folder / PEFT_CONFIG_NAME).is_file() and not inner:
        if (folder / LORA_NAME).is_file():
            return read_lora(folder / LORA_NAME)
        raise AdapterFileError(f"{folder}: there is no {PEFT_CONFIG_NAME} in it.")
    lora = Lora({})
    for component, place in inner.items() or [("", folder)]:
        lora.layers |= _read_peft_layers(place, component)
    return lora


def _read_peft_layers(folder: Path, component: str) -> dict[str, dict[str, LoraLayer]]:
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(folder)
        tensors = load_file(folder / PEFT_WEIGHTS_NAME)
    except (SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
        raise AdapterFileError(f"{folder}: cannot be read as a PEFT LoRA ({error}).") from None
    if config.peft_type != "LORA" or config.use_dora:
        kind = "DoRA" if config.peft_type == "LORA" else str(config.peft_type)
        raise AdapterFileError(f"{folder}: a {kind} adapter, no plain LoRA.")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B)\.weight", key)
        if found is None:
            raise AdapterFileError(f"{folder}: {key!r} is no key of a LoRA.")
        parts.setdefault(found[1], {})["down" if found[2] == "lora_A" else "up"] = tensor
    if not parts:
        raise AdapterFileError(f"{folder}: there are no LoRA weights in it.")
    component = component or tool_names.component_of(parts)
    return {
        component: {
            canonical_name(component, name): _layer(folder, name, part, _scale(config, name, part))
            for name, part in parts.items()
        }
    }
