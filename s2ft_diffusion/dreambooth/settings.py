"""What a run is asked to do: values that are made once, from the flags or by a caller, and never change.

Each part of the recipe is given only its own. What is found on the way, such as how many steps a run has or which
repository it goes to, is a value of its own and not written in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pipelines.targets import Targets
from ..tuner.config import S2FTConfig
from ..tuner.prior import Estimate

DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULT_STEPS = 500
# Chosen by looking, on the embedded base: many numbers move a weight further than few at the same rate.
LEARNING_RATES = {"default": 2e-4, "paper": 1e-3}
ESTIMATES: dict[str, Estimate] = {"default": "full", "paper": "gradient"}  # docs/prior.md
ESTIMATE_DRAWS = 8  # for "gradient" and "normalized"
PRESET_TARGETS: dict[str, Targets] = {"default": "all", "paper": "qv"}
# Real trainable numbers a layer: about half a million in all on Stable Diffusion 1.5, whichever layers they are.
NUMBERS: dict[Targets, int] = {"qv": 8000, "attention": 4000, "blocks": 3200, "all": 2000}


@dataclass(frozen=True)
class BaseSettings:
    """Which base model: a hub id, a local folder or "toybox".

    `max_tokens` is what a prompt is padded to, `guidance` what a guidance-distilled base is told; None is what its
    pipeline's call says.
    """

    name: str = DEFAULT_BASE
    revision: str | None = None
    variant: str | None = None
    max_tokens: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class PhotoSettings:
    """The subject's photos and words; `resolution` is the side in pixels, None the base's own."""

    folder: Path
    subject: str
    prompt: str
    resolution: int | None = None
    center_crop: bool = False
    random_flip: bool = False


@dataclass(frozen=True)
class ClassSettings:
    """Class images for prior preservation: `weight` is that of their loss, `precision` and `batch` of making them."""

    folder: Path
    prompt: str
    count: int = 100
    weight: float = 1.0
    precision: str | None = None
    batch: int = 4


@dataclass(frozen=True)
class AdapterSettings:
    """Which layers are adapted and how: `options` are fields of `S2FTConfig` on top of the preset's."""

    preset: str = "default"
    targets: Targets = "all"
    train_text_encoder: bool = False
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def of(
        cls, preset: str, targets: Targets | None, train_text_encoder: bool, options: Mapping[str, Any]
    ) -> AdapterSettings:
        """What is not given is the preset's: the layers, and how many numbers each has."""
        targets = targets or PRESET_TARGETS[preset]
        if preset == "default":
            options = {"n_frequency": NUMBERS[targets], **options}
        return cls(preset, targets, train_text_encoder, options)

    def config(self, target_modules: list[str], seed: int) -> S2FTConfig:
        """The config for these layers; raises ValueError for options that cannot be."""
        return S2FTConfig.from_preset(self.preset, target_modules=target_modules, seed=seed, **self.options)


@dataclass(frozen=True)
class EstimateSettings:
    """How the prior is estimated, and from how many draws of each photo; None goes by the run's length."""

    kind: Estimate = "full"
    draws: int | None = None

    @classmethod
    def of(
        cls, preset: str, kind: Estimate | None = None, draws: int | None = None, *, frozen: bool = False
    ) -> EstimateSettings:
        """What is not given is the preset's; `frozen` weights (packed, offloaded, sharded) are not trained for it."""
        kind = kind or ("scaled" if frozen and ESTIMATES[preset] == "full" else ESTIMATES[preset])
        return cls(kind, ESTIMATE_DRAWS if draws is None and kind != "full" else draws)


@dataclass(frozen=True)
class LossSettings:
    """Weights of the loss by timestep.

    `snr_gamma` is min-SNR's, for bases that predict noise or velocity. For those of flow matching, `weighting_scheme`
    says where times lie and how they weigh (None: as is usual for the base), with the next three as its parameters.
    """

    snr_gamma: float | None = None
    weighting_scheme: str | None = None
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29


@dataclass(frozen=True)
class LengthSettings:
    """Images a process and micro-step, micro-steps an optimizer step, and either steps or passes over the photos."""

    batch: int = 1
    accumulation: int = 1
    steps: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate's schedule; `scale_rate` multiplies the rate by the images of a step."""

    rate: float = LEARNING_RATES["default"]
    scale_rate: bool = False
    schedule: str = "constant"
    warmup_steps: int = 0
    cycles: int = 1
    power: float = 1.0
    eight_bit: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class ComputeSettings:
    """Precision and memory; `mixed_precision` is "no", "fp16" or "bf16".

    `quantize` packs the frozen linear layers of denoiser and text encoders ("nf4", "int8" or "float8"), `offload` keeps
    the denoiser's blocks in host memory, which takes gradient checkpointing, `shard` is the number of processes that
    its weights are shared out over. `check` stops a run that needs more memory than its device has.
    """

    mixed_precision: str = "no"
    allow_tf32: bool = False
    xformers: bool = False
    gradient_checkpointing: bool = False
    quantize: str | None = None
    offload: bool = False
    shard: int = 1
    check: bool = True


@dataclass(frozen=True)
class CheckpointSettings:
    """Steps between checkpoints, how many to keep, and what becomes of those that are there."""

    every: int = 500
    limit: int | None = None
    resume_from: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class ValidationSettings:
    """Sample images: how many of which prompt, every so many passes over the photos and at the end."""

    prompt: str
    images: int = 4
    epochs: int = 50


@dataclass(frozen=True)
class LogSettings:
    """Which tracker, and its folder inside the output folder."""

    report_to: str = "none"
    folder: str = "logs"


@dataclass(frozen=True)
class HubSettings:
    """Where to upload to: None is the output folder's name."""

    model_id: str | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Settings:
    """All of a run. `flags` are the command line's, by name, for checkpoints and trackers: without the hub's token.

    `lora_rank` asks for a LoRA beside the adapter: 0 is an adapter's own rank on a grid.
    """

    photos: PhotoSettings
    base: BaseSettings = field(default_factory=BaseSettings)
    classes: ClassSettings | None = None
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    estimate: EstimateSettings = field(default_factory=EstimateSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    length: LengthSettings = field(default_factory=LengthSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings | None = None
    logs: LogSettings = field(default_factory=LogSettings)
    hub: HubSettings | None = None
    output_dir: Path = Path("s2ft-output")
    seed: int = 0
    dtype: str = "float32"
    lora_rank: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict, hash=False)
    dry_run: bool = False
