"""The pipeline verbs: load, save, fuse, unfuse and unload S2FT adapters on any `DiffusionPipeline`.

Importing the package gives every pipeline these methods; activation and weights are diffusers' own `set_adapters`,
`disable_lora`, `delete_adapters` and so on.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from ..adapters.convert import export
from ..adapters.file import WEIGHTS_NAME, Adapter, AdapterInfo, adapter_from_peft, collect_adapter, write_adapter
from ..adapters.lora_files import LORA_NAME
from ..tuner.config import S2FTConfig
from ..tuner.layer import S2FTLayer
from ..tuner.model import check_name
from .activation import give_verbs
from .attach import (
    activate,
    active_kept,
    adaptable_components,
    adapter_info,
    attach_adapter,
    check_fits,
    check_swap,
    check_unwrapped,
    denoiser_name,
    detach_adapters,
    in_fused_attention,
    s2ft_adapters,
    s2ft_layers,
    swap_adapter,
)
from .guards import install_guards
from .offloading import offloading_paused
from .sources import find_adapter_file, read_any_adapter

logger = logging.getLogger(__name__)


def _in_ordinary_mode(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors made under `torch.inference_mode` could not be switched, swapped or trained outside it.

    What is read is in host memory first, and so is what is made for it, whatever `torch.set_default_device` says.
    """

    @functools.wraps(verb)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.device("cpu"):
            return verb(*args, **kwargs)

    return outside


