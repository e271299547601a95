"""Generation: one base, any adapter, every request alone with its own settings.

A request leases one pipeline, sets everything on it that the request says (adapters, strengths, scheduler), and gives
it back; nothing of a request stays behind that the next one does not set. Images are made one by one, each from its own
seed, so that an image depends on its settings alone: not on the batch it was in, nor on who generated before.
"""

from __future__ import annotations

import copy
import gc
import json
import queue
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import diffusers
import psutil
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from s2ft_diffusion import toybox
from s2ft_diffusion.adapters.file import AdapterFileError
from s2ft_diffusion.dreambooth.base import find_family
from s2ft_diffusion.dreambooth.prompts import COMMON_WORDS, loses_subject, lost_words, read_windows, words
from s2ft_diffusion.dreambooth.settings import BaseSettings
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.families import FAMILIES, Family, Sampling
from s2ft_diffusion.families.loading import load_pipeline, place_pipeline
from s2ft_diffusion.families.quantization import Quantization
from s2ft_diffusion.pipelines.attach import adaptable_components

from . import limits
from .library import Entry, Library, base_name, plain
from .limits import RequestError
from .previews import ColourMap

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
OWN = "own"  # the scheduler that the base comes with
KEPT_ADAPTERS = 8


class Cancelled(Exception):
    """The person who asked does not want the images any more."""


