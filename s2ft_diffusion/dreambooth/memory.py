"""How much memory a run is going to need, from the configs of its base alone: no weight is loaded, nothing computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.training_utils import cast_training_params
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..families import Configs, Family
from ..families.blank import (
    AllocationTracker,
    GPUPasses,
    blank_family,
    fill_blank,
    pack_blank,
    weight_bytes,
)
from ..families.offloading import transformer_blocks
from ..families.sharding import shared_blocks
from ..pipelines.attach import inject_adapter
from ..tuner.estimate import watch_layer
from ..tuner.layer import S2FTLayer, compute_dtype
from .base import BasePlan, empty_model, vae_dtype
from .checkpoints import ADAPTER
from .settings import ComputeSettings, Settings

# Scratch space of cuBLAS and cuDNN, which PyTorch allocates once.
LIBRARIES = 64 * 2**20
# A process with PyTorch, diffusers and CUDA's libraries, in host memory.
PROCESS = 3 * 2**30


@dataclass(frozen=True)
class RunMemory:
    """Bytes that a run needs on the device in each of its phases, and in host memory."""

    phases: Mapping[str, int]
    host: int

    @property
    def device(self) -> int:
        return max(self.phases.values())

    def __str__(self) -> str:
        most = max(self.phases, key=lambda phase: self.phases[phase])
        return f"about {self.device / 1e9:.1f} GB on the device (for {most}), {self.host / 1e9:.1f} GB of host memory"


def run_memory(plan: BasePlan, settings: Settings, dtype: torch.dtype) -> RunMemory:
    """What a run on a GPU is going to need, its frozen weights in `dtype`.

    Models that only encode are on the device one after the other, and away while it trains.
    """
    family, compute = plan.family, settings.compute

    def blank(component: str) -> nn.Module:
        with init_empty_weights():
            return empty_model(family, component, plan.index, plan.base_configs, plan.location, plan.revision)

    encoders = 0
    for name in family.text_encoders:
        if (plan.index.get(name) or [None])[0] is not None and name not in plan.configs:
            encoder = _in_dtype(blank(name), dtype)
            if compute.quantize:
                pack_blank(encoder, compute.quantize, dtype)
            encoders += weight_bytes(encoder)
    autoencoder = _in_dtype(blank("vae"), vae_dtype(dtype))
    vae = weight_bytes(autoencoder)
    encoding, decoding = _autoencoder_passes(family, plan.base_configs, autoencoder, plan.resolution, vae_dtype(dtype))
    step = step_memory(
        family,
        plan.base_configs,
        {name: blank(name) for name in plan.configs},
        lambda name, model: inject_adapter(model, plan.configs[name], ADAPTER),
        plan.latent_shape,
        settings.length.batch * (2 if settings.classes else 1),
        dtype,
        compute,
    )
    stays = 0 if settings.photos.center_crop else vae  # crops that change are encoded anew
    phases = {
        "the photos": vae + encoding + LIBRARIES,
        "the words": encoders + LIBRARIES,
        "training": step.device + stays,
    }
    sampled = settings.validation is not None or settings.classes is not None
    if sampled:
        phases["sample images"] = step.weights + step.trained + encoders + vae + decoding + LIBRARIES
    return RunMemory(phases, PROCESS + step.host + (encoders + vae if settings.validation else 0))


def check_memory(needed: RunMemory, device: torch.device, settings: Settings) -> None:
    """Raise InputError, with what helps, where a GPU has less free memory than is needed."""
    free = torch.cuda.mem_get_info(device)[0]
    if needed.device <= free:
        return
    compute = settings.compute
    alone = torch.cuda.device_count() < 2
    advice = [
        flag
        for flag, given in (
            ("--gradient_checkpointing", compute.gradient_checkpointing),
            ("--quantize nf4", compute.quantize is not None or compute.offload or compute.shard > 1),
            ("--offload", compute.offload or compute.quantize in ("nf4", "int8") or compute.shard > 1),
            ("--shard, with a process for each GPU", alone or compute.shard > 1 or compute.quantize or compute.offload),
            ("more GPUs", compute.shard == 1),
            ("--train_batch_size 1", settings.length.batch == 1),
            ("a smaller --resolution", False),
        )
        if not given
    ]
    raise InputError(
        f"The run needs {needed}, and {free / 1e9:.1f} GB of the device are free. Try {', '.join(advice)}; with "
        "--skip_memory_check it begins all the same."
    )


def _autoencoder_passes(
    family: type[Family], configs: Configs, autoencoder: nn.Module, side: int, dtype: torch.dtype
) -> tuple[int, int]:
    """At most within encoding an image, and within decoding it."""
    base = blank_family(family, configs, {"vae": autoencoder})
    encoded, encode = [], autoencoder.encode
    autoencoder.encode = lambda pixels: encoded.append(encode(pixels)) or encoded[-1]
    with FakeTensorMode(allow_non_fake_inputs=True), GPUPasses(None), torch.no_grad():
        fill_blank(autoencoder)
        with AllocationTracker() as encoding:
            base.moments(torch.zeros(1, 3, side, side))
        (found,) = encoded
        latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent
        with AllocationTracker() as decoding:
            autoencoder.decode(latents.to(dtype))
    return encoding.peak, decoding.peak


@dataclass(frozen=True)
class StepMemory:
    """Bytes that training needs on the device, and in host memory beside the process.

    `weights` of the frozen base, `trained` numbers with their optimizer state, `passes` at most (activations,
    gradients, scratch), `prior` at most the passes of the estimate; `host` has what is offloaded, and the prior.
    """

    weights: int
    trained: int
    passes: int
    prior: int
    host: int

    @property
    def device(self) -> int:
        """The most at any time."""
        return self.weights + LIBRARIES + max(self.trained + self.passes, self.prior)


def step_memory(
    family: type[Family],
    configs: Configs,
    models: Mapping[str, nn.Module],
    adapt: Callable[[str, nn.Module], Any],
    shape: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype,
    compute: ComputeSettings,
) -> StepMemory:
    """What a step of training takes.

    `models` are on "meta", without adapters, the denoiser under the family's name for it; `adapt` puts an adapter (any
    of PEFT's) into one, given its name. `shape` is that of the latents, `dtype` the frozen weights'. They are changed.
    """
    autocast = dtype if dtype != torch.float32 else None
    # Modes are off where a checkpointed block is computed again.
    again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), GPUPasses(autocast))}
    for name, model in models.items():
        _in_dtype(model, dtype)
        if compute.quantize:
            pack_blank(model, compute.quantize, dtype)
        adapt(name, model)
        cast_training_params(model, dtype=torch.float32)
        if compute.gradient_checkpointing and name == family.denoiser:
            model.enable_gradient_checkpointing(lambda module, *args: checkpoint(module.__call__, *args, **again))
        elif compute.gradient_checkpointing:
            model.gradient_checkpointing_enable(again)
        model.train(compute.gradient_checkpointing)
    weights = sum(map(weight_bytes, models.values()))
    host, moving = _offloaded(models[family.denoiser]) if compute.offload else (0, 0)
    elsewhere = _sharded(models[family.denoiser], compute.shard) if compute.shard > 1 else 0
    adapted = {n: m for model in models.values() for n, m in model.named_modules() if isinstance(m, S2FTLayer)}
    with FakeTensorMode(allow_non_fake_inputs=True), GPUPasses(autocast):
        for model in models.values():
            fill_blank(model)
        loss = step_loss(family, configs, models, shape, batch, dtype)
        trained = [p for model in models.values() for p in model.parameters() if p.requires_grad]
        passes, optimizer, step = _training_step(loss, trained)
        prior = prior_passes(loss, adapted, trained) if adapted else 0
    copies = sum(m.out_features * m.in_features * compute_dtype(m.get_base_layer()).itemsize for m in adapted.values())
    return StepMemory(
        weights=weights - host + moving - elsewhere,
        trained=optimizer,
        passes=max(passes, step - optimizer),
        prior=prior,
        host=host + copies,
    )


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.requires_grad = False
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def _offloaded(denoiser: nn.Module) -> tuple[int, int]:
    """Bytes of the blocks' frozen weights, and of the two that the device holds at a time."""
    sizes = [_frozen_bytes(block) for block in transformer_blocks(denoiser)]
    return sum(sizes), max(a + b for a, b in zip(sizes, (*sizes[1:], 0), strict=True))


