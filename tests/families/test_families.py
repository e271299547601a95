"""What a family says, beside what its pipeline does: the inputs of the denoiser, latents, losses and targets."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from s2ft_diffusion.dreambooth.base import load_base, plan_base
from s2ft_diffusion.dreambooth.settings import AdapterSettings, BaseSettings, LossSettings
from s2ft_diffusion.dreambooth.validation import Validation
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.families import FAMILIES, Family
from s2ft_diffusion.families.objectives import FlowObjective
from s2ft_diffusion.pipelines.targets import attention_targets
from tests.families.pipelines import COMPONENTS, SIDE

PROMPT = "a photo of sks dog"
ALL = list(COMPONENTS)
FEW = {"n_frequency": 0.1}
NOISE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline")
FLOW = [name for name in ALL if name not in NOISE]
TEXT = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline")


def test_every_family_has_a_tiny_pipeline() -> None:
    assert set(FAMILIES) == set(COMPONENTS)


def plan(folder, targets="blocks", **settings):
    base = BaseSettings(str(folder))
    side = SIDE.get(folder.name, 16)
    return plan_base(base, AdapterSettings(targets=targets, options=FEW, **settings), side, 0)


class Recorded(Exception):
    """Ends a generation at the denoiser's first call."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


def record(model: torch.nn.Module, call) -> dict[str, Any]:
    """The arguments by name that the first call of a model within `call` has, but for empty ones."""
    signature, before = inspect.signature(model.forward), model.forward

    def forward(*args: Any, **kwargs: Any) -> None:
        raise Recorded(signature.bind(*args, **kwargs).arguments)

    model.forward = forward
    try:
        with pytest.raises(Recorded) as caught:
            call()
    finally:
        model.forward = before
    given = {**caught.value.arguments, **caught.value.arguments.pop("kwargs", {})}
    return {name: value for name, value in given.items() if value not in (None, {}) or torch.is_tensor(value)}


def assert_same(one: Any, other: Any, name: str) -> None:
    if isinstance(one, torch.Tensor):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        torch.testing.assert_close(other.expand(one.shape).to(one.dtype), one, rtol=1e-6, atol=1e-6, msg=name)
    elif isinstance(one, dict):
        assert set(one) == set(other), name
        for key in one:
            assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for a, b in zip(one, other, strict=True):
            assert_same(a, b, name)
    else:
        assert one == other, name


@pytest.mark.parametrize("name", ALL)
def test_the_denoiser_is_given_what_the_pipeline_gives_it(saved, name) -> None:
    """At a time in the middle, from the same latents and words: every argument is equal."""
    planned = plan(saved(name))
    base = load_base(planned)
    pipe = base.pipeline
    denoiser = getattr(pipe, base.denoiser)
    time = {"timesteps": [600]} if name in NOISE else {"sigmas": [0.6]}
    options = {**base.call(side=planned.resolution), "num_inference_steps": 1, **time}
    if base.guidance_name != "guidance_scale" or not getattr(denoiser.config, "guidance_embeds", False):
        options[base.guidance_name] = 0.0 if name == "ZImagePipeline" else 1.0  # one prompt, no negative one beside it
    theirs = record(denoiser, lambda: pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(3), **options))
    latents = torch.randn(1, *planned.latent_shape, generator=torch.Generator().manual_seed(3))
    timestep = pipe.scheduler.timesteps[:1]
    conditions = base.collate([base.encode_prompt(PROMPT)])
    ours = record(denoiser, lambda: base.predict(denoiser, latents, timestep, conditions))
    ignored = {"return_dict"}
    assert set(ours) - ignored == set(theirs) - ignored
    for argument in set(theirs) - ignored:
        if argument == "timestep" and theirs[argument].ndim == 0:  # U-Nets broadcast it themselves
            ours[argument] = ours[argument][0]
        assert_same(theirs[argument], ours[argument], f"{name}: {argument}")


def test_a_device_without_an_index_is_the_one_with_its_own(saved, monkeypatch) -> None:
    """A single process has "cuda", and models that are there say "cuda:0"."""
    base = load_base(plan(saved("StableDiffusionPipeline")), device=torch.device("cuda"))
    models = [base.pipeline.unet, base.vae, base.pipeline.text_encoder]
    assert set(base.away()) == set(models)
    for kind in {type(model) for model in models}:
        monkeypatch.setattr(kind, "device", property(lambda self: torch.device("cuda", 0)))
    assert base.vae.device != base.device
    assert base.away() == []


def test_the_autoencoder_of_a_run_in_float16_is_in_float32(saved, tmp_path) -> None:
    base = load_base(plan(saved("StableDiffusionXLPipeline")), torch.float16)
    vae, latents = base.vae, torch.randn(1, *plan(saved("StableDiffusionXLPipeline")).latent_shape)
    assert (vae.dtype, base.pipeline.unet.dtype) == (torch.float32, torch.float16)
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(3e5)  # as SDXL's, whose activations float16 cannot hold
        vae.decoder.conv_in.weight.mul_(3e5)
        pixels, decoded = torch.rand(1, 3, 16, 16), vae.decode(latents.half().float()).sample
        validation = Validation(None, tmp_path, 0, 16, base, None)
        with torch.autocast("cpu", torch.float16):
            assert not torch.isfinite(base.moments(pixels)[0]).all()
            with base.exactly():
                assert torch.isfinite(base.moments(pixels)[0]).all()
            with validation._decoding_exactly():
                assert torch.equal(vae.decode(latents.half()).sample, decoded)
    assert "decode" not in vars(vae)