@dataclass(frozen=True)
class Settings:
    """Everything an image depends on. `adapters` are ids with strengths, `seed` that of the first image."""

    prompt: str
    negative_prompt: str = ""
    adapters: tuple[tuple[str, float], ...] = ()
    steps: int = 25
    guidance: float = 4.0
    seed: int = 0
    images: int = 1
    scheduler: str = "DDIM"

    @classmethod
    def checked(cls, **values: Any) -> Settings:
        """From what a client sent; raises RequestError for what is out of bounds."""
        adapters = []
        for adapter, strength in values.pop("adapters", ()):
            if adapter:
                adapters.append((str(adapter), limits.number("The strength", strength, limits.STRENGTH)))
        if len({adapter for adapter, _ in adapters}) < len(adapters):
            raise RequestError("The two adapters are the same one; choose another, or one alone.")
        if values.get("scheduler") not in [*SCHEDULERS, OWN]:  # a list: what was sent may be of any type
            raise RequestError(f"The scheduler must be one of {', '.join([*SCHEDULERS, OWN])}.")
        return cls(
            prompt=limits.text("The prompt", values.get("prompt"), limits.PROMPT_LENGTH),
            negative_prompt=limits.text("The negative prompt", values.get("negative_prompt"), limits.PROMPT_LENGTH),
            adapters=tuple(adapters),
            steps=limits.whole("The number of steps", values.get("steps"), limits.STEPS),
            guidance=limits.number("The guidance", values.get("guidance"), limits.GUIDANCE),
            seed=limits.seed(values.get("seed")),
            images=limits.whole("The number of images", values.get("images"), limits.IMAGES),
            scheduler=values["scheduler"],
        )

    def single(self, number: int) -> Settings:
        """The settings of image `number` alone."""
        return replace(self, seed=(self.seed + number) % limits.SEEDS, images=1)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Raises RequestError for anything but what `to_json` writes."""
        try:
            values = json.loads(text)
            return cls.checked(**values)
        except (TypeError, ValueError, KeyError, RecursionError) as error:
            message = str(error) if isinstance(error, RequestError) else "they are damaged"
            raise RequestError(f"These settings cannot be used: {message}") from None


@dataclass
class Listener:
    """Told of every denoising step, with a function that makes a preview; may ask to stop by setting `cancelled`."""

    on_step: Callable[[int, int, Callable[[], Image.Image]], None] = lambda done, total, preview: None
    cancelled: Callable[[], bool] = lambda: False

    def part(self, before: int, total: int) -> Listener:
        """A listener for a part of a larger work: `before` of its `total` steps are done by then."""
        return replace(self, on_step=lambda done, _, preview: self.on_step(before + done, total, preview))


@dataclass
class Worker:
    """One pipeline and the adapters loaded into it, the least recently used first."""

    pipe: DiffusionPipeline
    loaded: OrderedDict[tuple, str] = field(default_factory=OrderedDict)

    def activate(self, wanted: list[tuple[Entry, float]]) -> None:
        """Make exactly these adapters count, at these strengths."""
        names = [self._name(entry) for entry, _ in wanted]
        keep = max(KEPT_ADAPTERS, len(names))
        while len(self.loaded) > keep:
            _, oldest = self.loaded.popitem(last=False)
            self.pipe.delete_adapters(oldest)
        if names:
            self.pipe.enable_lora()
            self.pipe.set_adapters(names, [strength for _, strength in wanted])
        elif self.loaded:
            self.pipe.disable_lora()

    def _name(self, entry: Entry) -> str:
        if entry.state not in self.loaded:
            name = f"{entry.id}_{time.monotonic_ns()}"
            self.pipe.load_s2ft_weights(entry.path, adapter_name=name)
            self.loaded[entry.state] = name
        self.loaded.move_to_end(entry.state)
        return self.loaded[entry.state]


class Engine:
    """Pipelines of one base, as many as generations may run at once; each has its own adapters and scheduler.

    Images have `side` pixels, by default the base's own.
    """

    def __init__(
        self,
        base: str,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        pipelines: int = 1,
        side: int | None = None,
        quantize: Quantization | None = None,
        offload: bool = False,
    ) -> None:
        if pipelines > 1 and (quantize or offload):
            raise ValueError("A quantised or offloaded base has one pipeline: its models are not copied.")
        self.base, self.device, self.dtype, self.side = base, device, dtype, side
        self.quantize, self.offload = quantize, offload
        self._workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        # Generations run in these threads, and so does loading: OpenMP gives each thread that ever computes a pool of
        # its own, and with more of them than there are cores it makes all of them wait less eagerly (a quarter slower).
        self.threads = ThreadPoolExecutor(pipelines, thread_name_prefix="generate")
        first = self.threads.submit(self._load, pipelines).result()
        self.family = FAMILIES[type(first).__name__]
        self.scheduler_class, self.scheduler_config = type(first.scheduler), dict(first.scheduler.config)
        self._windows, self._counting = read_windows(BaseSettings(base)), threading.Lock()
        self.components: Mapping[str, torch.nn.Module] = adaptable_components(first)
        models = [model for model in first.components.values() if isinstance(model, torch.nn.Module)]
        self.weights_bytes = sum(
            tensor.nbytes for model in models for tensor in (*model.parameters(), *model.buffers())
        )

    def _load(self, pipelines: int) -> DiffusionPipeline:
        first = load_base(self.base, self.device, self.dtype, self.quantize, offload=self.offload)
        self.preview = ColourMap(FAMILIES[type(first).__name__](first, device=torch.device(self.device)))
        for number in range(pipelines):
            self._workers.put(Worker(first if number == 0 else _copy(first)))
        return first

    @property
    def peak_bytes(self) -> int:
        """The most memory that was in use at once so far: on a GPU PyTorch's, on a CPU the whole program's."""
        if self.device != "cpu":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_peak()

    def scheduler(self, wanted: str) -> str:
        """A scheduler by name, or the first one where the base has none of that name."""
        return wanted if wanted in self.schedulers else self.schedulers[0]

    @property
    def schedulers(self) -> list[str]:
        """What the base can be sampled with, the usual one first."""
        return [*SCHEDULERS, OWN] if self.family.samplers else [OWN]

    @property
    def usual(self) -> Sampling:
        """The steps and the guidance to begin with: the embedded bases' own, else the pipeline's."""
        if toybox.is_embedded(self.base):
            return Sampling(25, 4.0)
        usual = self.family.sampling()
        return replace(usual, steps=25) if self.family.samplers else usual  # what these samplers need

    def tokens(self, prompt: str) -> tuple[int, int, str]:
        """How many tokens a prompt has, how many the text encoders read, and the words that none of them reads."""
        if not self._windows:
            return 0, 0, ""
        with self._counting:  # a tokenizer keeps how it pads
            tokenizer, limit = max(self._windows, key=lambda window: window[1])
            count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
            return count, limit, lost_words(prompt, self._windows)

    def generate(self, settings: Settings, library: Library, listener: Listener | None = None) -> list[Image.Image]:
        """The images, each with its settings in `image.info`; waits for a free pipeline.

        Raises RequestError for an adapter that is not there or cannot be used, and for too little memory; Cancelled if
        the listener says so.
        """
        return list(self.iterate(settings, library, listener))

    def iterate(self, settings: Settings, library: Library, listener: Listener | None = None):
        """`generate`, image by image."""
        listener = listener or Listener()
        wanted = [(library.get(adapter), strength) for adapter, strength in settings.adapters]
        if settings.scheduler not in self.schedulers:
            raise RequestError(f"This base is sampled by its own scheduler alone: {OWN!r}, not {settings.scheduler!r}.")
        self._check_read(settings.prompt, [entry for entry, _ in wanted])
        if settings.negative_prompt and self.family.negative_prompt is None:
            raise RequestError("This base takes no negative prompt: its guidance is distilled.")
        worker = self._workers.get()
        try:
            if listener.cancelled():
                raise Cancelled
            try:
                worker.activate(wanted)
            except (AdapterFileError, OSError) as error:
                message = plain(str(error), *(entry.path for entry, _ in wanted))
                raise RequestError(f"The adapter cannot be used: {message}") from None
            words = _encode(self.family(worker.pipe, device=torch.device(self.device)), settings)
            number, total = 0, settings.images * settings.steps

            def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
                if listener.cancelled():
                    raise Cancelled
                done = number * settings.steps + step + 1
                listener.on_step(done, total, partial(self.preview, tensors["latents"]))
                return tensors

            for number in range(settings.images):
                image = self._one(worker.pipe, words, settings.single(number), on_step_end)
                yield self._signed(image, settings.single(number), wanted)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            gc.collect()
            if self.device != "cpu":
                torch.cuda.empty_cache()
            raise RequestError("There is not enough memory for this; ask for fewer images at once.") from None
        finally:
            self._workers.put(worker)

    def _check_read(self, prompt: str, entries: list[Entry]) -> None:
        """Raise RequestError for a prompt at whose end an adapter's subject would not be read."""
        subject = words(" ".join(entry.info.instance_prompt or "" for entry in entries)) - COMMON_WORDS
        with self._counting:
            if subject and loses_subject(prompt, subject, self._windows):
                lost = lost_words(prompt, self._windows)
                raise RequestError(f"The base would not read “{lost}”, where the subject is: put the subject first.")

    @torch.inference_mode(False)
    @torch.no_grad()
    def _one(
        self,
        pipe: DiffusionPipeline,
        words: dict[str, Any],
        settings: Settings,
        on_step_end: Callable[..., dict[str, torch.Tensor]],
    ) -> Image.Image:
        kind, options = self.scheduler_class, {}
        if settings.scheduler != OWN:
            name, options = SCHEDULERS[settings.scheduler]
            kind = getattr(diffusers, name)
        pipe.scheduler = kind.from_config(self.scheduler_config, **options)
        call = {**self.family.call(steps=settings.steps, guidance=settings.guidance, side=self.side), **words}
        if "callback_on_step_end" in self.family.call_defaults():
            call["callback_on_step_end"] = on_step_end
        else:  # an older pipeline's way to say the same
            call["callback"] = lambda step, time, latents: on_step_end(pipe, step, time, {"latents": latents})
        return pipe(**call, generator=torch.Generator("cpu").manual_seed(settings.seed)).images[0]

    def _signed(self, image: Image.Image, settings: Settings, wanted: list[tuple[Entry, float]]) -> Image.Image:
        """The image with its settings as PNG text: ours under "s2ft", and the line that other programs read."""
        mixed = "".join(f", S2FT: {entry.name} {strength:g}" for entry, strength in wanted)
        negative = f"\nNegative prompt: {settings.negative_prompt}" if settings.negative_prompt else ""
        image.info = {
            "s2ft": settings.to_json(),
            "parameters": f"{settings.prompt}{negative}\nSteps: {settings.steps}, Sampler: {settings.scheduler}, "
            f"CFG scale: {settings.guidance:g}, Seed: {settings.seed}, Size: {image.width}x{image.height}, "
            f"Model: {base_name(self.base)}{mixed}",
            "s2ft_base": base_name(self.base),
        }
        return image


