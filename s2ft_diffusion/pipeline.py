"""The pipeline verbs: load, save, fuse, unfuse and unload S2FT adapters on any `DiffusionPipeline`.

Importing the package gives every pipeline these methods; activation and weights are diffusers' own `set_adapters`,
`disable_lora`, `delete_adapters` and so on.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import LoraBaseMixin, _func_optionally_disable_offloading
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .adapter_file import (
    COMPONENTS,
    WEIGHTS_NAME,
    Adapter,
    AdapterFileError,
    AdapterInfo,
    adapter_from_peft,
    collect_adapter,
    module_name,
    read_adapter,
    write_adapter,
)
from .config import S2FTConfig, S2FTType
from .layer import S2FTLayer, SpectralDelta

PEFT_WEIGHTS_NAME = "adapter_model.safetensors"

logger = logging.getLogger(__name__)


# Verbs ---------------------------------------------------------------------------------------------------------------


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
        weight_name, subfolder, revision, token: which file of a folder or repository, as in `load_lora_weights`.

    The adapter loaded last is the active one, as with `load_lora_weights`; activate several with `set_adapters`. Its
    coefficients keep the file's type (call `.float()` on them to train on).

    Everything is checked before anything changes. Raises AdapterFileError (a ValueError) for a file that is damaged,
    or made for another base model; ValueError for a name in use; OSError for a repository that cannot be reached.
    """
    components = adaptable_components(self)
    source = pretrained_model_name_or_path_or_dict
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError("A state dict needs its config: load_s2ft_weights(state_dict, config=S2FTConfig(...)).")
        adapter = adapter_from_peft(source, config, _denoiser_name(components))
        label = "state dict"
    else:
        path = find_adapter_file(source, weight_name=weight_name, subfolder=subfolder, revision=revision, token=token)
        label = str(path)
        adapter = _read_peft(path, components) if _is_peft(path) else read_adapter(path)
    used = {name for model in components.values() for name in getattr(model, "peft_config", {})}
    if hotswap:
        _check_swap(adapter, components, adapter_name, label)
    elif adapter_name is None:
        adapter_name = next(f"s2ft_{i}" for i in range(len(used) + 1) if f"s2ft_{i}" not in used)
    if adapter_name in used and not hotswap:
        raise ValueError(f"There is an adapter named {adapter_name!r} already; delete it, or choose another name.")
    check_fits(adapter, components, label)
    if any(layer.merged for layer in _layers(self)):
        raise ValueError("An S2FT adapter is fused; call unfuse_s2ft() before loading another.")
    with _offloading_paused(self):
        (swap_adapter if hotswap else attach_adapter)(components, adapter, adapter_name)
    _adapter_infos(self)[adapter_name] = adapter.info
    return adapter_name


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
    components = adaptable_components(self)
    names = s2ft_adapters(self)
    if adapter_name is None:
        if len(names) != 1:
            raise ValueError(f"Say which adapter to save with adapter_name: the pipeline has {names}.")
        adapter_name = names[0]
    info = info or _adapter_infos(self).get(adapter_name)
    with _offloading_paused(self):
        adapter = collect_adapter(components, adapter_name, info)
    Path(save_directory).mkdir(parents=True, exist_ok=True)
    path = Path(save_directory) / weight_name
    written = write_adapter(path, adapter, dtype)
    logger.info(
        "%s: %d bytes; %s changes the weight change by %.2g", path, written.bytes, dtype, written.relative_error
    )
    return path


def unload_s2ft_weights(self: DiffusionPipeline) -> None:
    """Remove all S2FT layers from the pipeline; LoRAs stay.

    Unfused adapters leave no trace. What has been fused stays in the weights, as after `unload_lora_weights`; call
    `unfuse_s2ft` first for the base as it was.
    """
    with _offloading_paused(self):
        for model in adaptable_components(self).values():
            detach_adapters(model)
    _adapter_infos(self).clear()