@pytest.mark.parametrize("name", ALL)
def test_latents_decode_to_the_image_they_are_of(saved, name) -> None:
    """`normalize` is undone by the pipeline's own decoding: both are the autoencoder's reconstruction."""
    planned = plan(saved(name))
    base = load_base(planned)
    side = planned.resolution
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = base.moments(pixels)
    latents = base.normalize(mean)
    assert latents.shape == std.shape == planned.latent_shape
    vae = base.vae
    if name == "SanaPipeline":
        raw = vae.encode(pixels).latent
        back = latents[None] / vae.config.scaling_factor
    elif name == "QwenImagePipeline":
        raw = vae.encode(pixels[:, :, None]).latent_dist.mean
        back = latents[None, :, None] * torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        back = back + torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    elif name.startswith("Flux2"):
        raw = vae.encode(pixels).latent_dist.mode()
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
        back = base.pipeline._unpatchify_latents(latents[None] * deviation + vae.bn.running_mean.view(1, -1, 1, 1))
    else:
        raw = vae.encode(pixels).latent_dist.mean
        back = latents[None] / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    torch.testing.assert_close(back, raw, rtol=1e-4, atol=1e-5)


def test_sdxl_latents_with_a_mean_and_a_deviation(saved) -> None:
    base = load_base(plan(saved("StableDiffusionXLPipeline")))
    base.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    mean, deviation = (torch.tensor(base.vae.config[key]).view(4, 1, 1) for key in ("latents_mean", "latents_std"))
    latents = torch.randn(4, 3, 3)
    back = base.normalize(latents) * deviation / base.vae.config.scaling_factor + mean  # the pipeline's decoding
    torch.testing.assert_close(back, latents)


def gradients(base: Family, planned, models: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    for model in models.values():
        model.requires_grad_(True)
    told = base.collate([base.encode_prompt(PROMPT), base.encode_prompt("a red cat in a longer prompt")])
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, *planned.latent_shape, generator=generator) for _ in range(2))
    denoiser = getattr(base.pipeline, base.denoiser)
    predict = lambda noisy, times: base.predict(denoiser, noisy, times, told)  # noqa: E731
    planned.objective(predict, latents, noise, [0.3, 0.7]).mean().backward()
    return {
        f"{component}.{name}": module.weight.grad
        for component, model in models.items()
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    }


@pytest.mark.parametrize("targets", ["qv", "all"])
@pytest.mark.parametrize("name", ALL)
def test_targets_are_the_layers_that_reach_the_output(saved, name, targets) -> None:
    planned = plan(saved(name), targets, train_text_encoder=name in TEXT)
    base = load_base(planned)
    found = gradients(base, planned, {c: getattr(base.pipeline, c) for c in planned.configs})
    chosen = [f"{c}.{layer}" for c, config in planned.configs.items() for layer in config.target_modules]
    dead = [n for n in chosen if found[n] is None or not bool(found[n].abs().max() > 0)]
    assert dead == []
    alive = [n for n in planned.left_out if found[n] is not None and bool(found[n].abs().max() > 0)]
    assert alive == []
    last = {"StableDiffusion3Pipeline": "add_q_proj", "QwenImagePipeline": "add_q_proj"}.get(name)
    assert last is None or any(n.endswith(last) for n in planned.left_out)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("FluxPipeline", ("single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_out",
                          "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.ff_context.net.2")),
        ("Flux2KleinPipeline", ("single_transformer_blocks.0.attn.to_qkv_mlp_proj",
                                "single_transformer_blocks.0.attn.to_out", "transformer_blocks.0.ff.linear_in")),
        ("ZImagePipeline", ("layers.0.feed_forward.w1", "context_refiner.0.attention.to_out.0")),
        ("SanaPipeline", ("transformer_blocks.0.attn2.to_k",)),
        ("QwenImagePipeline", ("transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.0.txt_mlp.net.2")),
        ("PixArtSigmaPipeline", ("transformer_blocks.0.ff.net.0.proj",)),
    ],
)  # fmt: skip
def test_blocks_have_what_is_around_attention(saved, name, wanted) -> None:
    names = plan(saved(name)).configs["transformer"].target_modules
    assert set(wanted) <= set(names)
    assert not [n for n in names if "norm" in n or "modulation" in n or "_mod" in n.split(".")[-2:][0]]


def test_unreachable_layers_are_left_out_by_default(saved) -> None:
    model = load_base(plan(saved("StableDiffusion3Pipeline"))).pipeline.transformer
    assert set(attention_targets(model, "qv", reachable=False)) - set(attention_targets(model, "qv")) == {
        "transformer_blocks.1.attn.add_q_proj"
    }


