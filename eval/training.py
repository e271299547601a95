"""One protocol for all methods of a comparison: the same images, noise, steps and optimizer for each of them."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save, save_file
from torch import nn
from tqdm import tqdm

from s2ft_diffusion.adapters.file import collect_adapter, write_adapter
from s2ft_diffusion.dreambooth.base import load_base, plan_base
from s2ft_diffusion.dreambooth.batches import Layout, estimate_batches
from s2ft_diffusion.dreambooth.draws import DrawStream
from s2ft_diffusion.dreambooth.images import SquareImages, find_images
from s2ft_diffusion.dreambooth.loss import DiffusionLoss, LatentSource
from s2ft_diffusion.dreambooth.prompts import Prompts
from s2ft_diffusion.dreambooth.settings import AdapterSettings, BaseSettings, EstimateSettings
from s2ft_diffusion.errors import Diverged
from s2ft_diffusion.families import Family
from s2ft_diffusion.pipelines.attach import inject_adapter
from s2ft_diffusion.tuner.prior import estimate_prior, place_from_prior

from .capture import CapturedDenoiser
from .methods import Method, peft_config

ADAPTER = "default"
HELD_OUT_DRAWS = 64  # at least, over the pictures that are not trained on


@dataclass(frozen=True)
class Run:
    """What is trained on: a base, a subject's photos under a prompt, for so many steps of so many images.

    What is `held_out`, pictures with the words that follow the prompt in their captions, is not trained on. `priors` is
    a folder where priors are kept for other trainings on the same: at other rates, or with other grids.
    """

    base: str
    photos: Path
    instance_prompt: str
    seed: int
    n_frequency: int | float
    targets: str = "qv"
    steps: int = 300
    batch: int = 4
    resolution: int | None = None
    held_out: tuple[tuple[Path, str], ...] = ()
    priors: Path | None = None


@dataclass
class Trained:
    """A trained denoiser, its adapter merged into the weights, and what it took.

    `seconds` are those of everything but loading the base and encoding the photos; `peak_bytes` is the growth of memory
    while training (on a GPU, what was allocated at most).
    """

    base: Family
    trainable: int
    share: float
    weights: bytes | None
    bytes: int
    seconds: float
    peak_bytes: int
    losses: list[float]


class Session:
    """The base, loaded for a run, with its loss and its draws; `adapter` are S²FT's options."""

    def __init__(self, run: Run, adapter: AdapterSettings | None = None, device: str = "cpu") -> None:
        self.run = run
        adapter = adapter or AdapterSettings()
        options = {"n_frequency": run.n_frequency, **adapter.options}
        self.adapter = replace(adapter, targets=run.targets, options=options)
        self.layout = Layout(run.steps, run.batch)  # a run is one process's, however many share the work
        self.plan = plan_base(BaseSettings(run.base), self.adapter, run.resolution, run.seed)
        self.base = load_base(self.plan)
        self.base.pipeline.to(device)
        held_out = [path for path, _ in run.held_out]
        photos = [path for path in find_images(run.photos) if path not in held_out]
        self.source, self.stream = self._pictures("instance", photos)
        self.held_out = self._pictures("held out", held_out)
        components = {self.base.denoiser: self.denoiser}
        self.loss = DiffusionLoss(components, self.base, self.plan.objective, Prompts(self.base))

    def _pictures(self, name: str, paths: list[Path]) -> tuple[LatentSource, DrawStream]:
        images = SquareImages(paths, self.plan.resolution, center_crop=True)
        source = LatentSource(images, self.base)
        source.keep_all((False,))
        return source, DrawStream(name, self.run.seed, len(paths), self.plan.latent_shape, random_flip=False)

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.base.pipeline, self.base.denoiser)

    @property
    def targets(self) -> list[str]:
        """The layers that all methods adapt, in the model's order."""
        wanted = self.plan.configs[self.base.denoiser].target_modules
        return [name for name, _ in self.denoiser.named_modules() if name in wanted]

    def prior(self, settings: EstimateSettings) -> dict[str, torch.Tensor]:
        """The prior of what is attached, from the draws that the recipe takes, or as another training kept it."""
        kept = None
        if self.run.priors is not None:
            name = f"{self.run.photos.name}-{self.run.seed}-{settings.kind}-{settings.draws}.safetensors"
            kept = self.run.priors / name
            if kept.exists():
                return load_file(kept)
        prompts = [self.run.instance_prompt] * len(self.source)
        batches = estimate_batches(settings, self.layout, self.stream, self.source, prompts)
        prior = estimate_prior(self.denoiser, self.loss, batches, estimate=settings.kind)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(f".{os.getpid()}.tmp")
            save_file({layer: matrix.contiguous() for layer, matrix in prior.items()}, temporary)
            temporary.replace(kept)
        return prior

    def batch(self, step: int) -> list:
        """The samples of an optimizer step."""
        numbers = range(step * self.run.batch, (step + 1) * self.run.batch)
        return [(self.stream.sample(i), self.source, self.run.instance_prompt, 1.0) for i in numbers]

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean loss on the pictures that are not trained on, with draws that are the same for every method."""
        source, stream = self.held_out
        captions = [f"{self.run.instance_prompt} {words}".strip() for _, words in self.run.held_out]
        draws = stream.stratified(math.ceil(HELD_OUT_DRAWS / len(source)))
        samples = [(draw, source, captions[draw.image], 1.0) for draw in draws]
        batches = [samples[i : i + self.run.batch] for i in range(0, len(samples), self.run.batch)]
        return sum(len(batch) * float(self.loss(batch)) for batch in batches) / len(samples)

    def attach(self, method: Method) -> None:
        """Make trainable what the method trains."""
        torch.manual_seed(self.run.seed)
        if method.kind == "full":
            self.denoiser.requires_grad_(True)
        elif method.kind == "s2ft":
            inject_adapter(self.denoiser, self.plan.configs[self.base.denoiser], ADAPTER)
            place_from_prior(self.denoiser, self.prior(method.estimate))
        elif method.trains:
            config = peft_config(method.kind, self.denoiser, self.targets, self.run.n_frequency, self.run.seed)
            inject_adapter(self.denoiser, config, ADAPTER)


def train(method: Method, rate: float, run: Run, device: str = "cpu") -> Trained:
    """Train a method on a subject. Raises Diverged for a loss that is not finite."""
    session = Session(run, method.adapter, device)
    size = sum(p.numel() for p in session.denoiser.parameters())
    losses: list[float] = []
    with peak_memory(device) as peak:
        begun = time.perf_counter()
        session.attach(method)
        if method.trains:
            losses = _fit(session, method, rate)
        seconds = time.perf_counter() - begun
    trainable = sum(p.numel() for p in session.denoiser.parameters() if p.requires_grad)
    weights, length = _stored(session, method)
    merge(session.denoiser)
    return Trained(session.base, trainable, trainable / size, weights, length, seconds, peak.bytes, losses)


def held_out_loss(method: Method, rate: float, run: Run, device: str = "cpu") -> float:
    """Train a method, and what that does to the loss on pictures it was not shown, relative to the base's: below 1 it
    has learned what the subject looks like, above 1 its photos by heart. Raises Diverged as `train` does.
    """
    session = Session(run, method.adapter, device)
    before = session.held_out_loss()
    session.attach(method)
    _fit(session, method, rate)
    return session.held_out_loss() / before


def _fit(session: Session, method: Method, rate: float) -> list[float]:
    """Train what is attached; returns every step's loss."""
    parameters = [p for p in session.denoiser.parameters() if p.requires_grad]
    if session.denoiser.device.type == "cuda":
        session.loss.components[session.base.denoiser] = CapturedDenoiser(session.denoiser)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses: list[float] = []
    for step in tqdm(range(session.run.steps), desc=f"{method.name} {rate:.1e}", mininterval=1):
        value = session.loss(session.batch(step))
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
        if not torch.isfinite(value):
            raise Diverged(f"The loss of {method.name} is {losses[-1]} at step {step + 1}, rate {rate:g}.")
    return losses


def merge(denoiser: nn.Module) -> None:
    """Merge adapters into the weights: images of all methods then cost the same."""
    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    denoiser.requires_grad_(False)


def _stored(session: Session, method: Method) -> tuple[bytes | None, int]:
    """An adapter's file in half precision, and its size; of full fine-tuning, the size alone."""
    denoiser = session.denoiser
    if method.kind == "base":
        return None, 0
    if method.kind == "full":
        return None, sum(2 * p.numel() for p in denoiser.parameters())
    if method.kind == "s2ft":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            write_adapter(path, collect_adapter({session.base.denoiser: denoiser}, ADAPTER), "float16")
            data = path.read_bytes()
    else:
        state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
        data = save({name: tensor.detach().cpu().half().contiguous() for name, tensor in state.items()})
    return data, len(data)


class _Peak:
    bytes = 0


@contextmanager
def peak_memory(device: str) -> Iterator[_Peak]:
    """How much memory grows within the block: allocated on a GPU, resident otherwise (Linux; elsewhere 0)."""
    found = _Peak()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.bytes = torch.cuda.max_memory_allocated()
        return
    if sys.platform != "linux":
        yield found
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _status("VmRSS")
    yield found
    found.bytes = _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