def fuse_s2ft(
    self: DiffusionPipeline,
    scale: float = 1.0,
    adapter_names: list[str] | None = None,
    *,
    safe_fusing: bool = False,
) -> None:
    """Add the active (or the named) S2FT adapters to the base weights, `scale` times; generation then costs nothing.

    `unfuse_s2ft` restores the base bit for bit, from originals kept in CPU memory (for the 64 layers of the paper's
    setting on Stable Diffusion 1.5: 187 MB in float32). Raises ValueError where there is no such adapter, or, with
    `safe_fusing`, for weights that would not be finite; nothing is changed then.
    """
    layers = _layers(self)
    known = s2ft_adapters(self)
    if unknown := sorted(set(adapter_names or []) - set(known)):
        raise ValueError(f"There is no S2FT adapter named {unknown[0]!r}; the pipeline has {known}.")
    wanted = {name for layer in layers for name in (adapter_names or layer.active_adapters) if name in layer.s2ft_delta}
    if not wanted:
        raise ValueError("There is no active S2FT adapter to fuse; load one with load_s2ft_weights.")
    with _offloading_paused(self):
        merged_before = [layer for layer in layers if layer.merged]
        try:
            for layer in layers:
                layer.merge(safe_merge=safe_fusing, adapter_names=adapter_names, scale=scale)
        except BaseException:
            for layer in layers:
                if layer.merged and layer not in merged_before:
                    layer.unmerge()
            raise


def unfuse_s2ft(self: DiffusionPipeline) -> None:
    """Undo `fuse_s2ft`: the base weights are what they were, bit for bit."""
    with _offloading_paused(self):
        for layer in _layers(self):
            if layer.merged:
                layer.unmerge()


def s2ft_adapters(self: DiffusionPipeline) -> list[str]:
    """Names of the pipeline's S2FT adapters, in the order of loading."""
    names = [name for model in adaptable_components(self).values() for name in _s2ft_configs(model)]
    return list(dict.fromkeys(names))


# Models --------------------------------------------------------------------------------------------------------------


def adaptable_components(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The models of a pipeline that an adapter may belong to, by component name."""
    found = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    return {name: getattr(model, "_orig_mod", model) for name, model in found.items() if isinstance(model, nn.Module)}


def _denoiser_name(components: Mapping[str, nn.Module]) -> str:
    return next(name for name in (*components, "unet") if name in ("unet", "transformer"))


def check_fits(adapter: Adapter, components: Mapping[str, nn.Module], label: str) -> None:
    """Raise AdapterFileError unless every layer of the adapter has its linear layer of equal shape in the models."""
    shapes = {c: {name: layer.shape for name, layer in layers.items()} for c, layers in adapter.layers.items()}
    check_shapes(shapes, components, label, adapter.info.base_model)


def check_shapes(
    shapes: Mapping[str, Mapping[str, tuple[int, int]]],
    components: Mapping[str, nn.Module],
    label: str,
    base_model: str | None = None,
) -> None:
    """`check_fits` for the shapes (d, k) of layers by component, as a file's header has them."""
    trained_on = base_model or "another model"
    for component, layers in shapes.items():
        if component not in components:
            raise AdapterFileError(f"{label}: the adapter is for a {component!r}, which this pipeline does not have.")
        model = components[component]
        for name, (d, k) in layers.items():
            linear = _linear(model, name)
            where = f"{component}.{name}"
            if linear is not None and _in_fused_attention(model, name):
                raise AdapterFileError(f"{label}: {where} has fused projections; call unfuse_qkv_projections() first.")
            if linear is None:
                raise AdapterFileError(
                    f"{label}: the adapter was trained on {trained_on} with a {d}x{k} layer at {where}, "
                    "this model has no linear layer there."
                )
            if (linear.out_features, linear.in_features) != (d, k):
                raise AdapterFileError(
                    f"{label}: the adapter was trained on {trained_on} with {d}x{k} at {where}, "
                    f"this model has {linear.out_features}x{linear.in_features}."
                )


def _linear(model: nn.Module, name: str) -> nn.Linear | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return module if isinstance(module, nn.Linear) else None


def _in_fused_attention(model: nn.Module, name: str) -> bool:
    """Whether a projection has been copied into a fused one, so that adapting it would do nothing."""
    parts = name.split(".")
    ancestors = (model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))
    return any(getattr(ancestor, "fused_projections", False) for ancestor in ancestors)


