"""Train an S2FT adapter on a handful of photos of one subject.

    accelerate launch train_dreambooth_s2ft.py --instance_dir dog/

The recipe, top to bottom: check the input, load the base, make class images, estimate the weight change, rearrange,
train, sample, save. Its parts are in `s2ft_diffusion.dreambooth`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from PIL import Image
from tqdm.auto import tqdm

from s2ft_diffusion.adapter_file import (
    WEIGHTS_NAME,
    AdapterInfo,
    collect_adapter,
    make_thumbnail,
    write_adapter,
)
from s2ft_diffusion.dreambooth.arguments import DEFAULT_STEPS, folder_words, parse_arguments
from s2ft_diffusion.dreambooth.base import Base, BasePlan, load_base, plan_base
from s2ft_diffusion.dreambooth.checkpoints import (
    ADAPTER,
    Checkpoints,
    TrainingState,
    clear_checkpoints,
    list_checkpoints,
    prepare_output_dir,
    run_flags,
)
from s2ft_diffusion.dreambooth.class_images import class_image_paths, ensure_class_images
from s2ft_diffusion.dreambooth.draws import Draw, DrawStream, process_slots, replayed
from s2ft_diffusion.dreambooth.errors import InputError
from s2ft_diffusion.dreambooth.images import SquareImages, find_images, load_image
from s2ft_diffusion.dreambooth.loss import DiffusionLoss, LatentSource
from s2ft_diffusion.dreambooth.phases import Phases
from s2ft_diffusion.dreambooth.prompts import Prompts
from s2ft_diffusion.dreambooth.publish import push, usage_snippet, write_model_card, write_text
from s2ft_diffusion.prior import estimate_prior, place_from_prior
from s2ft_diffusion.seeding import seeded

logger = logging.getLogger("train_dreambooth_s2ft")

Sample = tuple[Draw, LatentSource, str, float]


class Diverged(RuntimeError):
    """The loss is not finite any more."""


class Interrupted(RuntimeError):
    """Ctrl-C, after a checkpoint was written."""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    for chatty in ("httpx", "torch.distributed", "accelerate", "s2ft_diffusion.model"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    # Everything that can be wrong with the input is found before a model is loaded.
    instance_paths = find_images(args.instance_dir)
    for path in instance_paths:
        load_image(path)
    args.images = ", ".join(path.name for path in instance_paths)
    resume_path = prepare_output_dir(args)
    plan = plan_base(args)
    output_dir = Path(args.output_dir)

    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(output_dir), str(output_dir / args.logging_dir)),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    logging.getLogger().setLevel(logging.INFO if accelerator.is_main_process else logging.WARNING)
    phases = Phases(logger)
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.is_main_process and args.overwrite_output_dir:
        clear_checkpoints(output_dir)
    if not args.prompt_was_given:
        logger.info("The instance prompt is %r; choose another with --instance_prompt.", args.instance_prompt)

    with phases("load") as say:
        base = load_base(plan)
        base.vae.to(accelerator.device, weight_dtype)
        base.text_encoder.to(accelerator.device, weight_dtype)
        base.unet.to(accelerator.device, weight_dtype)
        if args.enable_xformers_memory_efficient_attention:
            base.unet.enable_xformers_memory_efficient_attention()
        total = sum(p.numel() for name in plan.configs for p in getattr(base, name).parameters())
        say(f"{plan.name}, {' and '.join(plan.configs)} of {total:,} parameters, {len(instance_paths)} images")

    sources = [LatentSource(SquareImages(instance_paths, plan.resolution, center_crop=args.center_crop), base.vae)]
    if args.with_prior_preservation:
        with phases("class images") as say:
            folder = Path(args.class_data_dir)
            made = ensure_class_images(folder, args, plan, accelerator)
            paths = class_image_paths(folder, args.num_class_images)
            sources.append(LatentSource(SquareImages(paths, plan.resolution, center_crop=args.center_crop), base.vae))
            say(f"{made} generated, {len(paths)} in use")
    flips = (False, True) if args.random_flip else (False,)
    cached = [source.keep_all(flips) for source in sources]
    if all(cached) and accelerator.device.type == "cuda":
        base.vae.to("cpu")  # back for sampling

    components = {"unet": base.unet} | ({"text_encoder": base.text_encoder} if args.train_text_encoder else {})
    for name, model in components.items():
        model.add_adapter(plan.configs[name], ADAPTER)
        cast_training_params(model, dtype=torch.float32)
    if args.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            base.text_encoder.gradient_checkpointing_enable()
    prompts = Prompts(base.tokenizer, base.text_encoder, args.tokenizer_max_length, live=args.train_text_encoder)
    streams = [
        DrawStream(name, args.seed, len(source), plan.latent_shape, random_flip=args.random_flip)
        for name, source in zip(("instance", "class"), sources, strict=False)
    ]

    # Order and positions: estimated from the instance images, or the checkpoint's.
    if resume_path is None:
        loss = DiffusionLoss(base.unet, base.scheduler, prompts, snr_gamma=args.snr_gamma)
        magnify = 1024.0 if weight_dtype == torch.float16 else 1.0  # the prior's size does not matter, underflow does
        with phases("estimate") as say:
            batches = estimate_batches(args, streams[0], sources[0], accelerator)

            def loss_of(batch: list[Sample]) -> torch.Tensor:
                with accelerator.autocast():
                    return loss(batch) * magnify

            bar = tqdm(batches, desc="estimate", disable=not accelerator.is_main_process)
            try:
                prior = estimate_prior(
                    list(components.values()), loss_of, bar, estimate=args.estimate, adapter_name=ADAPTER
                )
            except ValueError as error:
                raise Diverged(str(error)) from None
            say(f"{args.estimate}, {args.estimate_draws} draws of {len(sources[0])} images")
        with phases("rearrange") as say:
            place_from_prior(list(components.values()), prior, adapter_name=ADAPTER, progress=True)
            say(f"{len(prior)} layers")
            del prior

    trainable = [p for model in components.values() for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trainable)
    rate = args.learning_rate
    if args.scale_lr:
        rate *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    optimizer = make_optimizer(args, trainable, rate)
    scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=total_steps(args, len(sources[0]), accelerator.num_processes),
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    prepared = accelerator.prepare(*components.values(), optimizer)
    trained, optimizer = prepared[:-1], prepared[-1]
    if args.train_text_encoder:
        prompts.text_encoder = trained[1]
    # Stepped once a step by the loop itself: a prepared scheduler would count processes.
    accelerator.register_for_checkpointing(scheduler)
    checkpoints = Checkpoints(accelerator, output_dir, components, args.checkpoints_total_limit)
    state = TrainingState()
    if resume_path is not None:
        state = checkpoints.load(resume_path)
        logger.info("Resuming from %s, after step %d.", resume_path, state.step)
    state.flags = run_flags(args)
    accelerator.init_trackers("dreambooth-s2ft", config=state.flags)

    loss = DiffusionLoss(trained[0], base.scheduler, prompts, snr_gamma=args.snr_gamma)
    steps = total_steps(args, len(sources[0]), accelerator.num_processes)
    epoch_steps = math.ceil(
        len(sources[0]) / (args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes)
    )
    validate = Validation(args, plan, base, accelerator, output_dir)
    with phases("train") as say, deferred_interrupt() as interrupted:
        bar = tqdm(range(steps), initial=state.step, desc="train", disable=not accelerator.is_main_process)
        for step in range(state.step, steps):
            mean = 0.0
            for samples in training_batches(args, step, steps, streams, sources, accelerator):
                with accelerator.accumulate(*trained):
                    with accelerator.autocast():
                        value = loss(samples)
                    accelerator.backward(value)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(trainable, args.max_grad_norm)
                        if accelerator.scaler is None and not torch.isfinite(norm):
                            raise Diverged(f"The gradient is not finite at step {step + 1}. {last_good(checkpoints)}")
                    optimizer.step()
                    optimizer.zero_grad()
                mean += accelerator.reduce(value.detach(), "mean").item() / args.gradient_accumulation_steps
            if not math.isfinite(mean):
                raise Diverged(f"The loss is {mean} at step {step + 1}. {last_good(checkpoints)}")
            scheduler.step()
            state.step = step + 1
            state.losses.append(mean)
            accelerator.log({"loss": mean, "lr": scheduler.get_last_lr()[0]}, step=state.step)
            bar.set_postfix(loss=f"{mean:.4f}", lr=f"{scheduler.get_last_lr()[0]:.1e}")
            bar.update()
            asked = torch.tensor(float(interrupted()), device=accelerator.device)
            stop = accelerator.reduce(asked, "sum").item() > 0  # every process stops at the same step
            if stop or state.step % args.checkpointing_steps == 0:
                saved = checkpoints.save(state)
                if stop:
                    raise Interrupted(f"Stopped after step {state.step}; {saved} is complete.")
            if (
                args.validation_prompt
                and state.step < steps
                and state.step % (args.validation_epochs * epoch_steps) == 0
            ):
                validate(f"step-{state.step:06d}", state.step)
        bar.close()
        tenth = max(1, steps // 10)
        facts = {
            "steps": steps,
            "learning_rate": rate,
            "batch": args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes,
            "preset": args.preset,
            "targets": args.targets,
            "estimate": args.estimate,
            "seed": args.seed,
            "resolution": plan.resolution,
            "trainable": numbers,
            "share": numbers / total,
            "loss_first": sum(state.losses[:tenth]) / tenth,
            "loss_last": sum(state.losses[-tenth:]) / tenth,
        }
        say(f"{steps} steps, loss {facts['loss_first']:.4f} -> {facts['loss_last']:.4f} on equal draws")

    if accelerator.is_main_process:  # before anything else can fail
        adapter = collect_adapter(components, ADAPTER, describe(args, facts, []))
        write_adapter(output_dir / WEIGHTS_NAME, adapter, args.adapter_dtype)
    images: list[Image.Image] = []
    if args.validation_prompt:
        with phases("validate") as say:
            images = validate("final", steps)
            say(f"{args.num_validation_images} images of {args.validation_prompt!r}")

    with phases("save") as say:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            bar = tqdm(total=2 + args.push_to_hub, desc="save")
            adapter = collect_adapter(components, ADAPTER, describe(args, facts, images))
            path = output_dir / WEIGHTS_NAME
            size = write_adapter(path, adapter, args.adapter_dtype)
            bar.update()
            write_model_card(output_dir, args, adapter, size, facts["share"])
            report = {**facts, "seconds": phases.seconds, "adapter": str(path), "adapter_bytes": size}
            write_text(output_dir / "training.json", json.dumps(report, indent=2))
            bar.update()
            if args.push_to_hub:
                say(f"uploaded to {push(output_dir, args)}")
                bar.update()
            bar.close()
            say(f"{path}, {size:,} bytes, {numbers:,} trainable numbers, {facts['share']:.3%} of the model")
            snippet = usage_snippet(args.pretrained_model_name_or_path, str(path))
            logger.info("Load it with:\n%s", snippet)
    accelerator.end_training()


def total_steps(args, images: int, processes: int) -> int:
    if args.num_train_epochs is None:
        return args.max_train_steps or DEFAULT_STEPS
    batch = args.train_batch_size * args.gradient_accumulation_steps * processes
    return args.num_train_epochs * math.ceil(images / batch)


def estimate_batches(args, stream: DrawStream, source: LatentSource, accelerator: Accelerator) -> list[list[Sample]]:
    """One draw a batch, shared out over the processes; for "full", each step's batch has one draw of every image, and
    every process takes the same steps (Adam does not mind that their gradients are added)."""
    draws = stream.stratified(args.estimate_draws)
    size = stream.count if args.estimate == "full" else 1
    batches = [draws[i : i + size] for i in range(0, len(draws), size)]
    if args.estimate != "full":
        batches = batches[accelerator.process_index :: accelerator.num_processes]
    return [[(draw, source, args.instance_prompt, 1.0) for draw in batch] for batch in batches]


def training_batches(
    args, step: int, steps: int, streams: list[DrawStream], sources: list[LatentSource], accelerator: Accelerator
) -> Iterator[list[Sample]]:
    """The micro-batches of one optimizer step for this process; with class images, each has as many of both."""
    prompts = (args.instance_prompt, args.class_prompt)
    weights = (2.0, 2.0 * args.prior_loss_weight) if len(sources) == 2 else (1.0,)
    for micro in range(args.gradient_accumulation_steps):
        slots = list(
            process_slots(
                replayed(step, steps),
                micro,
                args.train_batch_size,
                args.gradient_accumulation_steps,
                accelerator.num_processes,
                accelerator.process_index,
            )
        )
        yield [
            (stream.sample(number), source, prompt, weight)
            for stream, source, prompt, weight in zip(streams, sources, prompts, weights, strict=False)
            for number in slots
        ]


def make_optimizer(args, parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    return AdamW(
        parameters,
        lr=rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


class Validation:
    """Sample images with the adapter as it is, from generators of their own: training does not notice."""

    def __init__(self, args, plan: BasePlan, base: Base, accelerator: Accelerator, output_dir: Path) -> None:
        self.args, self.plan, self.base, self.accelerator = args, plan, base, accelerator
        self.folder = output_dir / "validation"

    @torch.no_grad()
    def __call__(self, name: str, step: int) -> list[Image.Image]:
        if not self.accelerator.is_main_process:
            return []
        args = self.args
        self.base.vae.to(self.accelerator.device)
        pipeline = self.base.pipeline(self.plan)
        pipeline.set_progress_bar_config(desc="validate", leave=False)
        with self.accelerator.autocast():
            images = pipeline(
                [args.validation_prompt] * args.num_validation_images,
                height=self.plan.resolution,
                width=self.plan.resolution,
                generator=[seeded(args.seed, "validation", i) for i in range(args.num_validation_images)],
            ).images
        self.folder.mkdir(exist_ok=True)
        for stale in self.folder.glob(f"{name}-*.png"):
            stale.unlink()
        for i, image in enumerate(images):
            image.save(self.folder / f"{name}-{i}.png")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.stack([np.asarray(i) for i in images])}, step=step, **layout)
        return images


def describe(args, facts: dict, images: list[Image.Image]) -> AdapterInfo:
    """What the file says about itself. The date is the day's (or SOURCE_DATE_EPOCH's), so that equal runs make equal
    files."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    words = folder_words(args.instance_dir)
    return AdapterInfo(
        base_model=args.pretrained_model_name_or_path,
        instance_prompt=args.instance_prompt,
        subject=words,
        class_name=args.class_prompt.removeprefix("a photo of ").removeprefix("a ") if args.class_prompt else words,
        date=str(date.fromtimestamp(int(epoch)) if epoch else date.today()),
        training=facts,
        thumbnail=make_thumbnail(images[0]) if images else None,
    )


def last_good(checkpoints: Checkpoints) -> str:
    present = list_checkpoints(checkpoints.output_dir)
    if not present:
        return "There is no checkpoint yet; try a lower --learning_rate."
    return f"The last good checkpoint is {present[-1]}, and its adapter loads; train anew with a lower --learning_rate."


class deferred_interrupt:
    """While training, Ctrl-C and SIGTERM wait for the end of the step; called, it says whether one came."""

    def __enter__(self) -> Callable[[], bool]:
        self.came = False
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return lambda: self.came

    def _note(self, number: int, frame: object) -> None:
        self.came = True

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    program = Path(__file__).name
    try:
        main()
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as error:
        print(f"{program}: {error} Go on with --resume_from_checkpoint latest.", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print(f"{program}: stopped; what was written so far is complete.", file=sys.stderr)
        sys.exit(130)