def resident_peak() -> int:
    """The most memory that this program has had at once, in bytes."""
    now = psutil.Process().memory_info()
    if hasattr(now, "peak_wset"):  # Windows
        return now.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(now.rss, peak if sys.platform == "darwin" else peak * 1024)


def _out_of_memory(error: BaseException) -> bool:
    on_cpu = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def load_base(
    base: str, device: str, dtype: torch.dtype, quantize: Quantization | None = None, *, offload: bool = False
) -> DiffusionPipeline:
    """A pipeline of the base on its device, quiet; raises OSError where it cannot be loaded."""
    try:
        family, _ = find_family(BaseSettings(base))
        pipe = load_pipeline(toybox.resolve(base), family, dtype, quantize=quantize, device=device)
    except InputError as error:
        raise OSError(str(error)) from None
    pipe.set_progress_bar_config(disable=True)
    return place_pipeline(pipe, family, device, offload=offload)


def _copy(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline with adaptable models and tokenizers of its own; what no request touches is shared.

    A tokenizer keeps how it pads and truncates: one that encodes for two requests at once may pad one as the other.
    """
    family = FAMILIES[type(pipe).__name__]
    changed = (*adaptable_components(pipe), "scheduler", *(name for name in pipe.components if "tokenizer" in name))
    own = {name: copy.deepcopy(getattr(pipe, name)) for name in changed}
    options = {name: value for name, value in family.load_options.items() if name not in pipe.components}
    other = type(pipe)(**{**pipe.components, **own}, **options)
    other.set_progress_bar_config(disable=True)
    return other


@torch.inference_mode(False)
@torch.no_grad()
def _encode(base: Family, settings: Settings) -> dict[str, Any]:
    """The prompts as the pipeline takes them: encoded once for all images of a request, where the family can."""
    negative = settings.negative_prompt if base.negative_prompt is not None else ""
    return base.words(settings.prompt, negative, settings.guidance)
