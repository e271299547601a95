"""The recipe's command line: diffusers' DreamBooth LoRA flags by the same names, and S2FT's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from diffusers.optimization import SchedulerType

from ..adapters.format import DTYPES
from ..errors import InputError
from ..families.quantization import QUANTIZATIONS
from ..pipelines.targets import TARGETS
from ..text import HelpFormatter, decode_arguments, printable
from ..tuner.config import PRESETS, S2FTConfig
from ..tuner.prior import Estimate
from .checks import check_arguments
from .environment import PRECISIONS, mixed_precision, process_count, run_date, sharding_asked
from .settings import (
    DEFAULT_BASE,
    LEARNING_RATES,
    NUMBERS,
    AdapterSettings,
    BaseSettings,
    CheckpointSettings,
    ClassSettings,
    ComputeSettings,
    EstimateSettings,
    HubSettings,
    LengthSettings,
    LogSettings,
    LossSettings,
    OptimizerSettings,
    PhotoSettings,
    Settings,
    ValidationSettings,
)

WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")  # diffusers'
SCHEDULERS = tuple(kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT)
S2FT_OPTIONS = (
    "n_frequency", "positions", "oversampling", "scaling", "coefficients", "norm", "sampling", "gamma", "rearrange",
    "distance", "signs", "refine",
)  # fmt: skip

PATHS = ("instance_dir", "class_data_dir", "output_dir", "logging_dir", "resume_from_checkpoint")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def amount(text: str) -> int | float:
    """Numbers a layer: a count, or a share of d * k below 1 such as 0.02. Raises ValueError for anything else."""
    return float(text) if "." in text or "e" in text.lower() else int(text)


def _yes_no(text: str) -> bool:
    if text.lower() not in ("yes", "no", "true", "false"):
        raise argparse.ArgumentTypeError(f"expected yes or no, got {text!r}")
    return text.lower() in ("yes", "true")


def _preset_words() -> str:
    """What the presets choose, for the help."""
    shown = [name for name in S2FT_OPTIONS if name != "n_frequency"]  # whose own help says it

    def word(value: Any) -> Any:
        return ("no", "yes")[value] if isinstance(value, bool) else "none" if value is None else value

    def said(options: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {word(options[name])}" for name in shown if name in options)

    default, paper = said(vars(S2FTConfig())), said(PRESETS["paper"])
    return f"Options that are not given are the preset's. default: {default}. paper: {paper}."


def build_parser() -> argparse.ArgumentParser:
    """All flags with their defaults."""
    parser = _Parser(
        prog="train_dreambooth_s2ft.py",
        description="Train an S2FT adapter on a handful of photos of one subject.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("base model and data").add_argument
    add(
        "--pretrained_model_name_or_path",
        default=DEFAULT_BASE,
        help="hub id, folder, toybox, or toybox-flow",
    )
    add("--revision", help="revision of the base on the hub")
    add("--variant", help="weight variant of the base, such as fp16")
    add(
        "--instance_dir",
        "--instance_data_dir",
        dest="instance_dir",
        required=True,
        help="folder with the photos; where a text file has a photo's name, it is the photo's own prompt",
    )
    add("--subject", help="what the subject is called; by default the folder's name")
    add("--instance_prompt", help="prompt that names the subject; by default 'a photo of sks <subject>'")
    add("--class_data_dir", help="folder with class images; missing ones are generated there")
    add("--class_prompt", help="prompt of the class, for prior preservation")
    add("--with_prior_preservation", action="store_true", help="train on class images as well")
    add("--prior_loss_weight", type=float, default=1.0, help="weight of their loss")
    add("--num_class_images", type=int, default=100, help="how many class images to have")
    add("--prior_generation_precision", choices=("no", "fp32", "fp16", "bf16"), help="precision to make them in")
    add("--sample_batch_size", type=int, default=4, help="batch size to make them in")
    add("--resolution", type=int, help="side of the training images in pixels; by default the base's own")
    add("--center_crop", action="store_true", help="crop the middle of longer images instead of a random square")
    add("--random_flip", action="store_true", help="mirror images at random")
    add("--tokenizer_max_length", type=int, help="tokens a prompt is padded to; by default the tokenizer's own")

    add = parser.add_argument_group("S2FT", _preset_words()).add_argument
    add("--preset", choices=tuple(PRESETS), default="default", help="where the options below start from")
    add(
        "--targets",
        choices=TARGETS,
        help="layers to adapt; by default all, of the preset paper qv",
    )
    add("--train_text_encoder", action="store_true", help="adapt the text encoder's projections too")
    add(
        "--n_frequency",
        type=amount,
        help="real trainable numbers a layer: a count, or a share below 1; by default "
        + ", ".join(f"{count} for {targets}" for targets, count in NUMBERS.items()),
    )
    add("--positions", choices=("grid", "free"), help="coefficients on a grid of frequencies, or anywhere (the paper)")
    add("--oversampling", type=int, help="on a grid, places for each trained number; 1 trains all places")
    add("--scaling", type=float, help="the factor alpha of the weight change")
    add("--coefficients", choices=("complex", "real"), help="kind of coefficients")
    add("--norm", choices=("ortho", "backward"), help="normalisation of the inverse transform")
    add("--sampling", choices=("power", "top", "low_frequency", "random"), help="how positions are chosen")
    add("--gamma", type=float, help="exponent of the sampling probability")
    add("--rearrange", choices=("nearest_neighbor", "none"), help="how rows and columns are ordered")
    add("--distance", choices=("cosine", "euclidean"), help="distance between rows, and between columns")
    add("--signs", type=_yes_no, metavar="yes|no", help="let rows and columns be negated")
    add("--refine", choices=("2opt", "none"), help="how the order is refined")
    add(
        "--estimate",
        choices=get_args(Estimate),
        help="how the weight change is pre-estimated; by default full, of the preset paper gradient, and scaled with "
        "--quantize, --offload and --shard",
    )
    add("--estimate_draws", type=int, help="its noise and timestep draws per image; by default 8, for full 4 to 24")
    add("--adapter_dtype", choices=DTYPES, default="float32", help="type of the stored coefficients")

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="s2ft-output", help="where the adapter, checkpoints, logs and samples go")
    add("--overwrite_output_dir", action="store_true", help="start anew in a folder with another run's checkpoints")
    add("--seed", type=int, default=0, help="of everything random")
    add("--train_batch_size", type=int, default=1, help="images per process and micro-step")
    add("--max_train_steps", type=int, help="optimizer steps; by default 500")
    add("--num_train_epochs", type=int, help="passes over the instance images, instead of --max_train_steps")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per optimizer step")
    add("--gradient_checkpointing", action="store_true", help="save memory, at the cost of time")
    add("--quantize", choices=QUANTIZATIONS, help="hold the frozen linear layers in 4 or 8 bits")
    add("--offload", action="store_true", help="keep the denoiser's blocks in host memory; checkpoints gradients")
    add("--shard", action="store_true", help="shard the denoiser's weights over the processes (FSDP 2)")
    add("--skip_memory_check", action="store_true", help="begin also where the estimate says that memory is too small")
    add("--dry_run", action="store_true", help="say how much memory the run needs on a GPU, and stop")
    add("--learning_rate", type=float, help="the highest learning rate; by default 2e-4, for the preset paper 1e-3")
    add("--scale_lr", action="store_true", help="scale the rate by processes, accumulation and batch size")
    add("--lr_scheduler", choices=SCHEDULERS, default="constant", help="how the learning rate goes on")
    add("--lr_warmup_steps", type=int, default=0, help="steps of warm-up of the scheduler")
    add("--lr_num_cycles", type=int, default=1, help="cycles of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="power of polynomial")
    add("--use_8bit_adam", action="store_true", help="8-bit Adam from bitsandbytes; needless: so little is trained")
    add("--adam_beta1", type=float, default=0.9, help="AdamW's first beta")
    add("--adam_beta2", type=float, default=0.999, help="AdamW's second beta")
    add("--adam_weight_decay", type=float, default=0.0, help="AdamW's weight decay")
    add("--adam_epsilon", type=float, default=1e-8, help="AdamW's epsilon")
    add("--max_grad_norm", type=float, default=1.0, help="norm that gradients are clipped to")
    add("--snr_gamma", type=float, help="gamma of min-SNR loss weights; 5.0 is usual")
    add(
        "--weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        help="how a flow draws timesteps; by default the base's usual",
    )
    add("--logit_mean", type=float, default=0.0, help="mean of logit_normal")
    add("--logit_std", type=float, default=1.0, help="standard deviation of logit_normal")
    add("--mode_scale", type=float, default=1.29, help="scale of mode")
    add("--guidance_scale", type=float, help="guidance that a distilled base is told; by default its pipeline's own")
    add("--pre_compute_text_embeddings", action="store_true", help="always done unless --train_text_encoder is given")
    add("--mixed_precision", choices=PRECISIONS, help="by default accelerate's own setting")
    add("--allow_tf32", action="store_true", help="allow TF32 matrix products")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="attention by xFormers")

    add = parser.add_argument_group("checkpoints, logs and samples").add_argument
    add("--checkpointing_steps", type=int, default=500, help="steps between checkpoints")
    add("--checkpoints_total_limit", type=int, help="checkpoints to keep")
    add("--resume_from_checkpoint", help="'latest', or a checkpoint's path")
    add("--validation_prompt", help="prompt of sample images")
    add("--num_validation_images", type=int, default=4, help="how many sample images")
    add("--validation_epochs", type=int, default=50, help="passes over the instance images between samples")
    add("--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, all, or none")
    add("--logging_dir", default="logs", help="folder of the logs, inside the output folder")
    add(
        "--save_lora", type=int, nargs="?", const=0, metavar="RANK",
        help="also write the adapter as a LoRA, for programs without this package; RANK: at free positions",
    )  # fmt: skip
    add("--push_to_hub", action="store_true", help="upload the adapter and its model card")
    add("--hub_model_id", help="repository to upload to; by default the output folder's name")
    add("--hub_token", help="token of the hub")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Parse and check the command line; raises InputError for flags that contradict each other."""
    args = build_parser().parse_args(argv)
    decode_arguments(args, paths=PATHS, secrets=("hub_token",))
    args.prompt_was_given = args.instance_prompt is not None
    args.subject = args.subject or folder_words(args.instance_dir)
    if not args.prompt_was_given:
        args.instance_prompt = f"a photo of sks {args.subject}"
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.preset]
    args.mixed_precision = mixed_precision(args.mixed_precision)  # as it is: a resumed run must have the same
    args.processes = process_count()
    args.shard = args.shard or (sharding_asked() and args.processes > 1)
    frozen = args.quantize is not None or args.offload or args.shard
    estimate = EstimateSettings.of(args.preset, args.estimate, args.estimate_draws, frozen=frozen)
    args.estimate, args.estimate_draws = estimate.kind, estimate.draws
    check_arguments(args)
    run_date()  # read again at the end, when it is too late to refuse it
    settings = _settings(args)
    try:
        config = settings.adapter.config(["any"], args.seed)
    except ValueError as error:
        raise InputError(str(error)) from None
    if settings.lora_rank == 0 and config.positions != "grid":
        raise InputError("--save_lora needs a rank: positions are free, and the nearest LoRA of a rank is written.")
    return settings


