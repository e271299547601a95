"""Train an S2FT adapter on a handful of photos of one subject.

    accelerate launch train_dreambooth_s2ft.py --instance_dir dog/

The recipe, top to bottom: check the input, load the base, make class images, estimate the weight change, rearrange,
train, sample, save. Its parts are in `s2ft_diffusion.dreambooth`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import cast_training_params
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from s2ft_diffusion.adapters.file import WEIGHTS_NAME, collect_adapter, write_adapter
from s2ft_diffusion.dreambooth.arguments import parse_arguments
from s2ft_diffusion.dreambooth.base import BasePlan, load_base, plan_base
from s2ft_diffusion.dreambooth.batches import (
    Layout,
    Pictures,
    Sample,
    estimate_batches,
    estimate_draws,
    training_batches,
)
from s2ft_diffusion.dreambooth.captions import read_captions
from s2ft_diffusion.dreambooth.checkpoints import (
    ADAPTER,
    Checkpoints,
    TrainingState,
    clear_checkpoints,
    prepare_output_dir,
    read_state,
)
from s2ft_diffusion.dreambooth.class_images import class_image_paths, ensure_class_images, present_class_images
from s2ft_diffusion.dreambooth.draws import DrawStream, replayed
from s2ft_diffusion.dreambooth.images import SquareImages, find_images, fingerprints, load_image
from s2ft_diffusion.dreambooth.loss import DiffusionLoss, LatentSource
from s2ft_diffusion.dreambooth.memory import check_memory, run_memory
from s2ft_diffusion.dreambooth.optimizer import check_schedule, make_optimizer
from s2ft_diffusion.dreambooth.phases import PROGRESS_NAME, Phases
from s2ft_diffusion.dreambooth.process import (
    deferred_interrupt,
    exit_codes,
    make_accelerator,
    set_up_logging,
    weight_dtype,
)
from s2ft_diffusion.dreambooth.prompts import Prompts, check_prompts
from s2ft_diffusion.dreambooth.publish import describe, open_repository, publish, usage_snippet
from s2ft_diffusion.dreambooth.settings import ComputeSettings, EstimateSettings, PhotoSettings, Settings
from s2ft_diffusion.dreambooth.validation import Validation
from s2ft_diffusion.errors import Diverged, InputError, Interrupted
from s2ft_diffusion.families import Family
from s2ft_diffusion.families.offloading import offload_blocks
from s2ft_diffusion.families.quantization import parameter_count
from s2ft_diffusion.families.sharding import shard_blocks
from s2ft_diffusion.pipelines.attach import inject_adapter
from s2ft_diffusion.tuner.estimate import NotFiniteError
from s2ft_diffusion.tuner.prior import estimate_prior, place_from_prior

logger = logging.getLogger("train_dreambooth_s2ft")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_arguments(argv)
    set_up_logging()

    # Everything that can be wrong with the input is found before a model is loaded.
    photo_paths = check_images(settings)
    flags = {**settings.flags, "images": fingerprints(photo_paths)}
    resume_path = prepare_output_dir(settings.output_dir, settings.checkpoints, flags)
    lora, resolution = settings.lora_rank is not None, settings.photos.resolution
    plan = plan_base(settings.base, settings.adapter, resolution, settings.seed, settings.loss, lora=lora)
    captions = read_captions(photo_paths, settings.photos.prompt)
    check_prompts(settings, captions)
    accelerator = make_accelerator(settings)
    main_process = accelerator.is_main_process
    processes = accelerator.num_processes, accelerator.process_index
    layout = Layout.of(settings.length, len(photo_paths), *processes)
    check_schedule(settings.optimizer, layout.steps)
    if resume_path is not None and (done := read_state(resume_path).step) > layout.steps:
        raise InputError(f"{resume_path} is after step {done}, the run is to have {layout.steps}.")
    say_memory(settings, plan, accelerator)
    if settings.dry_run:
        return
    repository = open_repository(settings.output_dir, settings.hub) if settings.hub and main_process else None
    progress_file = settings.output_dir / PROGRESS_NAME if main_process else None
    phases = Phases(logger, progress_file, anew=resume_path is None)
    if not flags["prompt_was_given"]:
        logger.info("The instance prompt is %r; choose another with --instance_prompt.", settings.photos.prompt)

    with phases("load") as say:
        base = load_base(plan, weight_dtype(accelerator), settings.compute.quantize, accelerator.device)
        components = {name: getattr(base.pipeline, name) for name in plan.configs}
        if settings.compute.xformers:
            components[base.denoiser].enable_xformers_memory_efficient_attention()
        base_size = sum(map(parameter_count, components.values()))
        name = f"{base.pipeline_class} {settings.base.name}"
        say(f"{name}, {' and '.join(components)} of {base_size:,} parameters, {len(photo_paths)} images")
        if plan.left_out:
            say(f"left out, since they cannot reach the output: {', '.join(plan.left_out)}")

    photos = settings.photos
    sets = [pictures("instance", photo_paths, captions, 1.0, photos, plan, base, settings.seed)]
    if classes := settings.classes:
        with phases("class images") as say:
            made = ensure_class_images(classes, plan, settings.compute, settings.seed, accelerator)
            paths = class_image_paths(classes.folder, classes.count)
            words = [classes.prompt] * len(paths)
            sets.append(pictures("class", paths, words, classes.weight, photos, plan, base, settings.seed))
            say(f"{made} generated, {len(paths)} in use")
    base.bring("vae")  # one after the other: the device need not hold all models at once
    cached = [each.source.keep_all((False, True) if photos.random_flip else (False,)) for each in sets]
    if all(cached):
        base.put_away("vae")
    prompts = read_prompts(settings, base, sets)
    if settings.compute.offload:
        offload_blocks(components[base.denoiser], accelerator.device)
    if sharded := settings.compute.shard > 1:
        shard_blocks(components[base.denoiser], accelerator.device)
    base.bring(base.denoiser)

    add_adapters(components, plan, settings.compute)
    loss = DiffusionLoss(components, base, plan.objective, prompts)
    draws = estimate_draws(settings.estimate, layout, len(photo_paths))
    flags |= {"estimate_draws": draws}
    if resume_path is None:  # else order and positions are the checkpoint's
        with phases("estimate") as say:
            batches = estimate_batches(settings.estimate, layout, sets[0].stream, sets[0].source, captions)
            prior = estimate(settings.estimate, components, loss, batches, accelerator)
            say(f"{settings.estimate.kind}, {draws} draws of {len(photo_paths)} images")
        with phases("rearrange") as say:
            place_from_prior(list(components.values()), prior, adapter_name=ADAPTER, progress=True)
            say(f"{len(prior)} layers")
            del prior

    trainable = [p for model in components.values() for p in model.parameters() if p.requires_grad]
    optimizer, scheduler = make_optimizer(settings.optimizer, trainable, layout.images_per_step, layout.steps)
    if sharded:  # accelerate has no plain data parallelism beside shared weights
        loss, optimizer = DistributedDataParallel(loss, broadcast_buffers=False), accelerator.prepare(optimizer)
    else:
        loss, optimizer = accelerator.prepare(loss, optimizer)
    # Stepped once a step by the loop itself: a prepared scheduler would count processes.
    accelerator.register_for_checkpointing(scheduler)
    checkpoints = Checkpoints(accelerator, settings.output_dir, components, settings.checkpoints.limit)
    state = resume(checkpoints, resume_path, flags)
    accelerator.init_trackers("dreambooth-s2ft", config=state.flags)
    if main_process and settings.checkpoints.overwrite:  # now that nothing is in the way of new ones
        clear_checkpoints(settings.output_dir)

    folder = settings.output_dir / "validation"
    validate = Validation(settings.validation, folder, settings.seed, plan.resolution, base, accelerator, sharded)
    with phases("train") as say:
        train(settings, layout, sets, loss, optimizer, scheduler, checkpoints, state, phases, validate)
        facts = training_facts(settings, layout, plan, state, optimizer.defaults["lr"], trainable, base_size)
        equal = " on equal draws" if replayed(layout.steps - 1, layout.steps) != layout.steps - 1 else ""
        say(f"{layout.steps} steps, loss {facts['loss_first']:.4f} -> {facts['loss_last']:.4f}{equal}")

    path = settings.output_dir / WEIGHTS_NAME
    if main_process:  # before anything else can fail
        try:
            write_adapter(path, collect_adapter(components, ADAPTER, describe(settings, facts)), settings.dtype)
        except ValueError as error:  # the last step's numbers, which no loss has seen
            raise Diverged(f"{error} {checkpoints.last_good()}") from None
    samples = []
    if settings.validation:
        with phases("validate") as say:
            samples = validate("final", layout.steps)
            phases.note(images=[str(sample) for sample in samples])
            say(f"{settings.validation.images} images of {settings.validation.prompt!r}")
    with phases("save") as say:
        accelerator.wait_for_everyone()
        if main_process:
            adapter = collect_adapter(components, ADAPTER, describe(settings, facts, samples))
            size, error = publish(path, settings, adapter, facts, phases.seconds, samples, repository)
            if repository:
                say(f"uploaded to {repository}")
            say(f"{path}, {size:,} bytes, {facts['trainable']:,} trainable numbers, {facts['share']:.3%} of the model")
            say(f"{settings.dtype} coefficients change the weight change by {error:.1e}")
            logger.info("Load it with:\n%s", usage_snippet(settings.base.name, str(path)))
    accelerator.end_training()


def check_images(settings: Settings) -> list[Path]:
    """The photos, all of which can be read, as can the class images that are there; raises InputError."""
    paths = find_images(settings.photos.folder)
    for path in paths:
        load_image(path)
    if settings.classes:
        present_class_images(settings.classes.folder)
    return paths


def say_memory(settings: Settings, plan: BasePlan, accelerator: Accelerator) -> None:
    """Say what a run on a GPU needs; raises InputError where that is more than there is."""
    on_gpu = accelerator.device.type == "cuda"
    if not (settings.dry_run or on_gpu):
        return
    needed = run_memory(plan, settings, weight_dtype(accelerator))
    logger.info("The run needs %s.", needed)
    if on_gpu and settings.compute.check and not settings.dry_run:
        check_memory(needed, accelerator.device, settings)


def pictures(
    name: str,
    paths: list[Path],
    prompts: Sequence[str],
    weight: float,
    photos: PhotoSettings,
    plan: BasePlan,
    base: Family,
    seed: int,
) -> Pictures:
    """Images to train on, with their latents and draws; all are cropped and mirrored as the photos are."""
    source = LatentSource(SquareImages(paths, plan.resolution, center_crop=photos.center_crop), base)
    stream = DrawStream(name, seed, len(source), plan.latent_shape, random_flip=photos.random_flip)
    return Pictures(source, stream, prompts, weight)


def read_prompts(settings: Settings, base: Family, sets: Sequence[Pictures]) -> Prompts:
    """What the denoiser is told, encoded once unless text encoders train; they are on the device for no longer."""
    encoders = base.text_encoders
    base.bring(*encoders)
    prompts = Prompts(base, live=settings.adapter.train_text_encoder)
    if not prompts.live:
        for prompt in (prompt for each in sets for prompt in each.prompts):
            prompts(prompt)
        base.put_away(*encoders)
        if settings.validation is None:
            base.drop(*encoders)
    return prompts


def add_adapters(components: dict[str, nn.Module], plan: BasePlan, settings: ComputeSettings) -> None:
    """Put fresh adapters into what trains, in float32."""
    for name, model in components.items():
        inject_adapter(model, plan.configs[name], ADAPTER)
        cast_training_params(model, dtype=torch.float32)
        if settings.gradient_checkpointing and name == plan.family.denoiser:
            model.enable_gradient_checkpointing()
        elif settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers checkpoints no model that is not in training


def estimate(
    settings: EstimateSettings,
    components: dict[str, nn.Module],
    loss: DiffusionLoss,
    batches: list[list[Sample]],
    accelerator: Accelerator,
) -> dict[str, torch.Tensor]:
    """The prior of every adapted layer (Eq. 4), with the training loss; raises Diverged where it is not finite."""
    # The prior's size does not matter, underflow does.
    magnify = 1024.0 if weight_dtype(accelerator) == torch.float16 else 1.0

    def magnified(batch: list[Sample]) -> torch.Tensor:
        with accelerator.autocast():
            return loss(batch) * magnify

    bar = tqdm(batches, desc="estimate", disable=not accelerator.is_main_process)
    try:
        return estimate_prior(list(components.values()), magnified, bar, estimate=settings.kind, adapter_name=ADAPTER)
    except NotFiniteError as error:
        raise Diverged(str(error)) from None


def resume(checkpoints: Checkpoints, path: Path | None, flags: Mapping[str, Any]) -> TrainingState:
    """Load the checkpoint that the run goes on from, if any; returns where it is then."""
    if path is None:
        return TrainingState(flags=dict(flags))
    state = checkpoints.load(path)
    logger.info("Resuming from %s, after step %d.", path, state.step)
    made = {name: state.flags.get(name, flags[name]) for name in ("estimate", "estimate_draws")}
    state.flags = {**flags, **made}  # the estimate as it was made, whatever is asked for now
    return state


def train(
    settings: Settings,
    layout: Layout,
    sets: Sequence[Pictures],
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    checkpoints: Checkpoints,
    state: TrainingState,
    phases: Phases,
    validate: Validation,
) -> None:
    """From the step that `state` is after to the last; raises Diverged, and Interrupted after a checkpoint."""
    accelerator, steps = checkpoints.accelerator, layout.steps
    validation_steps = (
        settings.validation.epochs * layout.steps_per_epoch(len(sets[0].source)) if settings.validation else steps
    )
    meaning = "Stopping after this step; a checkpoint follows. Wait for the line that says it is complete."
    bar = tqdm(range(steps), initial=state.step, desc="train", disable=not accelerator.is_main_process)
    with deferred_interrupt(meaning) as interrupted, bar:
        for step in range(state.step, steps):
            mean = 0.0
            for samples in training_batches(layout, step, sets):
                with accelerator.accumulate(loss):
                    with accelerator.autocast():
                        value = loss(samples)
                    accelerator.backward(value)
                    if accelerator.sync_gradients:
                        parameters = [p for group in optimizer.param_groups for p in group["params"]]
                        norm = accelerator.clip_grad_norm_(parameters, settings.optimizer.max_grad_norm)
                        if accelerator.scaler is None and not torch.isfinite(norm):
                            raise Diverged(f"The gradient is not finite at step {step + 1}. {checkpoints.last_good()}")
                    optimizer.step()
                    optimizer.zero_grad()
                mean += accelerator.reduce(value.detach(), "mean").item() / layout.accumulation
            if not math.isfinite(mean):
                raise Diverged(f"The loss is {mean} at step {step + 1}. {checkpoints.last_good()}")
            scheduler.step()
            state.step = step + 1
            state.losses.append(mean)
            rate = scheduler.get_last_lr()[0]
            accelerator.log({"loss": mean, "lr": rate}, step=state.step)
            phases.note(step=state.step, steps=steps, loss=round(mean, 6), lr=rate)
            bar.set_postfix(loss=f"{mean:.4f}", lr=f"{rate:.1e}")
            bar.update()
            asked = torch.tensor(float(interrupted()), device=accelerator.device)
            stop = accelerator.reduce(asked, "sum").item() > 0  # every process stops at the same step
            # Before the checkpoint: a run that goes on from it makes no more samples of this step.
            if settings.validation and state.step < steps and state.step % validation_steps == 0:
                phases.note(images=[str(path) for path in validate(f"step-{state.step:06d}", state.step)])
            if stop or state.step % settings.checkpoints.every == 0:
                saved = checkpoints.save(state)
                if stop:
                    raise Interrupted(f"Stopped after step {state.step}; {saved} is complete.")


def training_facts(
    settings: Settings,
    layout: Layout,
    plan: BasePlan,
    state: TrainingState,
    rate: float,
    trainable: Sequence[nn.Parameter],
    base_size: int,
) -> dict[str, Any]:
    """What the adapter's file and `training.json` say of the run."""
    tenth = max(1, layout.steps // 10)
    numbers = sum(p.numel() for p in trainable)
    return {
        "steps": layout.steps,
        "learning_rate": rate,
        "batch": layout.images_per_step,
        "preset": settings.adapter.preset,
        "targets": settings.adapter.targets,
        "estimate": state.flags["estimate"],
        "estimate_draws": state.flags["estimate_draws"],
        "seed": settings.seed,
        "resolution": plan.resolution,
        "trainable": numbers,
        "share": numbers / base_size,
        "loss_first": sum(state.losses[:tenth]) / tenth,
        "loss_last": sum(state.losses[-tenth:]) / tenth,
    }


if __name__ == "__main__":
    with exit_codes(Path(__file__).name):
        main()