def attach_adapter(components: Mapping[str, nn.Module], adapter: Adapter, adapter_name: str) -> None:
    """Put a checked adapter into the models; on any failure they are left as they were."""
    attached = []
    present = [m for c in adapter.layers for m in components[c].modules() if isinstance(m, S2FTLayer)]
    active = [(layer, list(layer.active_adapters)) for layer in present]
    try:
        for component, layers in adapter.layers.items():
            model = components[component]
            attached.append(model)
            config = replace(adapter.configs[component], target_modules=list(layers), inference_mode=True)
            config.n_frequency_pattern = {
                name.replace(".", r"\."): layer.coefficients.numel() for name, layer in layers.items()
            }
            inject_adapter_in_model(config, model, adapter_name)
            model.peft_config[adapter_name].n_frequency_pattern = adapter.configs[component].n_frequency_pattern
            model._hf_peft_config_loaded = True
            for name, delta in _named_deltas(model, adapter_name).items():
                state = {key: tensor.to(delta.positions.device) for key, tensor in layers[name].tensors().items()}
                delta.load_state_dict(state, assign=True)  # in the file's type
    except BaseException:
        for model in attached:
            detach_adapters(model, adapter_name)
        for layer, names in active:
            layer.set_adapter(names, inference_mode=True)
        raise


def _check_swap(adapter: Adapter, components: Mapping[str, nn.Module], adapter_name: str | None, label: str) -> None:
    """Raise ValueError unless the adapter can take the place of `adapter_name`."""
    present = {c: _named_deltas(model, adapter_name) for c, model in components.items()}
    present = {component: deltas for component, deltas in present.items() if deltas}
    if not present:
        raise ValueError(f"hotswap needs the name of a loaded S2FT adapter to replace, got {adapter_name!r}.")
    for component in sorted(present.keys() | adapter.layers.keys()):
        old, new = present.get(component, {}), adapter.layers.get(component, {})
        if different := sorted(old.keys() ^ new.keys()):
            where = f"{component}.{different[0]}"
            raise ValueError(f"{label}: cannot be swapped in: only one of the two adapters has {where}.")
        for name, layer in new.items():
            place = old[name]
            found, wanted = tuple(layer.coefficients.shape), tuple(place.coefficients.shape)
            if (found, adapter.configs[component].norm) != (wanted, place.norm):
                raise ValueError(
                    f"{label}: cannot be swapped in: {component}.{name} has coefficients {found} with norm "
                    f"{adapter.configs[component].norm!r}, the place {wanted} with {place.norm!r}."
                )


@torch.no_grad()
def swap_adapter(components: Mapping[str, nn.Module], adapter: Adapter, adapter_name: str) -> None:
    """Give a loaded adapter the values of another, in place."""
    for component, layers in adapter.layers.items():
        model = components[component]
        place = model.peft_config[adapter_name]
        factor = adapter.configs[component].scaling / place.scaling
        config = replace(
            adapter.configs[component],
            scaling=place.scaling, target_modules=place.target_modules, inference_mode=place.inference_mode,
        )  # fmt: skip
        model.peft_config[adapter_name] = config
        for module in model.modules():
            if isinstance(module, S2FTLayer) and adapter_name in module.s2ft_delta:
                module.s2ft_config[adapter_name] = config
        for name, delta in _named_deltas(model, adapter_name).items():
            for key, tensor in layers[name].tensors().items():
                getattr(delta, key).copy_(tensor.float() * factor if key == "coefficients" else tensor)


def _named_deltas(model: nn.Module, adapter_name: str | None) -> dict[str, SpectralDelta]:
    """An adapter's deltas in a model, by the names of the linear layers."""
    return {
        module_name(name): module.s2ft_delta[adapter_name]
        for name, module in model.named_modules()
        if isinstance(module, S2FTLayer) and adapter_name in module.s2ft_delta
    }


def detach_adapters(model: nn.Module, adapter_name: str | None = None) -> None:
    """Remove one S2FT adapter, or all, from a model; layers that are left without one make way for what they wrap."""
    configs = getattr(model, "peft_config", {})
    for name, module in reversed(list(model.named_modules())):  # inside first: names outside stay true
        if not isinstance(module, S2FTLayer):
            continue
        for adapter in list(module.s2ft_delta):
            if adapter_name in (None, adapter):
                module.delete_adapter(adapter)
        if not module.s2ft_delta:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
    for name in _s2ft_configs(model):
        if adapter_name in (None, name):
            del configs[name]
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        model._hf_peft_config_loaded = False


def _layers(pipeline: DiffusionPipeline) -> list[S2FTLayer]:
    models = adaptable_components(pipeline).values()
    return [module for model in models for module in model.modules() if isinstance(module, S2FTLayer)]


def _adapter_infos(pipeline: DiffusionPipeline) -> dict[str, AdapterInfo]:
    return pipeline.__dict__.setdefault("_s2ft_infos", {})


