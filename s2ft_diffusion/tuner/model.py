"""`S2FTModel`: the tuner that puts S2FT layers into a model, entered into PEFT's own registries."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import peft.mapping
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from torch import nn

from .config import S2FTConfig, S2FTType
from .layer import S2FTLayer, innermost, layer_type

logger = logging.getLogger(__name__)


class S2FTModel(BaseTuner):
    """Puts S2FT layers in place of a model's linear layers and convolutions.

    Made by `get_peft_model` or a model's `add_adapter`. Raises TypeError, naming the module, for a target that is
    neither, and ValueError for an `n_frequency` that a layer has no room for.
    """

    prefix: str = "s2ft_"
    tuner_layer_cls = S2FTLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            check_name(adapter_name)  # before PEFT enters the config into the model
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            # diffusers and transformers have set it before they try; their next `add_adapter` would trip over it.
            if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
                model._hf_peft_config_loaded = False
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_name(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        s2ft_config: S2FTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        pattern = s2ft_config.n_frequency_pattern
        # A name as it is comes first: another layer's may end like it.
        key = current_key if current_key in pattern else get_pattern_key(pattern.keys(), current_key)
        n_frequency = pattern.get(key, s2ft_config.n_frequency)
        if (layer := _s2ft_layer_in(target)) is not None:
            with torch.device("cpu"):
                layer.update_layer(adapter_name, n_frequency, s2ft_config, current_key)
            return
        if isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                f"S2FT cannot adapt {current_key!r}: nn.MultiheadAttention takes its weight without calling it, so an "
                "adapter there would do nothing. Name it in exclude_modules."
            )
        kind = layer_type(target)
        if kind is None:
            raise TypeError(
                f"S2FT cannot adapt {current_key!r}, a {type(innermost(target)).__name__}: it adapts linear layers and "
                "convolutions. Choose other target_modules, or name this one in exclude_modules."
            )
        with torch.device("cpu"):  # drawn alike, whatever `torch.set_default_device` says
            module = kind(target, adapter_name, n_frequency, s2ft_config, current_key)
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """With `adapter_names`, one a row of the batch ("__base__" for none), each row has its own adapter's change."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        # A wrapper holds a module of `modules_to_save` for each adapter: a classifier's head.
        wrappers = {m: m._get_available_adapters() for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper)}
        layers = {module: set(module.s2ft_delta) for module in self.modules() if isinstance(module, S2FTLayer)}
        known = set().union(*wrappers.values(), *layers.values())
        if unknown := sorted(set(names) - known - {"__base__"}):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        of_beams = [name for name in names for _ in range(beams if isinstance(beams, int) else 1)]

        def with_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            # A beam search has `beams` rows for each one of the batch, but not yet in an encoder.
            found = of_beams if len(args[0]) == len(of_beams) else names
            if module in wrappers:  # which knows no adapters but its own
                found = [name if name in wrappers[module] else "__base__" for name in found]
            return args, {**kwargs, "adapter_names": found}

        handles = [module.register_forward_pre_hook(with_names, with_kwargs=True) for module in (*wrappers, *layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """A new adapter that is the weighted sum of others, exactly: adapters with equal places and orders.

        Each one counts with its config's `scaling`; the weights that `set_scale` gave are ignored. The new one's
        `scaling` is 1, and it is not active. `combination_type` must be "linear".

        Raises ValueError for adapters whose coefficients sit elsewhere or in another order, whose sum is no S2FT
        adapter, and for those with `modules_to_save`. To use several as they are, make them active together with
        `model.base_model.set_adapter([...])`, which adds their changes; on grids a LoRA holds the sum.
        """
        if combination_type != "linear":
            raise ValueError(f'combination_type must be "linear", got {combination_type!r}.')
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"{len(weights)} weights for the adapters {list(adapters)}.")
        if unknown := sorted(set(adapters) - set(self.peft_config)):
            raise ValueError(f"There is no adapter named {unknown[0]!r}; the model has {sorted(self.peft_config)}.")
        check_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter named {adapter_name!r} already.")
        wrappers = [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]
        if found := sum(any(name in wrapper.modules_to_save for name in adapters) for wrapper in wrappers):
            raise ValueError(
                f"Cannot add weighted adapters if they target a module with modules_to_save, but found {found} such "
                "instance(s)."
            )
        layers = {name: module for name, module in self.named_modules() if isinstance(module, S2FTLayer)}
        sums: dict[str, dict[str, torch.Tensor]] = {}
        for name, layer in layers.items():
            states = [layer.s2ft_delta[a].state_dict() if a in layer.s2ft_delta else None for a in adapters]
            if all(state is None for state in states):
                continue
            first = states[0]
            for adapter, state in zip(adapters, states, strict=True):
                same = first is not None and state is not None and first.keys() == state.keys()
                if not same or any(not torch.equal(first[k], state[k]) for k in first if k != "coefficients"):
                    raise ValueError(
                        f"{adapters[0]!r} and {adapter!r} differ in more than their coefficients at {name}: their sum "
                        "is no S2FT adapter. Activate both (base_model.set_adapter([...])), or save them as one LoRA."
                    )
            total = sum(
                weight * self.peft_config[adapter].scaling * _at_least_float32(state["coefficients"])
                for adapter, weight, state in zip(adapters, weights, states, strict=True)
            )
            sums[name] = {**first, "coefficients": total}
        active = list(self.active_adapters)
        trained = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        self.peft_config[adapter_name] = replace(self.peft_config[adapters[0]], scaling=1.0)
        self.inject_adapter(self.model, adapter_name)
        for name, state in sums.items():
            layers[name].take_state(adapter_name, {key: value.clone() for key, value in state.items()})
        self.set_adapter(active)
        for parameter, flag in trained:  # PEFT trains whatever becomes active
            parameter.requires_grad_(flag)

    def _post_injection_hook(self, model: nn.Module, config: S2FTConfig, adapter_name: str) -> None:
        if config.sampling in ("power", "top") and not config.inference_mode:
            logger.info(
                "S2FT adapter %r starts without a prior: identity order, low-frequency positions. "
                "initialize_s2ft_weights estimates one.",
                adapter_name,
            )


def check_name(adapter_name: str) -> None:
    """Raise ValueError for a name that PyTorch's modules have no place for."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"An adapter's name must not be empty or contain a dot, got {adapter_name!r}.")
    if hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(f"{adapter_name!r} is a name that PyTorch's modules use themselves; choose another.")


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _s2ft_layer_in(module: nn.Module) -> S2FTLayer | None:
    """The S2FT layer that a module is, or that adapters of other kinds have been put around."""
    while isinstance(module, BaseTunerLayer):
        if isinstance(module, S2FTLayer):
            return module
        module = module.base_layer
    return None


def register() -> None:
    """Enter S2FT into PEFT's public mappings."""
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[S2FTType.S2FT] = S2FTConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[S2FTType.S2FT] = S2FTModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[S2FTType.S2FT] = S2FTModel.prefix


register()
