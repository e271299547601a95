"""The prior: a coarse weight change estimated before training (S2FT, Eq. 4), and what is derived from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from .config import S2FTConfig
from .layer import S2FTLayer
from .rearrange import Rearrangement, find_rearrangement
from .seeding import seeded

Estimate = Literal["gradient", "normalized", "full"]


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
    step_size: float = 0.2,
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
        progress: show a bar over the layers while rearranging.

    In a process group every process passes its own batches; the priors are summed, process 0 derives order and
    positions and sends them to the others. Raises ValueError for a loss or a gradient that is not finite (naming the
    layer) and where there is nothing to estimate; warns for a prior with too few nonzero frequencies.
    """
    prior = estimate_prior(models, loss, batches, estimate=estimate, adapter_name=adapter_name, step_size=step_size)
    place_from_prior(models, prior, adapter_name=adapter_name, progress=progress)


def estimate_prior(
    models: nn.Module | Sequence[nn.Module],
    loss: Callable[[Any], torch.Tensor],
    batches: Iterable[Any],
    *,
    estimate: Estimate = "gradient",
    adapter_name: str = "default",
    step_size: float = 0.2,
) -> dict[str, torch.Tensor]:
    """The estimated weight change (d, k), float32, of every layer that carries the adapter.

    "gradient" is Eq. 4, -sum g. "normalized" is -sum g / sqrt(sum g^2) over the batches, nearer to what Adam does.
    "full" is the change that one AdamW step a batch makes, of the adapted weights alone (after the paper's Table 6),
    with the gradients of all processes added. Every step's gradients are scaled to one norm over all layers, so that
    no timestep drowns the others; the rate grows from step to step, since Adam's first ones follow noise. A layer's
    mean rate is `step_size` times its weight's root mean square over sqrt(k): then a step changes what a
    layer does by about the same share whatever its width (after Yang et al. 2023, "A Spectral Condition for Feature
    Learning").

    Memory beyond the model, for every adapted layer: one dense float32 matrix for "gradient", two for "normalized",
    Adam's three (the change and two moments), the gradient and a copy of the weight for "full". All weights are as
    before afterwards. Other adapters are off while estimating.
    """
    if estimate not in ("gradient", "normalized", "full"):
        raise ValueError(f'estimate must be "gradient", "normalized" or "full", got {estimate!r}.')
    layers = s2ft_layers(models, adapter_name)
    if not layers:
        raise ValueError(f"There is no S2FT layer with an adapter named {adapter_name!r}.")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} has a fused adapter; unfuse it before estimating a prior.")
        if not layer.get_base_layer().weight.dtype.is_floating_point:
            raise ValueError(f"{name} has a quantised weight, which has no gradient to estimate a prior from.")
    with _only_base_weights_train(models, layers):
        if estimate == "full":
            prior = _estimate_by_training(layers, loss, batches, step_size)
        else:
            prior = _estimate_by_gradient(layers, loss, batches, normalized=estimate == "normalized")
    for name, matrix in prior.items():
        if not torch.isfinite(matrix).all():
            raise ValueError(f"The estimated weight change of {name} has NaN or infinite entries.")
    return prior


def place_from_prior(
    models: nn.Module | Sequence[nn.Module],
    prior: dict[str, torch.Tensor],
    *,
    adapter_name: str = "default",
    progress: bool = False,
) -> None:
    """Rearrange and sample every layer from its prior (Alg. 1, Eq. 7); process 0 does, the others receive."""
    layers = s2ft_layers(models, adapter_name)
    for name, layer in tqdm(layers.items(), desc="rearrange", disable=not progress or not _is_main_process()):
        delta = layer.s2ft_delta[adapter_name]
        if _is_main_process():
            delta.place(*_derive(name, prior[name], layer, adapter_name))
        if _distributed():
            state = dict(delta.named_buffers())  # bytes, which every process group knows
            for name in sorted(state):
                dist.broadcast(state[name], src=0)
            delta.placed()
        layer.prepare()


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
    rearrangement = rearrangement_for(prior, config, generator, columns=layer.rearranges_columns)
    latent = rearrangement.invert(prior.cpu())
    return layer.s2ft_delta[adapter_name].choose(config, latent, generator, name), rearrangement