@contextmanager
def _offloading_paused(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Offload hooks hold on to modules by place: take them off while layers change, as diffusers does for LoRA."""
    model_offload, sequential_offload, group_offload = _func_optionally_disable_offloading(pipeline)
    try:
        yield
    finally:
        if model_offload:
            pipeline.enable_model_cpu_offload()
        elif sequential_offload:
            pipeline.enable_sequential_cpu_offload()
        elif group_offload:
            for component in pipeline.components.values():
                if isinstance(component, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)


# Sources -------------------------------------------------------------------------------------------------------------


def find_adapter_file(
    source: str | os.PathLike,
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The file that a path or a repository name means; one on the hub is downloaded.

    Raises AdapterFileError where there is none, and OSError where the hub cannot be reached or has none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        names = [weight_name] if weight_name else [WEIGHTS_NAME, PEFT_WEIGHTS_NAME]
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise AdapterFileError(f"{folder}: there is no {' or '.join(names)} in it.")
    if path.is_absolute() or str(source).endswith(".safetensors"):
        raise AdapterFileError(f"{source}: there is no such file or folder.")
    options = {"subfolder": subfolder, "revision": revision, "token": token}
    try:
        try:
            return Path(hf_hub_download(str(source), weight_name or WEIGHTS_NAME, **options))
        except EntryNotFoundError as error:
            if weight_name or isinstance(error, LocalEntryNotFoundError):
                raise
            hf_hub_download(str(source), "adapter_config.json", **options)
            return Path(hf_hub_download(str(source), PEFT_WEIGHTS_NAME, **options))
    except HFValidationError:
        raise AdapterFileError(f"{source}: neither a file, nor a folder, nor the name of a repository.") from None
    except LocalEntryNotFoundError as error:
        raise OSError(f"{source}: no such local path, and the hub cannot be reached ({error}).") from error
    except EntryNotFoundError as error:
        raise OSError(f"{source}: the repository has no {weight_name or WEIGHTS_NAME}.") from error
    except HfHubHTTPError as error:
        raise OSError(f"{source}: no such local path, and the hub says: {error}") from error


def _is_peft(path: Path) -> bool:
    return path.name == PEFT_WEIGHTS_NAME and (path.parent / "adapter_config.json").is_file()


def _read_peft(path: Path, components: Mapping[str, nn.Module]) -> Adapter:
    try:
        config = PeftConfig.from_pretrained(path.parent)
        state_dict = load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(f"{path}: cannot be read as a PEFT adapter ({error}).") from None
    if not isinstance(config, S2FTConfig):
        raise AdapterFileError(f"{path}: a {config.peft_type} adapter, not S2FT.")
    return adapter_from_peft(state_dict, config, _denoiser_name(components), str(path))


# What diffusers does not know of -------------------------------------------------------------------------------------


def _guard_unload_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """Unloading LoRAs strips every PEFT layer; S2FT layers are put back, the very same, with all their state."""

    @functools.wraps(original)
    def unload_lora_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = [(model, _s2ft_chains(model), _s2ft_configs(model)) for model in adaptable_components(self).values()]
        result = original(self, *args, **kwargs)
        for model, chains, configs in kept:
            for name, layers in chains.items():
                module = model.get_submodule(name)
                for layer in layers:
                    layer.base_layer = module
                    module = layer
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module)
            if chains:
                model.peft_config = configs
                model._hf_peft_config_loaded = True
        return result

    return unload_lora_weights


def _s2ft_chains(model: nn.Module) -> dict[str, list[S2FTLayer]]:
    """The S2FT layers around each linear layer, the innermost first, by the linear layer's name."""
    chains: dict[str, list[S2FTLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, S2FTLayer) and module.s2ft_delta:
            chains.setdefault(module_name(name), []).insert(0, module)
    return chains


def _s2ft_configs(model: nn.Module) -> dict[str, S2FTConfig]:
    return {n: c for n, c in getattr(model, "peft_config", {}).items() if c.peft_type == S2FTType.S2FT}


VERBS = (load_s2ft_weights, save_s2ft_weights, unload_s2ft_weights, fuse_s2ft, unfuse_s2ft)


def install() -> None:
    """Give every pipeline the verbs, and diffusers' own methods their guards; doing it twice changes nothing."""
    if getattr(DiffusionPipeline, "load_s2ft_weights", None) is load_s2ft_weights:
        return
    for verb in VERBS:
        setattr(DiffusionPipeline, verb.__name__, verb)
    LoraBaseMixin.unload_lora_weights = _guard_unload_lora(LoraBaseMixin.unload_lora_weights)


install()