def _settings(args: argparse.Namespace) -> Settings:
    """The flags as values, each with those that it belongs with."""
    options: dict[str, Any] = {name: getattr(args, name) for name in S2FT_OPTIONS if getattr(args, name) is not None}
    if options.get("refine") == "none":
        options["refine"] = None
    classes = validation = None
    if args.with_prior_preservation:
        classes = ClassSettings(
            Path(args.class_data_dir), args.class_prompt, args.num_class_images, args.prior_loss_weight,
            args.prior_generation_precision, args.sample_batch_size,
        )  # fmt: skip
    if args.validation_prompt:
        validation = ValidationSettings(args.validation_prompt, args.num_validation_images, args.validation_epochs)
    plain = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float | None)}
    return Settings(
        base=BaseSettings(
            args.pretrained_model_name_or_path, args.revision, args.variant, args.tokenizer_max_length,
            args.guidance_scale,
        ),
        photos=PhotoSettings(
            Path(args.instance_dir), args.subject, args.instance_prompt, args.resolution, args.center_crop,
            args.random_flip,
        ),
        classes=classes,
        adapter=AdapterSettings.of(args.preset, args.targets, args.train_text_encoder, options),
        estimate=EstimateSettings(args.estimate, args.estimate_draws),
        loss=LossSettings(
            args.snr_gamma, args.weighting_scheme, args.logit_mean, args.logit_std, args.mode_scale
        ),
        length=LengthSettings(
            args.train_batch_size, args.gradient_accumulation_steps, args.max_train_steps, args.num_train_epochs
        ),
        optimizer=OptimizerSettings(
            rate=args.learning_rate,
            scale_rate=args.scale_lr,
            schedule=args.lr_scheduler,
            warmup_steps=args.lr_warmup_steps,
            cycles=args.lr_num_cycles,
            power=args.lr_power,
            eight_bit=args.use_8bit_adam,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            epsilon=args.adam_epsilon,
            max_grad_norm=args.max_grad_norm,
        ),
        compute=ComputeSettings(
            args.mixed_precision, args.allow_tf32, args.enable_xformers_memory_efficient_attention,
            args.gradient_checkpointing or args.offload, args.quantize, args.offload,
            args.processes if args.shard else 1, not args.skip_memory_check,
        ),
        checkpoints=CheckpointSettings(
            args.checkpointing_steps, args.checkpoints_total_limit, args.resume_from_checkpoint,
            args.overwrite_output_dir,
        ),
        validation=validation,
        logs=LogSettings(args.report_to, args.logging_dir),
        hub=HubSettings(args.hub_model_id, args.hub_token) if args.push_to_hub else None,
        output_dir=Path(args.output_dir),
        seed=args.seed,
        dtype=args.adapter_dtype,
        lora_rank=args.save_lora,
        flags={name: value for name, value in plain.items() if name != "hub_token"},
        dry_run=args.dry_run,
    )  # fmt: skip


def folder_words(folder: str) -> str:
    """A folder's name as words."""
    return printable(Path(folder).resolve().name).replace("_", " ").replace("-", " ")