@contextmanager
def _only_base_weights_train(models: nn.Module | Sequence[nn.Module], layers: dict[str, S2FTLayer]) -> Iterator[None]:
    """Adapters off, gradients for the adapted base weights alone; everything as it was afterwards."""
    models = [models] if isinstance(models, nn.Module) else list(models)
    parameters = [p for model in models for p in model.parameters()]
    before = [p.requires_grad for p in parameters]
    adapters = [module for model in models for module in model.modules() if isinstance(module, S2FTLayer)]
    disabled = [module._disable_adapters for module in adapters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for module in adapters:
            module._disable_adapters = True
        for layer in layers.values():
            layer.get_base_layer().weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
        for module, flag in zip(adapters, disabled, strict=True):
            module._disable_adapters = flag
        for layer in layers.values():
            layer.get_base_layer().weight.grad = None


def _backward(loss: Callable[[Any], torch.Tensor], batch: Any) -> None:
    value = loss(batch)
    if not torch.isfinite(value):
        raise ValueError(
            f"The loss is {float(value)} while estimating the weight change; check the data and precision."
        )
    value.backward()


def _estimate_by_gradient(
    layers: dict[str, S2FTLayer], loss: Callable[[Any], torch.Tensor], batches: Iterable[Any], *, normalized: bool
) -> dict[str, torch.Tensor]:
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    squares = {name: torch.zeros_like(matrix) for name, matrix in total.items()} if normalized else {}

    def collect(name: str) -> Callable[[torch.Tensor], None]:
        def hook(weight: torch.Tensor) -> None:  # at once, so that one layer's gradient is alive at a time
            gradient = weight.grad.float()
            weight.grad = None
            total[name].sub_(gradient)
            if normalized:
                squares[name].addcmul_(gradient, gradient)

        return hook

    hooks = [weight.register_post_accumulate_grad_hook(collect(name)) for name, weight in weights.items()]
    try:
        for batch in batches:
            _backward(loss, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for matrix in (*total.values(), *squares.values()):
        _sum_over_processes(matrix)
    for name, square in squares.items():
        total[name] = torch.where(square > 0, total[name] / square.sqrt(), 0.0)
    return {name: matrix.flatten(1) for name, matrix in total.items()}


def _estimate_by_training(
    layers: dict[str, S2FTLayer], loss: Callable[[Any], torch.Tensor], batches: Iterable[Any], step_size: float
) -> dict[str, torch.Tensor]:
    try:
        steps = len(batches)
    except TypeError:  # an iterator, or a DataLoader over one
        batches = list(batches)
        steps = len(batches)
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    change = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    fused = all(matrix.device.type in ("cpu", "cuda") for matrix in change.values())
    rates = {name: step_size * _typical_size(weight) / weight[0].numel() ** 0.5 for name, weight in weights.items()}
    groups = [{"params": [matrix], "lr": rates[name]} for name, matrix in change.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=fused)
    growing = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 2 * (step + 1) / (steps + 1))
    try:
        for batch in batches:
            _backward(loss, batch)
            for name, weight in weights.items():
                change[name].grad = torch.zeros_like(change[name]) if weight.grad is None else weight.grad.float()
                weight.grad = None
                _sum_over_processes(change[name].grad)
            norm = nn.utils.get_total_norm([matrix.grad for matrix in change.values()])
            norm = torch.where(norm == 0, 1.0, norm)
            for matrix in change.values():
                matrix.grad.div_(norm.to(matrix.device))
            optimizer.step()
            growing.step()
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(start[name] + change[name])  # in float32, whatever the weight's type
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(start[name])
    return {name: matrix.flatten(1) for name, matrix in change.items()}


def _typical_size(weight: torch.Tensor) -> float:
    """The root mean square; of a weight of zeros, what one that keeps its inputs' size would have."""
    return float(weight.detach().float().square().mean().sqrt()) or weight[0].numel() ** -0.5


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_main_process() -> bool:
    return not _distributed() or dist.get_rank() == 0


def _sum_over_processes(matrix: torch.Tensor) -> None:
    if _distributed():
        dist.all_reduce(matrix)
