"""Adapters into models and out of them: what fits where, attaching, swapping in place, detaching."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..adapters.file import COMPONENTS, Adapter, AdapterFileError, AdapterInfo
from ..adapters.names import canonical_name, module_name, name_in
from ..tuner.config import S2FTConfig, S2FTType
from ..tuner.layer import S2FTLayer, delta_shape, innermost, layer_type
from .targets import has_fused_projections


def adaptable_components(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The models of a pipeline that an adapter may belong to, by component name: what compiling and PEFT wrap."""
    found = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    return {name: _innermost_model(model) for name, model in found.items() if isinstance(model, nn.Module)}


def _innermost_model(model: nn.Module) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_unwrapped(pipeline: DiffusionPipeline) -> None:
    """Raise ValueError for a model inside a PeftModel, which diffusers' verbs do not reach into."""
    for name in COMPONENTS:
        model = getattr(pipeline, name, None)
        if isinstance(getattr(model, "_orig_mod", model), PeftModel):
            raise ValueError(
                f"The pipeline's {name} is wrapped in a {type(model).__name__}. Take the model out first: "
                f"pipe.{name} = pipe.{name}.unload(), or .merge_and_unload() to keep what it has learned."
            )


def s2ft_layers(pipeline: DiffusionPipeline) -> list[S2FTLayer]:
    """The S2FT layers of all of a pipeline's models."""
    models = adaptable_components(pipeline).values()
    return [module for model in models for module in model.modules() if isinstance(module, S2FTLayer)]


def s2ft_adapters(pipeline: DiffusionPipeline) -> list[str]:
    """Names of the pipeline's S2FT adapters, in the order of loading."""
    names = [name for model in adaptable_components(pipeline).values() for name in s2ft_configs(model)]
    names += [
        name for layer in s2ft_layers(pipeline) for name in layer.s2ft_delta
    ]  # a PeftModel has its configs itself
    return list(dict.fromkeys(names))


def denoiser_name(components: Mapping[str, nn.Module]) -> str:
    """Which of a pipeline's models is its denoiser."""
    return next(name for name in (*components, "unet") if name in ("unet", "transformer"))


def check_fits(adapter: Adapter, components: Mapping[str, nn.Module], label: str) -> None:
    """Raise AdapterFileError unless every layer of the adapter has its layer of equal shape in the models."""
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
        for canonical, (d, k) in layers.items():
            name = name_in(model, canonical)
            found = _adaptable_shape(model, name)
            where = f"{component}.{name}"
            if found is not None and in_fused_attention(model, name):
                raise AdapterFileError(f"{label}: {where} has fused projections; call unfuse_qkv_projections() first.")
            if found is None:
                raise AdapterFileError(
                    f"{label}: the adapter was trained on {trained_on} with a {d}x{k} layer at {where}, "
                    "this model has no linear layer or convolution there."
                )
            if found != (d, k):
                raise AdapterFileError(
                    f"{label}: the adapter was trained on {trained_on} with {d}x{k} at {where}, "
                    f"this model has {found[0]}x{found[1]}."
                )


def _adaptable_shape(model: nn.Module, name: str) -> tuple[int, int] | None:
    """The (d, k) of the weight change that a layer can have; None where there is no such layer."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    if layer_type(module) is None:
        return None
    return delta_shape(innermost(module))


def in_fused_attention(model: nn.Module, name: str) -> bool:
    """Whether a projection has been copied into a fused one, so that adapting it would do nothing."""
    parts = name.split(".")
    return any(has_fused_projections(model.get_submodule(".".join(parts[:end]))) for end in range(1, len(parts)))


def attach_adapter(components: Mapping[str, nn.Module], adapter: Adapter, adapter_name: str) -> None:
    """Put a checked adapter into the models; on any failure they are left as they were."""
    attached = []
    present = [m for c in adapter.layers for m in components[c].modules() if isinstance(m, S2FTLayer)]
    active = [(layer, list(layer.active_adapters)) for layer in present]
    trainable = [(parameter, parameter.requires_grad) for layer in present for parameter in layer.parameters()]
    try:
        for component, layers in adapter.layers.items():
            model = components[component]
            attached.append(model)
            # An expression, which PEFT matches whole: of a name it takes every layer that ends like it.
            names = {name_in(model, name): layer for name, layer in layers.items()}
            config = replace(
                adapter.configs[component], target_modules="|".join(map(re.escape, names)), inference_mode=True,
                layers_to_transform=None, layers_pattern=None,
            )  # fmt: skip
            config.n_frequency, config.n_frequency_pattern = 2, {}  # their places are taken at once
            with left_alone(present), warnings.catch_warnings():  # PEFT would unfuse what is fused
                warnings.filterwarnings("ignore", "Adapter cannot be set when the model is merged")
                inject_adapter_in_model(config, model, adapter_name)
            put_innermost(model)
            placed = model.peft_config[adapter_name]
            placed.target_modules = set(names)
            placed.n_frequency = adapter.configs[component].n_frequency
            placed.n_frequency_pattern = adapter.configs[component].n_frequency_pattern
            model._hf_peft_config_loaded = True
            placed.adapter_info = adapter.info
            for name, layer in _named_layers(component, model, adapter_name).items():
                layer.take_state(adapter_name, layers[name].state())
                layer.s2ft_delta[adapter_name].loaded = True
    except BaseException:
        for model in attached:
            detach_adapters(model, adapter_name)
        for layer, names in active:
            layer.set_adapter(names, inference_mode=True)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def put_innermost(model: nn.Module) -> None:
    """Have S2FT layers within those of other tuners, next to what they adapt: diffusers knows a LoRA by its names."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, S2FTLayer)]
    for name, layer in reversed(layers):
        if isinstance(layer.base_layer, BaseTunerLayer):
            _replace(model, name, layer.base_layer)
            _put_within(layer.base_layer, layer)


