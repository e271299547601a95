"""The prior: a coarse weight change estimated before training (S2FT, Eq. 4), and what is derived from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from .config import S2FTConfig
from .estimate import (
    NotFiniteError,
    WeightChange,
    distributed,
    estimate_by_gradient,
    estimate_by_scaled_gradients,
    estimate_by_training,
    has_gradient,
)
from .layer import S2FTLayer, delta_shape
from .rearrange import EXACT_ROWS, Rearrangement, find_rearrangement
from .seeding import seeded

Estimate = Literal["gradient", "normalized", "scaled", "full"]

STEP_SIZE = 0.05  # docs/prior.md


def s2ft_layers(models: nn.Module | Sequence[nn.Module], adapter_name: str = "default") -> dict[str, S2FTLayer]:
    """The S2FT layers that carry an adapter, by name; with several models, names start with the model's number."""
    several = not isinstance(models, nn.Module)
    found = {}
    for number, model in enumerate(models if several else [models]):
        for name, module in model.named_modules():
            if isinstance(module, S2FTLayer) and adapter_name in module.s2ft_delta:
                found[f"{number}.{name}" if several else name] = module
    return found


def initialize_s2ft_weights(
    models: nn.Module | Sequence[nn.Module],
    loss: Callable[[Any], torch.Tensor],
    batches: Iterable[Any],
    *,
    estimate: Estimate = "gradient",
    adapter_name: str = "default",
    step_size: float = STEP_SIZE,
    gradient_accumulation_steps: int = 1,
    progress: bool = False,
) -> None:
    """Estimate the prior, and set an adapter's rearrangement and positions from it, in place.

    Args:
        models: one model with S2FT layers, or several that train together (a denoiser and a text encoder).
        loss: a batch to a scalar loss of the models, as in training.
        batches: the subset of Eq. 4; each one gradient. Use all instance images, several noise draws of each.
        estimate: see `estimate_prior`.
        adapter_name: whose order and positions are set; its coefficients become zero.
        step_size: of the steps of estimate="full".
        gradient_accumulation_steps: of the same.
        progress: show a bar over the layers while rearranging.

    In a process group every process passes its own batches; process 0 derives order and positions and sends them to the
    others. Raises ValueError for a loss or a gradient that is not finite (naming the layer) and where there is nothing
    to estimate; warns for layers without a gradient.
    """
    prior = estimate_prior(
        models,
        loss,
        batches,
        estimate=estimate,
        adapter_name=adapter_name,
        step_size=step_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    place_from_prior(models, prior, adapter_name=adapter_name, progress=progress)


def estimate_prior(
    models: nn.Module | Sequence[nn.Module],
    loss: Callable[[Any], torch.Tensor],
    batches: Iterable[Any],
    *,
    estimate: Estimate = "gradient",
    adapter_name: str = "default",
    step_size: float = STEP_SIZE,
    gradient_accumulation_steps: int = 1,
) -> Mapping[str, torch.Tensor]:
    """The estimated weight change (d, k), float32, of every layer that carries the adapter, in host memory.

    "gradient" is Eq. 4, -sum g. "normalized" is -sum g / sqrt(sum g^2) over the batches, nearer to what Adam does.
    "scaled" is the sum of -g, each batch's scaled to a root mean square of 1 for every layer.
    "full" is the change that training the adapted weights alone makes (after the paper's Table 6), by a step of
    Adafactor without momentum (Shazeer and Stern, 2018) for every `gradient_accumulation_steps` batches. Every layer's
    gradient is scaled to one size, so that no timestep drowns the others, and so is its step: the rate alone says how
    far a weight goes. The rate grows from step to step, since the first ones follow noise; its mean is `step_size`
    times the weight's root mean square over sqrt(k). So a step changes what a layer does by about the same share
    whatever its width (after Yang et al. 2023, "A Spectral Condition for Feature Learning").

    Memory on the device, beyond that of the passes themselves: one layer's gradient. In host memory, for all layers:
    float32 matrices of the weights' sizes, one for "gradient", two for "normalized"; for "scaled" and "full" one copy
    of the weights in the dtype that they compute in, from which the mapping that is returned makes float32 matrices
    when asked. "full" trains the weights in place (LOMO's way: Lv et al., 2023), and brings them back bit for bit, also
    after an exception or an interrupt.

    A weight without a gradient (quantised, offloaded, or stored in 8 bits) has one estimated from the layer's inputs
    and the gradients of its outputs; "full" then becomes "scaled" for all layers, with a warning. Layers that have no
    gradient in any batch are named in a warning, their matrices are zero. Other adapters are off while estimating. In a
    process group gradients are summed, or for "full" averaged in every step, and all processes return the same. Layers
    that share a weight have one prior. Raises ValueError for a loss or a gradient that is not finite, and where there
    are no batches.
    """
    if estimate not in get_args(Estimate):
        raise ValueError(f"estimate must be one of {get_args(Estimate)}, got {estimate!r}.")
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps must be at least 1, got {gradient_accumulation_steps}.")
    layers = s2ft_layers(models, adapter_name)
    if not layers:
        raise ValueError(f"There is no S2FT layer with an adapter named {adapter_name!r}.")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} has a fused adapter; unfuse it before estimating a prior.")
    quantised = [name for name, layer in layers.items() if not has_gradient(layer)]
    if estimate == "full" and quantised:
        kind = type(layers[quantised[0]].get_base_layer().weight).__name__
        warnings.warn(
            f'estimate="full" trains weights, and {quantised[0]} has one that cannot be trained ({kind}): '
            'the estimate is "scaled" instead.',
            stacklevel=2,
        )
        estimate = "scaled"
    first = {id(layer.get_base_layer().weight): name for name, layer in reversed(layers.items())}
    owners = {name: first[id(layer.get_base_layer().weight)] for name, layer in layers.items()}  # tied weights are one
    once = {name: layer for name, layer in layers.items() if owners[name] == name}
    with _only_base_weights_train(models, layers):
        if estimate == "full":
            found = estimate_by_training(
                once, loss, batches, step_size=step_size, accumulation=gradient_accumulation_steps
            )
        elif estimate == "scaled":
            found = estimate_by_scaled_gradients(once, loss, batches)
        else:
            found = estimate_by_gradient(once, loss, batches, normalized=estimate == "normalized")
    prior = WeightChange(found, owners)
    unreached = []
    for name, matrix in prior.items():
        if not torch.isfinite(matrix).all():
            raise NotFiniteError(f"The estimated weight change of {name} has NaN or infinite entries.")
        if not matrix.any():
            unreached.append(name)
    if unreached and is_main_process():
        warnings.warn(
            f"{len(unreached)} of {len(layers)} layers have no gradient, so no prior, and get low frequencies: "
            f"{', '.join(unreached)}.",
            stacklevel=2,
        )
    return prior