def _sharded(denoiser: nn.Module, processes: int) -> int:
    """Bytes of the frozen weights that a process does not hold: all but its share, what is in no block, and at a time
    two gathered blocks and what the next one is gathered into."""
    blocks = [_frozen_bytes(block) for block in shared_blocks(denoiser)]
    every = _frozen_bytes(denoiser)
    rest = every - sum(blocks)
    gathered = max([rest + sum(blocks[:1]), *(sum(blocks[i : i + 3]) for i in range(len(blocks)))])
    return every - every // processes - rest - gathered


def _frozen_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)


def step_loss(
    family: type[Family],
    configs: Configs,
    models: Mapping[str, nn.Module],
    shape: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype,
) -> Callable[[], torch.Tensor]:
    """A loss that takes as much memory as training's, of images and words with nothing in them."""
    base = blank_family(family, configs, models)
    with unset_fake_temporarily(), torch.device("cpu"):  # to collate them takes looking at them
        words = base.collate([family.blank_conditions(configs)] * batch)
    conditions = tree_map(lambda x: _blank(x, dtype) if isinstance(x, torch.Tensor) else x, words)
    noisy, timesteps = torch.zeros(batch, *shape), torch.zeros(batch)

    def loss() -> torch.Tensor:
        error = (base.predict(models[family.denoiser], noisy, timesteps, conditions).float() - noisy).square().mean()
        for name, model in models.items():
            if name != family.denoiser:
                ids = torch.zeros(batch, model.config.max_position_embeddings, dtype=torch.int64)
                error = error + model(input_ids=ids).last_hidden_state.float().mean()
        return error

    return loss


def _blank(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)


def _training_step(loss: Callable[[], torch.Tensor], trained: list[nn.Parameter]) -> tuple[int, int, int]:
    """At most within the passes, what the optimizer keeps, and at most within its step."""
    with AllocationTracker() as tracker:
        torch.autograd.backward(loss())  # not by `Tensor.backward`, within which `GPUPasses` would be off
        passes, tracker.peak = tracker.peak, tracker.now
        before = tracker.now
        optimizer = torch.optim.AdamW(trained, foreach=True)
        optimizer.step()
        step = tracker.peak - before
        kept = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
        optimizer.zero_grad()
    return passes, kept, step


def prior_passes(loss: Callable[[], torch.Tensor], layers: Mapping[str, S2FTLayer], trained: list[nn.Parameter]) -> int:
    """At most within a pass of the estimate: one layer's gradient at a time, beside what its inputs take."""
    handles = [watch_layer(layer.get_base_layer(), lambda gradient: None) for layer in layers.values()]
    for parameter in trained:
        parameter.requires_grad_(False)
    for layer in layers.values():
        layer._disable_adapters = True
    try:
        with AllocationTracker() as tracker:
            torch.autograd.backward(loss())  # not by `Tensor.backward`, within which `GPUPasses` would be off
        return tracker.peak
    finally:
        for handle in handles:
            handle.remove()