@pytest.mark.parametrize("name", FLOW)
def test_a_flow_with_the_right_velocity_ends_at_the_latents(saved, name) -> None:
    """One step of the pipeline's kind of scheduler along the objective's target, from its noisy latents, is exact."""
    planned = plan(saved(name))
    objective = planned.objective
    assert isinstance(objective, FlowObjective)
    latents, noise = torch.randn(2, 3, *planned.latent_shape)
    seen = {}

    def perfect(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        seen.update(noisy=noisy, sigmas=(timesteps / 1000).view(-1, 1, 1, 1))
        return noise - latents

    errors = objective(perfect, latents, noise, [0.1, 0.5, 0.9])
    assert float(errors.abs().max()) == 0.0
    torch.testing.assert_close(seen["noisy"] - seen["sigmas"] * (noise - latents), latents, rtol=1e-4, atol=1e-5)


def test_a_dynamic_shift_is_the_pipelines(saved) -> None:
    """The sigmas that are trained on are those that the scheduler samples by at this resolution."""
    planned = plan(saved("FluxPipeline"))
    scheduler = load_base(planned).pipeline.scheduler
    scheduler.set_timesteps(sigmas=[0.5], mu=planned.family.dynamic_shift({
        "scheduler": scheduler.config, "vae": {}}, planned.latent_shape))  # fmt: skip
    index = (torch.linspace(1, 0.001, 1000) - 0.5).abs().argmin()
    assert abs(float(planned.objective.sigmas[index]) - float(scheduler.sigmas[0])) < 1e-3


@pytest.mark.parametrize(
    ("scheme", "inside"), [("logit_normal", 0.68), ("mode", None), ("none", None), ("sigma_sqrt", None)]
)
def test_densities_are_diffusers(saved, scheme, inside) -> None:
    """The places of stratified times have the distribution that diffusers draws from."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    settings = LossSettings(weighting_scheme=scheme)
    planned = plan_base(BaseSettings(str(saved("FluxPipeline"))), AdapterSettings(options=FEW), 16, 0, settings)
    ours = sorted(planned.objective._place((i + 0.5) / 4000) for i in range(4000))
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling(scheme, 40000, 0.0, 1.0, 1.29, generator=generator)
    quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    drawn = torch.quantile(theirs.clamp(0, 1).double(), quantiles)
    torch.testing.assert_close(torch.quantile(torch.tensor(ours).double(), quantiles), drawn, rtol=0, atol=0.02)


def test_edm_variants_of_sdxl(saved) -> None:
    """The objective's loss is nothing for a denoiser whose preconditioned output is the latents."""
    from diffusers import EDMEulerScheduler

    from s2ft_diffusion.families.objectives import EDMObjective

    planned = plan(saved("StableDiffusionXLPipeline"))
    configs = {"scheduler": dict(EDMEulerScheduler().config, _class_name="EDMDPMSolverMultistepScheduler")}
    objective = planned.family.objective(configs, planned.latent_shape, LossSettings())
    assert isinstance(objective, EDMObjective)
    latents, noise = torch.randn(2, 2, *planned.latent_shape)

    def perfect(scaled: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigmas = torch.exp(4 * timesteps).view(-1, 1, 1, 1)  # Karras et al.: c_noise = ln(sigma) / 4
        noisy = latents + sigmas * noise
        torch.testing.assert_close(scaled, noisy / torch.sqrt(sigmas**2 + 0.25), rtol=1e-3, atol=1e-4)
        skip = 0.25 / (sigmas**2 + 0.25)
        return (latents - skip * noisy) / (sigmas * 0.5 / torch.sqrt(sigmas**2 + 0.25))

    assert float(objective(perfect, latents, noise, [0.2, 0.6]).max()) < 1e-4
    with pytest.raises(InputError, match="EDM"):
        planned.family.objective(configs, planned.latent_shape, LossSettings(snr_gamma=5.0))


@pytest.mark.parametrize("name", [n for n in ALL if n not in TEXT])
def test_text_encoders_that_are_not_trained(saved, name) -> None:
    with pytest.raises(InputError, match=f"text encoder of {name}"):
        plan(saved(name), train_text_encoder=True)


def test_settings_of_the_other_kind_of_loss(saved) -> None:
    for name, loss in (
        ("FluxPipeline", LossSettings(snr_gamma=5.0)),
        ("StableDiffusionPipeline", LossSettings(weighting_scheme="mode")),
    ):
        with pytest.raises(InputError, match=name):
            plan_base(BaseSettings(str(saved(name))), AdapterSettings(options=FEW), 16, 0, loss)


def test_an_unknown_pipeline(tmp_path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline", "_diffusers_version": "0.42.1"}')
    with pytest.raises(InputError, match=r"KandinskyPipeline.*StableDiffusionPipeline.*ZImagePipeline"):
        plan(tmp_path)


def test_negative_prompts_where_there_are_none() -> None:
    with pytest.raises(InputError, match="negative"):
        FAMILIES["FluxPipeline"].call(negative_prompt="blurry")
    assert FAMILIES["QwenImagePipeline"].call()["negative_prompt"] == " "