def place_from_prior(
    models: nn.Module | Sequence[nn.Module],
    prior: Mapping[str, torch.Tensor],
    *,
    adapter_name: str = "default",
    progress: bool = False,
) -> None:
    """Rearrange and sample every layer from its prior (Alg. 1, Eq. 7); process 0 does, the others receive.

    Two layers at a time, and so two of their matrices: much of a search keeps one core busy. A prior of zeros gives
    the identity and low frequencies.

    Raises ValueError, before anything changes, for an adapter that no layer has, and for a prior that lacks a layer,
    or whose matrix of one (all are named by layer) is of another shape than the weight change (d, k) or not finite.
    """
    layers = s2ft_layers(models, adapter_name)
    if not layers:
        raise ValueError(f"There is no S2FT layer with an adapter named {adapter_name!r}.")
    if is_main_process():  # the others' are not used
        _check_prior(prior, layers)

    def derive(name: str) -> tuple[dict[str, torch.Tensor], Rearrangement]:
        return _derive(name, prior[name], layers[name], adapter_name)

    main = is_main_process()
    # Closing what is left of the map, after an error or an interrupt, cancels what was not begun.
    with ThreadPoolExecutor(2) as pool, closing(pool.map(derive, layers if main else ())) as derived:
        for layer in tqdm(layers.values(), desc="rearrange", disable=not progress or not main):
            delta = layer.s2ft_delta[adapter_name]
            if main:
                delta.place(*next(derived))
            if distributed():
                state = dict(delta.named_buffers())  # bytes, which every process group knows
                for name in sorted(state):
                    dist.broadcast(state[name], src=0)
                delta.placed()
            layer.prepare()


def _check_prior(prior: Mapping[str, torch.Tensor], layers: Mapping[str, S2FTLayer]) -> None:
    for name, layer in layers.items():
        if name not in prior:
            raise ValueError(f"The prior has no layer named {name!r}; it has {', '.join(prior) or 'none at all'}.")
        matrix, wanted = prior[name], delta_shape(layer.get_base_layer())
        if tuple(matrix.shape) != wanted:
            raise ValueError(f"The prior of {name} has shape {tuple(matrix.shape)} and should have {wanted}.")
        if not torch.isfinite(matrix).all():
            raise NotFiniteError(f"The prior of {name} has NaN or infinite entries.")


def rearrangement_for(
    prior: torch.Tensor, config: S2FTConfig, generator: torch.Generator, *, columns: bool = True
) -> Rearrangement:
    """The rearrangement of a prior (d, k) by a config's `rearrange`, `distance`, `signs` and `refine` (Alg. 1)."""
    if config.rearrange == "none":
        return Rearrangement.identity(*prior.shape)
    return find_rearrangement(
        prior,
        distance=config.distance,
        signs=config.signs,
        refine=config.refine,
        columns=columns,
        generator=generator,
    )


def _derive(
    name: str, prior: torch.Tensor, layer: S2FTLayer, adapter_name: str
) -> tuple[dict[str, torch.Tensor], Rearrangement]:
    config = layer.s2ft_config[adapter_name]
    generator = seeded(config.seed, name)  # a layer's draws do not depend on which others are adapted
    if not (reached := bool(prior.any())):
        config = replace(config, rearrange="none")
    device = layer.get_base_layer().weight.device if max(prior.shape) > EXACT_ROWS else prior.device
    rearrangement = rearrangement_for(prior.to(device), config, generator, columns=layer.rearranges_columns)
    latent = rearrangement.invert(prior.cpu()) if reached else None
    return layer.s2ft_delta[adapter_name].choose(config, latent, generator, name), rearrangement


@contextmanager
def _only_base_weights_train(models: nn.Module | Sequence[nn.Module], layers: dict[str, S2FTLayer]) -> Iterator[None]:
    """Adapters off, gradients for the adapted base weights alone; everything as it was afterwards."""
    models = [models] if isinstance(models, nn.Module) else list(models)
    parameters = [p for model in models for p in model.parameters()]
    before = [(p.requires_grad, p.grad) for p in parameters]
    adapters = [module for model in models for module in model.modules() if isinstance(module, S2FTLayer)]
    disabled = [module._disable_adapters for module in adapters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for module in adapters:
            module._disable_adapters = True
        for layer in layers.values():
            if has_gradient(layer):
                layer.get_base_layer().weight.requires_grad_(True)
        yield
    finally:
        for parameter, (flag, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, flag in zip(adapters, disabled, strict=True):
            module._disable_adapters = flag


def is_main_process() -> bool:
    return not distributed() or dist.get_rank() == 0
