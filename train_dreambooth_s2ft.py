"""Train an S2FT adapter on a handful of photos of one subject.

    accelerate launch train_dreambooth_s2ft.py --instance_dir dog/

The recipe, top to bottom: check the input, load the base, make class images, estimate the weight change, rearrange,
train, sample, save. Its parts are in `s2ft_diffusion.dreambooth`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import cast_training_params
from torch import nn
from tqdm.auto import tqdm

from s2ft_diffusion.adapters.file import WEIGHTS_NAME, collect_adapter, write_adapter
from s2ft_diffusion.dreambooth.arguments import parse_arguments
from s2ft_diffusion.dreambooth.base import Base, BasePlan, load_base, plan_base
from s2ft_diffusion.dreambooth.batches import (
    Sample,
    estimate_batches,
    estimate_draws,
    images_per_step,
    steps_per_epoch,
    total_steps,
    training_batches,
)
from s2ft_diffusion.dreambooth.checkpoints import (
    ADAPTER,
    Checkpoints,
    TrainingState,
    clear_checkpoints,
    prepare_output_dir,
    read_state,
    run_flags,
)
from s2ft_diffusion.dreambooth.class_images import class_image_paths, ensure_class_images, present_class_images
from s2ft_diffusion.dreambooth.draws import DrawStream, replayed
from s2ft_diffusion.dreambooth.errors import Diverged, InputError, Interrupted
from s2ft_diffusion.dreambooth.images import SquareImages, find_images, fingerprints, load_image
from s2ft_diffusion.dreambooth.loss import DiffusionLoss, LatentSource
from s2ft_diffusion.dreambooth.optimizer import make_optimizer
from s2ft_diffusion.dreambooth.phases import PROGRESS_NAME, Phases
from s2ft_diffusion.dreambooth.process import (
    deferred_interrupt,
    exit_codes,
    make_accelerator,
    set_up_logging,
    weight_dtype,
)
from s2ft_diffusion.dreambooth.prompts import Prompts
from s2ft_diffusion.dreambooth.publish import (
    describe,
    open_repository,
    push,
    usage_snippet,
    write_model_card,
    write_text,
)
from s2ft_diffusion.dreambooth.validation import Validation
from s2ft_diffusion.tuner.prior import estimate_prior, place_from_prior

logger = logging.getLogger("train_dreambooth_s2ft")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    set_up_logging()

    # Everything that can be wrong with the input is found before a model is loaded.
    instance_paths = find_images(args.instance_dir)
    for path in instance_paths:
        load_image(path)
    if args.with_prior_preservation:
        present_class_images(Path(args.class_data_dir))
    args.images = fingerprints(instance_paths)
    resume_path = prepare_output_dir(args)
    plan = plan_base(args)
    output_dir = Path(args.output_dir)

    accelerator = make_accelerator(args)
    dtype = weight_dtype(accelerator)
    steps = total_steps(args, len(instance_paths), accelerator)
    if resume_path is not None and (done := read_state(resume_path).step) > steps:
        raise InputError(f"{resume_path} is after step {done}, the run is to have {steps}.")
    args.hub_repository = None
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_repository = open_repository(output_dir, args)
    progress_file = output_dir / PROGRESS_NAME if accelerator.is_main_process else None
    phases = Phases(logger, progress_file, anew=resume_path is None)
    if not args.prompt_was_given:
        logger.info("The instance prompt is %r; choose another with --instance_prompt.", args.instance_prompt)

    with phases("load") as say:
        base = load_base(plan)
        for model in (base.vae, base.text_encoder, base.unet):
            model.to(accelerator.device, dtype)
        if args.enable_xformers_memory_efficient_attention:
            base.unet.enable_xformers_memory_efficient_attention()
        base_size = sum(p.numel() for name in plan.configs for p in getattr(base, name).parameters())
        say(f"{plan.name}, {' and '.join(plan.configs)} of {base_size:,} parameters, {len(instance_paths)} images")

    sources = [LatentSource(SquareImages(instance_paths, plan.resolution, center_crop=args.center_crop), base.vae)]
    if args.with_prior_preservation:
        with phases("class images") as say:
            folder = Path(args.class_data_dir)
            made = ensure_class_images(folder, args, plan, accelerator)
            paths = class_image_paths(folder, args.num_class_images)
            sources.append(LatentSource(SquareImages(paths, plan.resolution, center_crop=args.center_crop), base.vae))
            say(f"{made} generated, {len(paths)} in use")
    cached = [source.keep_all((False, True) if args.random_flip else (False,)) for source in sources]
    if all(cached) and accelerator.device.type == "cuda":
        base.vae.to("cpu")  # back for sampling
    streams = [
        DrawStream(name, args.seed, len(source), plan.latent_shape, random_flip=args.random_flip)
        for name, source in zip(("instance", "class"), sources, strict=False)
    ]

    components = add_adapters(args, plan, base)
    prompts = Prompts(base.tokenizer, base.text_encoder, args.tokenizer_max_length, live=args.train_text_encoder)
    if resume_path is None:  # else order and positions are the checkpoint's
        loss = DiffusionLoss(base.unet, base.scheduler, prompts, snr_gamma=args.snr_gamma)
        args.estimate_draws = estimate_draws(args, len(sources[0]), accelerator)
        with phases("estimate") as say:
            batches = estimate_batches(args, streams[0], sources[0], accelerator)
            prior = estimate(args, components, loss, batches, accelerator)
            say(f"{args.estimate}, {args.estimate_draws} draws of {len(sources[0])} images")
        with phases("rearrange") as say:
            place_from_prior(list(components.values()), prior, adapter_name=ADAPTER, progress=True)
            say(f"{len(prior)} layers")
            del prior

    trainable = [p for model in components.values() for p in model.parameters() if p.requires_grad]
    optimizer, scheduler = make_optimizer(args, trainable, images_per_step(args, accelerator), steps)
    *trained, optimizer = accelerator.prepare(*components.values(), optimizer)
    if args.train_text_encoder:
        prompts.text_encoder = trained[1]
    # Stepped once a step by the loop itself: a prepared scheduler would count processes.
    accelerator.register_for_checkpointing(scheduler)
    checkpoints = Checkpoints(accelerator, output_dir, components, args.checkpoints_total_limit)
    state = TrainingState()
    if resume_path is not None:
        state = checkpoints.load(resume_path)
        logger.info("Resuming from %s, after step %d.", resume_path, state.step)
        for name in ("estimate", "estimate_draws"):  # as it was made, whatever is asked for now
            setattr(args, name, state.flags.get(name, getattr(args, name)))
    state.flags = run_flags(args)
    accelerator.init_trackers("dreambooth-s2ft", config=state.flags)

    if accelerator.is_main_process and args.overwrite_output_dir:  # now that nothing is in the way of new ones
        clear_checkpoints(output_dir)
    loss = DiffusionLoss(trained[0], base.scheduler, prompts, snr_gamma=args.snr_gamma)
    validate = Validation(args, plan, base, accelerator)
    validation_steps = args.validation_epochs * steps_per_epoch(args, len(sources[0]), accelerator)
    meaning = "Stopping after this step; a checkpoint follows. Wait for the line that says it is complete."
    with phases("train") as say, deferred_interrupt(meaning) as interrupted:
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
                            raise Diverged(f"The gradient is not finite at step {step + 1}. {checkpoints.last_good()}")
                    optimizer.step()
                    optimizer.zero_grad()
                mean += accelerator.reduce(value.detach(), "mean").item() / args.gradient_accumulation_steps
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
            if stop or state.step % args.checkpointing_steps == 0:
                saved = checkpoints.save(state)
                if stop:
                    raise Interrupted(f"Stopped after step {state.step}; {saved} is complete.")
            if state.step < steps and state.step % validation_steps == 0:
                phases.note(images=[str(path) for path in validate(f"step-{state.step:06d}", state.step)])
        bar.close()
        tenth = max(1, steps // 10)
        facts = {
            "steps": steps,
            "learning_rate": optimizer.defaults["lr"],
            "batch": images_per_step(args, accelerator),
            "preset": args.preset,
            "targets": args.targets,
            "estimate": args.estimate,
            "estimate_draws": args.estimate_draws,
            "seed": args.seed,
            "resolution": plan.resolution,
            "trainable": sum(p.numel() for p in trainable),
            "share": sum(p.numel() for p in trainable) / base_size,
            "loss_first": sum(state.losses[:tenth]) / tenth,
            "loss_last": sum(state.losses[-tenth:]) / tenth,
        }
        equal = " on equal draws" if replayed(steps - 1, steps) != steps - 1 else ""
        say(f"{steps} steps, loss {facts['loss_first']:.4f} -> {facts['loss_last']:.4f}{equal}")

    path = output_dir / WEIGHTS_NAME
    if accelerator.is_main_process:  # before anything else can fail
        write_adapter(path, collect_adapter(components, ADAPTER, describe(args, facts)), args.adapter_dtype)
    samples = []
    if args.validation_prompt:
        with phases("validate") as say:
            samples = validate("final", steps)
            phases.note(images=[str(path) for path in samples])
            say(f"{args.num_validation_images} images of {args.validation_prompt!r}")

    with phases("save") as say:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            bar = tqdm(total=2 + args.push_to_hub, desc="save")
            adapter = collect_adapter(components, ADAPTER, describe(args, facts, samples))
            size, error = write_adapter(path, adapter, args.adapter_dtype)
            bar.update()
            write_model_card(output_dir, args, adapter, size, facts["share"], samples)
            written = {"adapter": str(path), "adapter_bytes": size, "adapter_error": error}
            report = {**facts, "seconds": phases.seconds, **written}
            write_text(output_dir / "training.json", json.dumps(report, indent=2))
            bar.update()
            if args.push_to_hub:
                say(f"uploaded to {push(output_dir, args, samples)}")
                bar.update()
            bar.close()
            say(f"{path}, {size:,} bytes, {facts['trainable']:,} trainable numbers, {facts['share']:.3%} of the model")
            say(f"{args.adapter_dtype} coefficients change the weight change by {error:.1e}")
            logger.info("Load it with:\n%s", usage_snippet(args.pretrained_model_name_or_path, str(path)))
    accelerator.end_training()


def add_adapters(args: argparse.Namespace, plan: BasePlan, base: Base) -> dict[str, nn.Module]:
    """Put fresh adapters into what trains; returns those models by component name."""
    components = {name: getattr(base, name) for name in plan.configs}
    for name, model in components.items():
        model.add_adapter(plan.configs[name], ADAPTER)
        cast_training_params(model, dtype=torch.float32)
    if args.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            base.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
            base.text_encoder.train()  # transformers checkpoints no model that is not in training
    return components


def estimate(
    args: argparse.Namespace,
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
        return estimate_prior(list(components.values()), magnified, bar, estimate=args.estimate, adapter_name=ADAPTER)
    except ValueError as error:
        raise Diverged(str(error)) from None


if __name__ == "__main__":
    with exit_codes(Path(__file__).name):
        main()
