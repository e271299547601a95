"""A tiny pipeline of every family: the real classes from configs, with random weights, built without downloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from s2ft_diffusion import toybox

TEMPLATE = "{% for message in messages %}<user>{{ message['content'] }}</user>{% endfor %}"


@cache
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template, for text encoders that are no CLIP."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["a photo of sks dog and enhanced prompt, the user description"] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512, padding_side="right"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(toybox.base_path() / "tokenizer")


def clip(kind: type, width: int = 32) -> torch.nn.Module:
    tokenizer = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=37, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, projection_dim=width,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(bytes_tokenizer()), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=2)
    )


def language_model(**options) -> dict:
    return {
        "vocab_size": len(bytes_tokenizer()), "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "pad_token_id": 0, **options,
    }  # fmt: skip


def autoencoder(**options) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4, sample_size=32, **options,
    )  # fmt: skip


def flow(**options) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


def noise(**options) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options)


def unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )  # fmt: skip


def stable_diffusion() -> dict:
    return {
        "unet": unet(cross_attention_dim=32), "vae": autoencoder(), "scheduler": noise(),
        "text_encoder": clip(CLIPTextModel), "tokenizer": clip_tokenizer(), "safety_checker": None,
        "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


def stable_diffusion_xl() -> dict:
    return {
        "unet": unet(
            cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 32,
        ),
        "vae": autoencoder(), "scheduler": noise(prediction_type="v_prediction"),
        "text_encoder": clip(CLIPTextModel), "text_encoder_2": clip(CLIPTextModelWithProjection),
        "tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "add_watermarker": False,
    }  # fmt: skip


def stable_diffusion_3() -> dict:
    return {
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=64, pooled_projection_dim=64,
            pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
        ),
        "vae": autoencoder(shift_factor=0.06, scaling_factor=1.5), "scheduler": flow(shift=3.0),
        "text_encoder": clip(CLIPTextModelWithProjection), "text_encoder_2": clip(CLIPTextModelWithProjection),
        "text_encoder_3": t5(64), "tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": bytes_tokenizer(),
    }  # fmt: skip


def flux() -> dict:
    return {
        "transformer": diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        "vae": autoencoder(shift_factor=0.1, scaling_factor=0.4),
        "scheduler": flow(use_dynamic_shifting=True, shift=3.0),
        "text_encoder": clip(CLIPTextModel), "text_encoder_2": t5(32), "tokenizer": clip_tokenizer(),
        "tokenizer_2": bytes_tokenizer(),
    }  # fmt: skip


def _flux2_parts(width: int, *, guidance: bool) -> dict:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4, sample_size=32,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * width, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip
    return {"transformer": transformer, "vae": vae, "scheduler": flow(use_dynamic_shifting=True)}


def flux2() -> dict:
    text = {**language_model(num_hidden_layers=31), "model_type": "mistral"}
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 16, "head_dim": 8}  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=10)
    tokenizer = bytes_tokenizer()
    return {
        **_flux2_parts(16, guidance=True), "tokenizer": tokenizer,
        "text_encoder": transformers.Mistral3ForConditionalGeneration(config),
    }  # fmt: skip


def flux2_klein() -> dict:
    config = transformers.Qwen3Config(**language_model(num_hidden_layers=28))
    return {
        **_flux2_parts(16, guidance=False), "tokenizer": bytes_tokenizer(),
        "text_encoder": transformers.Qwen3ForCausalLM(config),
    }  # fmt: skip


def qwen_image() -> dict:
    text = language_model(num_hidden_layers=2, rope_scaling={"mrope_section": [1, 1, 2], "type": "mrope"})
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        "vae": AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 1.5, 1.0, 0.5],
        ),
        "scheduler": flow(use_dynamic_shifting=True, max_shift=0.9),
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config), "tokenizer": bytes_tokenizer(),
    }  # fmt: skip


def z_image() -> dict:
    return {
        "transformer": diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[8, 4, 4], axes_lens=[1024, 64, 64],
        ),
        "vae": autoencoder(shift_factor=0.1, scaling_factor=0.4), "scheduler": flow(shift=3.0),
        "text_encoder": transformers.Qwen3Model(transformers.Qwen3Config(**language_model(num_hidden_layers=2))),
        "tokenizer": bytes_tokenizer(),
    }  # fmt: skip


def sana() -> dict:
    return {
        "transformer": diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
            num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
            sample_size=16,
        ),
        "vae": AutoencoderDC(
            latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41,
        ),
        "scheduler": flow(shift=3.0),
        "text_encoder": transformers.Gemma2Model(
            transformers.Gemma2Config(**language_model(num_hidden_layers=2))
        ),
        "tokenizer": bytes_tokenizer(),
    }  # fmt: skip


def pixart_sigma() -> dict:
    return {
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
            caption_channels=32, cross_attention_dim=24, in_channels=4, out_channels=8,
        ),
        "vae": autoencoder(), "scheduler": DDPMScheduler(), "text_encoder": t5(32), "tokenizer": bytes_tokenizer(),
    }  # fmt: skip


def lumina2() -> dict:
    return {
        "transformer": diffusers.Lumina2Transformer2DModel(
            sample_size=4, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
            num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(1024, 64, 64), cap_feat_dim=16,
        ),
        "vae": AutoencoderKL(  # its pipeline takes eight pixels a latent for granted
            block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=4, shift_factor=0.1,
        ),
        "scheduler": flow(shift=6.0), "tokenizer": bytes_tokenizer(),
        "text_encoder": transformers.Gemma2Model(
            transformers.Gemma2Config(**language_model(num_hidden_layers=2))
        ),
    }  # fmt: skip


COMPONENTS: Mapping[str, Callable[[], dict]] = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "Flux2Pipeline": flux2,
    "Flux2KleinPipeline": flux2_klein,
    "QwenImagePipeline": qwen_image,
    "ZImagePipeline": z_image,
    "SanaPipeline": sana,
    "PixArtSigmaPipeline": pixart_sigma,
    "Lumina2Pipeline": lumina2,
}
SIDE = {"SanaPipeline": 32, "Lumina2Pipeline": 32}  # pixels; 16 for the others


def tiny(name: str) -> DiffusionPipeline:
    """A tiny pipeline of a class: equal ones every time."""
    torch.manual_seed(0)
    pipeline = getattr(diffusers, name)(**COMPONENTS[name]())
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if parameter.ndim > 1 and float(parameter.abs().max()) == 0.0:  # as new, some would predict nothing
                        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(key)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