@_in_ordinary_mode
def load_s2ft_weights(
    self: DiffusionPipeline,
    pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
    adapter_name: str | None = None,
    *,
    config: S2FTConfig | None = None,
    hotswap: bool = False,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Load an S2FT adapter into the pipeline; returns the adapter's name.

    Args:
        pretrained_model_name_or_path_or_dict: an adapter file, a folder that holds one or that PEFT's
            `save_pretrained` wrote, a repository on the hub, or a state dict in PEFT's keys (with `config`).
        adapter_name: the name to load it under; by default "s2ft_0", "s2ft_1", ...
        config: the adapter's config, for a state dict.
        hotswap: put the adapter in the place of `adapter_name`, which must be loaded and have the same layers with as
            many numbers. Nothing but values changes, so that a compiled pipeline is not compiled again. The place
            keeps its scaling (alpha): another one is multiplied into the coefficients.
        weight_name: which file of a folder or repository, as in `load_lora_weights`; so also:
        subfolder: the folder inside it.
        revision: the repository's.
        token: of the hub.

    The adapter loaded last, S2FT or LoRA, is the active one, also after `disable_lora`; activate several with
    `set_adapters`. Its coefficients keep the file's type and stay frozen: to train on, set its config's
    `inference_mode` to False, activate it, and call `.float()` on them.

    Everything is checked before anything changes. Raises AdapterFileError (a ValueError) for a file that is damaged,
    or made for another base model; ValueError for a name in use; OSError for a repository that cannot be reached.
    """
    if adapter_name is not None:
        check_name(adapter_name)
    check_unwrapped(self)
    components = adaptable_components(self)
    source = pretrained_model_name_or_path_or_dict
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError("A state dict needs its config: load_s2ft_weights(state_dict, config=S2FTConfig(...)).")
        adapter = adapter_from_peft(source, config, denoiser_name(components))
        label = "state dict"
    else:
        path = find_adapter_file(source, weight_name=weight_name, subfolder=subfolder, revision=revision, token=token)
        label = str(path)
        adapter = read_any_adapter(path, denoiser_name(components))
    used = {name for model in components.values() for name in getattr(model, "peft_config", {})}
    if hotswap:
        check_swap(adapter, components, adapter_name, label)
    elif adapter_name is None:
        adapter_name = next(f"s2ft_{i}" for i in range(len(used) + 1) if f"s2ft_{i}" not in used)
    if adapter_name in used and not hotswap:
        raise ValueError(f"There is an adapter named {adapter_name!r} already; delete it, or choose another name.")
    check_fits(adapter, components, label)
    if hotswap and any(adapter_name in layer.merged_adapters for layer in s2ft_layers(self)):
        raise ValueError(f"{adapter_name!r} is fused; call unfuse_s2ft() before another takes its place.")
    give_verbs(type(self))
    with offloading_paused(self):
        if hotswap:
            swap_adapter(components, adapter, adapter_name)
        else:
            attach_adapter(components, adapter, adapter_name)
            activate(components.values(), adapter_name)
    return adapter_name


@_in_ordinary_mode
def save_s2ft_weights(
    self: DiffusionPipeline,
    save_directory: str | os.PathLike,
    adapter_name: str | None = None,
    *,
    info: AdapterInfo | None = None,
    dtype: str = "float32",
    weight_name: str = WEIGHTS_NAME,
) -> Path:
    """Write an adapter of the pipeline to `save_directory`; returns the file's path.

    `adapter_name` may be left out where there is one S2FT adapter. `info` defaults to what the adapter was loaded with;
    `dtype` is that of the stored coefficients, "float32", "float16", "bfloat16" or "int8"; how much that changes the
    weight change is logged. Raises ValueError for an unknown type, and for an unknown or ambiguous name.
    """
    adapter = _collect(self, adapter_name, info)
    Path(save_directory).mkdir(parents=True, exist_ok=True)
    path = Path(save_directory) / weight_name
    written = write_adapter(path, adapter, dtype)
    logger.info(
        "%s: %d bytes; %s changes the weight change by %.2g", path, written.bytes, dtype, written.relative_error
    )
    return path


@_in_ordinary_mode
def save_s2ft_as_lora(
    self: DiffusionPipeline,
    save_directory: str | os.PathLike,
    adapter_name: str | None = None,
    *,
    to: Literal["lora", "peft", "kohya", "comfyui"] = "lora",
    dtype: str = "float16",
    rank: int | None = None,
    error: float | None = None,
    weight_name: str = LORA_NAME,
) -> Path:
    """Write an adapter as a LoRA for programs that do not know S2FT; returns the file's path, or the folder of "peft".

    `to` says in whose names: diffusers' own ("lora": `load_lora_weights(save_directory)`), PEFT's, kohya's (A1111,
    Forge) or ComfyUI's; `dtype` the type of its numbers. On a grid the LoRA is exact but for rounding; at free
    positions it is the nearest of a `rank`, or of the smallest rank with at most a relative `error` in every layer, and
    one of them is needed. The error is logged. `adapter_name` is as in `save_s2ft_weights`. Raises ValueError for
    unknown words and for a layer that the format has no name for.
    """
    adapter = _collect(self, adapter_name, None)
    path = Path(save_directory) if to == "peft" else Path(save_directory) / weight_name
    written = export(adapter, path, to=to, dtype=dtype, rank=rank, error=error)
    logger.info("%s: %d bytes; relative error %.2g", path, written.bytes, written.relative_error)
    return path


def _collect(pipeline: DiffusionPipeline, adapter_name: str | None, info: AdapterInfo | None) -> Adapter:
    """An adapter of a pipeline apart from it, by default the only one, with what it was loaded with as its info."""
    components = adaptable_components(pipeline)
    names = s2ft_adapters(pipeline)
    if adapter_name is None:
        if len(names) != 1:
            raise ValueError(f"Say which adapter to save with adapter_name: the pipeline has {names}.")
        adapter_name = names[0]
    for model in components.values():
        info = info or adapter_info(model, adapter_name)
    with offloading_paused(pipeline):
        return collect_adapter(components, adapter_name, info)


@_in_ordinary_mode
def unload_s2ft_weights(self: DiffusionPipeline) -> None:
    """Remove all S2FT layers from the pipeline; LoRAs stay.

    Unfused adapters leave no trace. What has been fused stays in the weights, as after `unload_lora_weights`, and the
    originals are forgotten; call `unfuse_s2ft` first for the base as it was.
    """
    models = adaptable_components(self).values()
    with offloading_paused(self), active_kept(models):
        for model in models:
            detach_adapters(model)


@_in_ordinary_mode
def fuse_s2ft(
    self: DiffusionPipeline,
    scale: float = 1.0,
    adapter_names: str | list[str] | None = None,
    *,
    safe_fusing: bool = False,
) -> None:
    """Add the active (or the named) S2FT adapters to the base weights, `scale` times; generation then costs nothing.

    `unfuse_s2ft` restores the base bit for bit, from originals kept in CPU memory (for the 64 layers of the paper's
    setting on Stable Diffusion 1.5: 187 MB in float32). Raises ValueError where there is no such adapter, or, with
    `safe_fusing`, for weights that would not be finite; nothing is changed then.
    """
    layers = s2ft_layers(self)
    known = s2ft_adapters(self)
    if isinstance(adapter_names, str):
        adapter_names = [adapter_names]
    if unknown := sorted(set(adapter_names or []) - set(known)):
        raise ValueError(f"There is no S2FT adapter named {unknown[0]!r}; the pipeline has {known}.")
    wanted = {name for layer in layers for name in (adapter_names or layer.active_adapters) if name in layer.s2ft_delta}
    if not wanted:
        raise ValueError("There is no active S2FT adapter to fuse; load one with load_s2ft_weights.")
    with offloading_paused(self):
        before = [layer.fused_state() for layer in layers]
        try:
            for layer in layers:
                layer.merge(safe_merge=safe_fusing, adapter_names=adapter_names, scale=scale)
        except BaseException:
            for layer, state in zip(layers, before, strict=True):
                layer.restore_fused_state(state)
            raise


@_in_ordinary_mode
def unfuse_s2ft(self: DiffusionPipeline) -> None:
    """Undo `fuse_s2ft`: the base weights are what they were, bit for bit.

    Raises ValueError, and changes nothing, while attention projections are fused into one: that is a copy of them.
    """
    for model in adaptable_components(self).values():
        for name, layer in model.named_modules():
            if isinstance(layer, S2FTLayer) and layer.merged and in_fused_attention(model, name):
                raise ValueError(f"{name} has fused projections; call unfuse_qkv_projections() before unfuse_s2ft().")
    with offloading_paused(self):
        for layer in s2ft_layers(self):
            if layer.merged:
                layer.unmerge()


VERBS = (load_s2ft_weights, save_s2ft_weights, save_s2ft_as_lora, unload_s2ft_weights, fuse_s2ft, unfuse_s2ft)


def install() -> None:
    """Give every pipeline the verbs, and diffusers' own methods their guards; doing it twice changes nothing."""
    if hasattr(DiffusionPipeline, "load_s2ft_weights"):
        return
    for verb in VERBS:
        setattr(DiffusionPipeline, verb.__name__, verb)
    install_guards()


install()
