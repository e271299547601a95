"""A model's adapter as PEFT's own LoRA, exactly."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..tuner.layer import S2FTConv
from ..tuner.prior import s2ft_layers
from .lora import Lora, LoraLayer
from .lora_files import peft_config, state_dict
from .names import module_name


def to_lora(model: nn.Module, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """An adapter on grids as a LoRA: what PEFT's `get_peft_model` and `set_peft_model_state_dict` take.

    `model` is a `PeftModel`, or one that the adapter was put into in place. The factors are the layers' own
    (`S2FTLayer.lora_factors`), each of its own rank, with the adapter's scale at this moment; nothing is approximated,
    as by PEFT's `convert_to_lora`. What `modules_to_save` holds comes along. All tensors are copies.

    Raises ValueError for an adapter that is not there, and, naming the layer, for free positions, whose change is not
    of low rank, and for convolutions that PEFT's LoRA computes otherwise: dilated, or not padded with zeros.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    found = s2ft_layers(model, adapter_name)
    if not found:
        raise ValueError(f"There is no S2FT layer with an adapter named {adapter_name!r}.")
    layers: dict[str, LoraLayer] = {}
    for name, layer in found.items():
        try:
            up, down = layer.lora_factors(adapter_name)
        except TypeError as error:
            raise ValueError(f"{module_name(name)}: {error}") from None
        kernel: tuple[int, ...] = ()
        if isinstance(layer, S2FTConv):
            kernel = layer.kernel_size
            if any(step != 1 for step in layer.dilation) or layer.padding_mode != "zeros":
                raise ValueError(f"{module_name(name)}: PEFT's LoRA knows no dilation and pads with zeros alone.")
            # Its filters see all groups' channels, of which each reads its own group's.
            down = torch.block_diag(*[down] * layer.groups)
        layers[module_name(name)] = LoraLayer(up, down, kernel)
    config = model.peft_config[adapter_name]
    lora_config = LoraConfig(
        **{**peft_config(layers, config.base_model_name_or_path), "inference_mode": False},
        task_type=config.task_type,
        modules_to_save=config.modules_to_save,
    )
    tensors = state_dict(Lora({"": layers}), "peft")
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            saved = module.modules_to_save[adapter_name].state_dict()
            tensors |= {f"base_model.model.{name}.{key}": tensor for key, tensor in saved.items()}
    return lora_config, {name: tensor.detach().clone() for name, tensor in tensors.items()}