def _put_within(outer: BaseTunerLayer, layer: S2FTLayer) -> None:
    while isinstance(outer.base_layer, BaseTunerLayer):
        outer = outer.base_layer
    layer.base_layer, outer.base_layer = outer.base_layer, layer


@contextmanager
def set_aside(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, models have no S2FT layers; after it they are back, innermost.

    For loading LoRAs, since diffusers looks for weights by the names that they have under its own layers alone, and for
    unloading them, which strips every PEFT layer.
    """
    taken = []
    for model in models:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, S2FTLayer)]
        for name, layer in reversed(layers):  # inside first: names outside stay true
            _replace(model, name, layer.base_layer)
            taken.append((model, module_name(name), layer))
    try:
        yield
    finally:
        for model, name, layer in taken:
            place = model.get_submodule(name)
            if isinstance(place, BaseTunerLayer):
                _put_within(place, layer)
            else:
                layer.base_layer = place
                _replace(model, name, layer)
        for model in dict.fromkeys(model for model, _, _ in taken):
            _maybe_remove_and_reapply_group_offloading(model)


@contextmanager
def left_alone(layers: Iterable[S2FTLayer]) -> Iterator[None]:
    """Within the block, whoever walks over all PEFT layers neither fuses, unfuses nor scales these."""

    def nothing(*args: Any, adapter_names: Any = None, **kwargs: Any) -> None:
        pass

    names = ("merge", "unmerge", "scale_layer")
    layers = [layer for layer in layers if "merge" not in vars(layer)]  # not yet, that is
    for layer in layers:
        vars(layer).update(dict.fromkeys(names, nothing))
    try:
        yield
    finally:
        for layer in layers:
            for name in names:
                del vars(layer)[name]


def activate(models: Iterable[nn.Module], adapter_name: str) -> None:
    """Make an adapter the only active one, S2FT or LoRA, and switch adapters on."""
    for layer in _peft_layers(models):
        layer.enable_adapters(enabled=True)
        layer.set_adapter([adapter_name], inference_mode=True)


@contextmanager
def active_kept(models: Iterable[nn.Module]) -> Iterator[None]:
    """Adapters that are removed within the block are active nowhere after it, and others are as before: a LoRA's
    layers and S2FT's know nothing of each other.

    Where no active one is left, PEFT makes each layer's first one active: here the first by name is on all layers. What
    is trained and what is switched off stay so. Models without S2FT layers are left alone.
    """
    models = list(models)
    if not any(isinstance(layer, S2FTLayer) for layer in _peft_layers(models)):
        yield
        return
    active, present = [active_names(model) for model in models], _adapter_names(models)
    trained = {parameter for model in models for parameter in model.parameters() if parameter.requires_grad}
    yield
    left = _adapter_names(models)
    kept = [[name for name in names if name not in present - left] for names in active]
    for model, names in zip(models, kept, strict=True):
        for layer in _peft_layers([model]):
            layer.set_adapter(names if any(kept) else sorted(left)[:1], inference_mode=True)
            for parameter in trained.intersection(layer.parameters()):
                parameter.requires_grad_(True)


def _adapter_names(models: Iterable[nn.Module]) -> set[str]:
    return {name for model in models for name in getattr(model, "peft_config", {})}


def active_names(model: nn.Module) -> list[str]:
    """What a model's layers say is active: also names of adapters that other models of a pipeline have."""
    return next((list(layer.active_adapters) for layer in _peft_layers([model])), [])


def _peft_layers(models: Iterable[nn.Module]) -> Iterator[BaseTunerLayer]:
    return (module for model in models for module in model.modules() if isinstance(module, BaseTunerLayer))


def inject_adapter(model: nn.Module, config: S2FTConfig, adapter_name: str) -> None:
    """Put a fresh adapter into a model, whether or not it has diffusers' or transformers' own `add_adapter`."""
    inject_adapter_in_model(config, model, adapter_name)
    model._hf_peft_config_loaded = True


def check_swap(adapter: Adapter, components: Mapping[str, nn.Module], adapter_name: str | None, label: str) -> None:
    """Raise ValueError unless the adapter can take the place of `adapter_name`."""
    present = {c: _named_layers(c, model, adapter_name) for c, model in components.items()}
    present = {component: layers for component, layers in present.items() if layers}
    if not present:
        raise ValueError(f"hotswap needs the name of a loaded S2FT adapter to replace, got {adapter_name!r}.")
    for component in present:
        if components[component].peft_config[adapter_name].scaling == 0:
            raise ValueError(f"{label}: cannot be swapped in: the place's scaling is 0, so nothing in it would count.")
    for component in sorted(present.keys() | adapter.layers.keys()):
        old, new = present.get(component, {}), adapter.layers.get(component, {})
        old_config = components[component].peft_config.get(adapter_name)
        if different := sorted(old.keys() ^ new.keys()):
            where = f"{component}.{different[0]}"
            raise ValueError(f"{label}: cannot be swapped in: only one of the two adapters has {where}.")
        for name, layer in new.items():
            place = old[name].s2ft_delta[adapter_name]
            found, wanted = (
                _sizes(layer.state(), adapter.configs[component]),
                _sizes(dict(place.state_dict()), old_config),
            )
            if found != wanted:
                raise ValueError(
                    f"{label}: cannot be swapped in: {component}.{name} has {_described(found)}, the place "
                    f"{_described(wanted)}."
                )
            factor = adapter.configs[component].scaling / components[component].peft_config[adapter_name].scaling
            if not torch.isfinite((layer.coefficients.float() * factor).to(place.coefficients.dtype)).all():
                raise ValueError(
                    f"{label}: cannot be swapped in: the coefficients of {component}.{name}, times {factor:g} because "
                    f"of the place's scaling, are not finite in {place.coefficients.dtype}."
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
        config.adapter_info = adapter.info
        model.peft_config[adapter_name] = config
        for module in model.modules():
            if isinstance(module, S2FTLayer) and adapter_name in module.s2ft_delta:
                module.s2ft_config[adapter_name] = config
        for name, layer in _named_layers(component, model, adapter_name).items():
            state = layers[name].state()
            state["coefficients"] = state["coefficients"].float() * factor
            layer.s2ft_delta[adapter_name].load_state_dict(state)
            layer.prepare()


def _sizes(state: Mapping[str, torch.Tensor], config: S2FTConfig) -> dict[str, tuple[int, ...] | str]:
    """What must be equal of two adapters for one to take the place of the other: shapes, and the norm."""
    return {**{name: tuple(tensor.shape) for name, tensor in state.items()}, "norm": config.norm}


def _described(sizes: Mapping[str, tuple[int, ...] | str]) -> str:
    where = "on a grid" if "row_functions" in sizes else "at free positions"
    return f"coefficients {sizes['coefficients']} {where} with norm {sizes['norm']!r}"


def _named_layers(component: str, model: nn.Module, adapter_name: str | None) -> dict[str, S2FTLayer]:
    """The layers of a model that have an adapter, by the names that they have in a file."""
    return {
        canonical_name(component, name): module
        for name, module in model.named_modules()
        if isinstance(module, S2FTLayer) and adapter_name in module.s2ft_delta
    }


def detach_adapters(model: nn.Module, adapter_name: str | None = None) -> None:
    """Remove one S2FT adapter, or all, from a model; layers that are left without one make way for what they wrap.

    With all of them, what is fused stays in the weights.
    """
    configs = getattr(model, "peft_config", {})
    gone = [name for name in s2ft_configs(model) if adapter_name in (None, name)]
    for name, module in reversed(list(model.named_modules())):  # inside first: names outside stay true
        inside = None
        if isinstance(module, S2FTLayer):
            if adapter_name in module.s2ft_delta:
                module.delete_adapter(adapter_name)
            if adapter_name is None or not module.s2ft_delta:
                inside = module.base_layer
        elif isinstance(module, ModulesToSaveWrapper) and not set(gone).isdisjoint(module.modules_to_save):
            for adapter in set(gone) & set(module.modules_to_save):
                module.modules_to_save.pop(adapter)
            inside = None if module.modules_to_save else module.original_module
        if inside is not None:
            _replace(model, name, inside)
    for name in gone:
        del configs[name]
    _forget_empty_config(model)


def drop_empty_layers(model: nn.Module, of: type[BaseTunerLayer] = S2FTLayer) -> bool:
    """Put what layers of a kind wrap in their place where they have no adapters; returns whether there were any."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, of)]
    empty = [(n, m) for n, m in layers if not any(len(getattr(m, adapters)) for adapters in m.adapter_layer_names)]
    for name, layer in reversed(empty):  # inside first: names outside stay true
        _replace(model, name, layer.base_layer)
    if empty:
        _forget_empty_config(model)
    return bool(empty)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _forget_empty_config(model: nn.Module) -> None:
    if hasattr(model, "peft_config") and not model.peft_config:
        del model.peft_config
        model._hf_peft_config_loaded = False


def adapter_info(model: nn.Module, adapter_name: str) -> AdapterInfo | None:
    """What is known of a loaded adapter beside its numbers; it goes when the adapter's config goes."""
    return getattr(s2ft_configs(model).get(adapter_name), "adapter_info", None)


def s2ft_configs(model: nn.Module) -> dict[str, S2FTConfig]:
    """A model's S2FT adapters, by name."""
    return {n: c for n, c in getattr(model, "peft_config", {}).items() if c.peft_type == S2FTType.S2FT}
