"""What differs between base models: the protocol that training, evaluation and serving go by.

A family is one file with one class. Its class methods answer from the base's configs alone, before any weight is
loaded; an object of it holds a loaded pipeline. Everything else, how photos are cropped, what is drawn, which layers
are adapted and how they are optimised, is the same for all and knows no family by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from accelerate.utils.modeling import check_device_same
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from ..dreambooth.settings import LossSettings
from ..errors import InputError
from .objectives import FlowObjective, Objective

Configs = Mapping[str, Mapping[str, Any]]  # the base's configs by component: denoiser, "vae", "scheduler"
Conditions = dict[str, Any]  # what a denoiser is told of the words: tensors or lists, the batch first


@dataclass(frozen=True)
class Sampling:
    """How a pipeline makes images unless asked otherwise.

    `guidance_name` is the argument that guidance is passed as; `negative_prompt` is None where the pipeline takes none.
    """

    steps: int
    guidance: float
    guidance_name: str = "guidance_scale"
    negative_prompt: str | None = ""


FAMILIES: dict[str, type[Family]] = {}  # by the pipeline's class


class Family:
    """One kind of base model; see the methods for what a new one has to say.

    pipeline_class: the class in `model_index.json` that the family is known by.
    denoiser, denoiser_class: the component that is trained, and its class in diffusers.
    text_encoders, trainable_text_encoders: the components that read words, and those that may be trained.
    max_tokens: what the pipeline's call pads prompts to; None is the tokenizer's own length.
    guidance_name, negative_prompt: see `Sampling`.
    weighting_scheme: where a flow's times lie unless asked otherwise, as diffusers' scripts have it.
    pack: latents that become one token along each side.
    default_latents: side of the latents of the pipeline's own size; None is the denoiser's `sample_size`.
    samplers: whether diffusers' schedulers for predictions of noise can sample it in the place of its own.
    compared_by: the scheduler, in diffusers, that images are compared by; None is the pipeline's own.
    load_options, call_options: what the pipeline is loaded and called with.
    """

    pipeline_class: ClassVar[str]
    denoiser: ClassVar[str] = "transformer"
    denoiser_class: ClassVar[str]
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    trainable_text_encoders: ClassVar[tuple[str, ...]] = ()
    max_tokens: ClassVar[int | None] = 512
    guidance_name: ClassVar[str] = "guidance_scale"
    negative_prompt: ClassVar[str | None] = ""
    weighting_scheme: ClassVar[str] = "none"
    pack: ClassVar[int] = 1
    default_latents: ClassVar[int | None] = None
    samplers: ClassVar[bool] = False
    compared_by: ClassVar[str | None] = None
    load_options: ClassVar[Mapping[str, Any]] = {}
    call_options: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        if "pipeline_class" in cls.__dict__:
            FAMILIES[cls.pipeline_class] = cls

    # From the configs ------------------------------------------------------------------------------------------------

    @classmethod
    def check(cls, configs: Configs) -> str | None:
        """Why a base of this class cannot be trained; None where it can."""
        return None

    @classmethod
    def scale(cls, configs: Configs) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(configs["vae"]["block_out_channels"]) - 1)

    @classmethod
    def multiple(cls, configs: Configs) -> int:
        """What the side of an image must be a multiple of, in pixels."""
        return cls.scale(configs) * cls.pack

    @classmethod
    def default_side(cls, configs: Configs) -> int:
        """The side of the images that the base was made for, in pixels."""
        return (cls.default_latents or configs[cls.denoiser]["sample_size"]) * cls.scale(configs)

    @classmethod
    def latent_shape(cls, configs: Configs, side: int) -> tuple[int, int, int]:
        """Channels, height and width of what noise is added to."""
        latents = side // cls.scale(configs)
        return (configs["vae"]["latent_channels"], latents, latents)

    @classmethod
    def objective(cls, configs: Configs, shape: tuple[int, int, int], settings: LossSettings) -> Objective:
        """The loss; raises InputError for settings that it has no use for."""
        if settings.snr_gamma is not None:
            raise InputError(f"--snr_gamma is for bases that predict noise or velocity, not for {cls.pipeline_class}.")
        scheduler = cls.flow_scheduler(configs["scheduler"])
        shift = cls.dynamic_shift(configs, shape) if scheduler.config.use_dynamic_shifting else None
        return FlowObjective(scheduler, settings, settings.weighting_scheme or cls.weighting_scheme, shift)

    @classmethod
    def flow_scheduler(cls, config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler whose sigmas are trained on."""
        return FlowMatchEulerDiscreteScheduler.from_config(dict(config))

    @classmethod
    def dynamic_shift(cls, configs: Configs, shape: tuple[int, int, int]) -> float:
        """The shift mu of a scheduler that shifts by resolution, as the pipeline's call computes it."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = configs["scheduler"]
        tokens = (shape[-2] // cls.pack) * (shape[-1] // cls.pack)
        return calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    @classmethod
    def sampling(cls) -> Sampling:
        """The steps and the guidance that the pipeline's own call takes."""
        defaults = cls.call_defaults()
        return Sampling(
            defaults["num_inference_steps"], defaults[cls.guidance_name], cls.guidance_name, cls.negative_prompt
        )

    @classmethod
    def call_defaults(cls) -> dict[str, Any]:
        """The defaults of the pipeline's call by name."""
        signature = inspect.signature(getattr(diffusers, cls.pipeline_class).__call__)
        return {name: parameter.default for name, parameter in signature.parameters.items()}

    @classmethod
    def call(
        cls,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        side: int | None = None,
    ) -> dict[str, Any]:
        """Arguments for the pipeline's call beside the prompt; what is None is the family's own.

        Raises InputError for a negative prompt where the pipeline takes none.
        """
        usual = cls.sampling()
        if negative_prompt and usual.negative_prompt is None:
            raise InputError(f"{cls.pipeline_class} takes no negative prompt: its guidance is distilled.")
        found = {**cls.call_options, "num_inference_steps": steps or usual.steps}
        found[usual.guidance_name] = usual.guidance if guidance is None else guidance
        if usual.negative_prompt is not None and (negative_prompt or usual.negative_prompt):
            found["negative_prompt"] = negative_prompt or usual.negative_prompt
        return found if side is None else {**found, "height": side, "width": side}

    @classmethod
    def unreachable(cls, component: str, model: nn.Module) -> list[str]:
        """Layers of a component that cannot change what is predicted, beside those that `targets.unreachable` knows."""
        return []

    @classmethod
    def blank_conditions(cls, configs: Configs) -> Conditions:
        """Conditions of a prompt as `encode_prompt` gives them, of the usual sizes and with nothing in them: what an
        estimate of memory goes by."""
        raise NotImplementedError

    # With a loaded pipeline ------------------------------------------------------------------------------------------

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        max_tokens: int | None = None,
        guidance: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`device` is where the models work, by default where the denoiser is."""
        self.pipeline, self._device = pipeline, device
        self.tokens = max_tokens or self.max_tokens
        self.guidance = self.sampling().guidance if guidance is None else guidance  # told to distilled denoisers
        if max_tokens is not None and self.max_tokens is None:
            for name in (encoder.replace("text_encoder", "tokenizer") for encoder in self.text_encoders):
                getattr(pipeline, name).model_max_length = max_tokens

    def bring(self, *names: str) -> None:
        """Bring components to the device that they work on, as far as the base has them."""
        for name in names:
            if getattr(self.pipeline, name, None) is not None:
                getattr(self.pipeline, name).to(self.device)

    def put_away(self, *names: str) -> None:
        """Take components from the device, now that they have encoded everything."""
        if self.device.type == "cpu":
            return
        for name in names:
            if getattr(self.pipeline, name, None) is not None:
                getattr(self.pipeline, name).to("cpu")
        torch.cuda.empty_cache()

    def drop(self, *names: str) -> None:
        """Let go of components that nothing is going to ask for any more."""
        for name in names:
            setattr(self.pipeline, name, None)

    def away(self) -> list[nn.Module]:
        """The models that are not on the device, because training does without them."""
        models = [model for model in self.pipeline.components.values() if isinstance(model, nn.Module)]
        return [model for model in models if not check_device_same(model.device, self.device)]

    @property
    def vae(self) -> nn.Module:
        return self.pipeline.vae

    def exactly(self) -> AbstractContextManager[Any]:
        """Without autocast where the autoencoder is in float32: in float16, activations of some overflow (SDXL's)."""
        if self.vae.dtype == torch.float32:
            return torch.autocast(self.vae.device.type, enabled=False)
        return nullcontext()

    @property
    def device(self) -> torch.device:
        return self._device or self.pipeline.components[self.denoiser].device

    def encode_prompt(self, prompt: str) -> Conditions:
        """What the denoiser is told of one prompt, by the pipeline's own `encode_prompt`, as for a batch of one."""
        raise NotImplementedError

    def words(self, prompt: str, negative_prompt: str, guidance: float) -> dict[str, Any]:
        """The prompts as arguments of the pipeline's call."""
        return {"prompt": prompt, **({"negative_prompt": negative_prompt} if negative_prompt else {})}

    def collate(self, conditions: Sequence[Conditions]) -> Conditions:
        """The conditions of a batch from those of its samples."""
        together: Conditions = {}
        for name, value in conditions[0].items():
            values = [each[name] for each in conditions]
            together[name] = torch.cat(values) if isinstance(value, torch.Tensor) else [x for v in values for x in v]
        return together

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the latents of pixels (1, 3, height, width) in [-1, 1], each (channels, h, w)."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return posterior.mean[0], posterior.std[0]

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (channels, h, w) of the autoencoder as the denoiser expects them."""
        return (latents - (self.vae.config.get("shift_factor") or 0.0)) * self.vae.config.scaling_factor

    def told_guidance(self, noisy: torch.Tensor) -> torch.Tensor | None:
        """What a guidance-distilled denoiser is told, (batch,); None for one that takes no guidance."""
        if not self.pipeline.components[self.denoiser].config.guidance_embeds:
            return None
        return torch.full((len(noisy),), self.guidance, device=noisy.device, dtype=torch.float32)

    def spatial(self, latents: torch.Tensor) -> torch.Tensor:
        """A square image's latents as the pipeline's loop has them, as (batch, channels, h, w)."""
        return latents

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """One call of the denoiser as the pipeline makes it: noisy latents (batch, channels, h, w) and timesteps
        (batch,) in the scheduler's units to a prediction of the latents' shape.

        A flow's prediction is of noise minus latents.
        """
        raise NotImplementedError


def blank_words(tokens: int, width: int) -> Conditions:
    """Blank conditions of some families: words (1, tokens, width) with nothing in them, and a mask that covers none."""
    return {
        "encoder_hidden_states": torch.zeros(1, tokens, width),
        "encoder_attention_mask": torch.ones(1, tokens, dtype=torch.int64),
    }
