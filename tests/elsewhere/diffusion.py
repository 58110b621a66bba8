"""Diffusion models: U-Nets, transformers and the autoencoders of their latents."""

from typing import Any

from tests.elsewhere.case import Call, Case, floats, ids

LATENT, VIDEO, TEXT = floats(2, 4, 8, 8), floats(2, 4, 2, 8, 8), floats(2, 6, 32)
TIME = Call("torch.tensor", [3, 7])
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}
IMAGES = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}


def net(
    name: str, steps: int, inputs: Any, /, long: int = 0, cannot: str = "", rounded: bool = False, **options: Any
) -> Case:
    return Case(Call(f"diffusers.{name}", **options), inputs, steps, long, cannot=cannot, rounded=rounded)


# fmt: off
PACKAGES = {
    "diffusers": [
        net("AutoencoderKL", 12, floats(1, 3, 16, 16), **IMAGES, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2),
        # And 5 gated ones.
        net("AutoencoderKLTemporalDecoder", 15, {"sample": floats(2, 3, 16, 16), "num_frames": 2},
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, cannot="channels_last"),
        net("AutoencoderDC", 10, floats(1, 3, 32, 32), latent_channels=8, attention_head_dim=8,
            encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock",
            "EfficientViTBlock"), encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,))),
        net("AutoencoderKLCogVideoX", 10, floats(1, 3, 4, 16, 16), block_out_channels=(16, 16), layers_per_block=1,
            latent_channels=4, norm_num_groups=8, down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2, temporal_compression_ratio=2),
        net("AutoencoderKLWan", 12, floats(1, 3, 5, 16, 16), base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1,
            temperal_downsample=[True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        net("AutoencoderKLQwenImage", 12, floats(1, 3, 1, 16, 16), base_dim=8, z_dim=4, dim_mult=[1, 1],
            num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        net("AutoencoderKLMochi", 14, floats(1, 3, 7, 16, 16), encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32), latent_channels=4, layers_per_block=(1, 1, 1, 1, 1)),
        net("AutoencoderOobleck", 2 * 2 * 3, floats(1, 2, 64), encoder_hidden_size=16, downsampling_ratios=[2, 4],
            channel_multiples=[1, 2], decoder_channels=8, decoder_input_channels=8),
        net("AutoencoderTiny", 6, floats(2, 3, 16, 16), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1), cannot="float64"),
        net("VQModel", 12, floats(1, 3, 16, 16), **IMAGES, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=16),
        net("UNet1DModel", 8, (floats(1, 14, 16), Call("torch.tensor", [3])), in_channels=14, out_channels=14,
            time_embedding_type="positional", flip_sin_to_cos=False, use_timestep_embedding=True,
            out_block_type="OutConv1DBlock", mid_block_type="MidResTemporalBlock1D",
            down_block_types=("DownResnetBlock1D",) * 2, up_block_types=("UpResnetBlock1D",), act_fn="swish",
            block_out_channels=(16, 32)),
        net("UNet2DModel", 12, (floats(2, 3, 16, 16), TIME), block_out_channels=(16, 32), layers_per_block=1,
            norm_num_groups=8, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        net("UNet2DConditionModel", 24, (LATENT, TIME, TEXT), **UNET, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D",
            "CrossAttnUpBlock2D")),
        net("UNet3DConditionModel", 52, (VIDEO, TIME, TEXT), **UNET, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D",
            "CrossAttnUpBlock3D")),
        net("UNetSpatioTemporalConditionModel", 45, (floats(1, 2, 8, 8, 8), Call("torch.tensor", [3]), floats(1, 1,
            32), floats(1, 3)), block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            num_attention_heads=(2, 2), num_frames=2, addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24, down_block_types=("CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal"), up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            long=3),  # and 12 gated ones
        net("ControlNetModel", 12, (LATENT, TIME, TEXT, floats(2, 3, 16, 16)), **UNET, attention_head_dim=2,
            conditioning_embedding_out_channels=(8, 8), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")),
        net("T2IAdapter", 2, floats(1, 3, 32, 32), channels=[8, 16], num_res_blocks=1, downscale_factor=4),
        net("UVit2DModel", 9, (ids(16, 2, 4, 4), TEXT, floats(2, 32), floats(2, 5)), hidden_size=32,
            cond_embed_dim=32, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=32,
            vocab_size=32, codebook_size=32, in_channels=32, block_out_channels=32, num_res_blocks=1,
            block_num_heads=2, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, downsample=True,
            upsample=True, sample_size=4),
        net("DiTTransformer2DModel", 4, (LATENT, TIME, ids(5, 2)), **HEADS, in_channels=4, num_layers=2,
            sample_size=8, num_embeds_ada_norm=10, norm_num_groups=8),
        net("PixArtTransformer2DModel", 6, (LATENT, TEXT, TIME, {"resolution": None, "aspect_ratio": None}), **HEADS,
            in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32, sample_size=8, caption_channels=32),
        net("SD3Transformer2DModel", 6, (LATENT, TEXT, floats(2, 16), TIME), **HEADS, sample_size=8, in_channels=4,
            out_channels=4, num_layers=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
            pos_embed_max_size=8),
        net("FluxTransformer2DModel", 6, {"hidden_states": floats(2, 16, 4), "encoder_hidden_states": TEXT,
            "pooled_projections": floats(2, 16), "timestep": TIME, "img_ids": floats(16, 3), "txt_ids": floats(6, 3)},
            **HEADS, in_channels=4, num_layers=1, num_single_layers=2, joint_attention_dim=32,
            pooled_projection_dim=16, axes_dims_rope=(4, 4, 8)),
        net("ChromaTransformer2DModel", 7, {"hidden_states": floats(2, 16, 4), "encoder_hidden_states": TEXT,
            "timestep": TIME, "img_ids": floats(16, 3), "txt_ids": floats(6, 3)}, **HEADS, in_channels=4,
            num_layers=1, num_single_layers=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
        net("AuraFlowTransformer2DModel", 3, (LATENT, TEXT, TIME), **HEADS, sample_size=8, num_mmdit_layers=1,
            num_single_dit_layers=1, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64),
        net("CogVideoXTransformer3DModel", 2 * 4, (floats(2, 2, 4, 8, 8), TEXT, TIME), **HEADS, in_channels=4,
            out_channels=4, time_embed_dim=8, text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8,
            sample_frames=5, max_text_seq_length=6),
        net("CogView4Transformer2DModel", 8, {"hidden_states": LATENT, "encoder_hidden_states": TEXT,
            "timestep": TIME, "original_size": floats(2, 2), "target_size": floats(2, 2), "crop_coords": floats(2,
            2)}, **HEADS, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=32, time_embed_dim=8,
            condition_dim=4, rope_axes_dim=(8, 8)),
        net("LatteTransformer3DModel", 5, (VIDEO, TIME, TEXT), **HEADS, in_channels=4, out_channels=4, num_layers=1,
            cross_attention_dim=32, caption_channels=32, sample_size=8, patch_size=2, video_length=2,
            num_embeds_ada_norm=10, norm_type="ada_norm_single", norm_elementwise_affine=False),
        net("LTXVideoTransformer3DModel", 6, {"hidden_states": floats(2, 32, 4), "encoder_hidden_states": TEXT,
            "timestep": TIME, "encoder_attention_mask": Call("torch.ones", 2, 6), "num_frames": 2, "height": 4,
            "width": 4}, **HEADS, in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2,
            caption_channels=32, qk_norm="rms_norm_across_heads"),
        net("Lumina2Transformer2DModel", 6, {"hidden_states": LATENT, "timestep": Call("torch.rand", 2),
            "encoder_hidden_states": TEXT, "encoder_attention_mask": Call("tests.elsewhere.diffusion.ones", 2, 6)},
            sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
            num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=32),
        net("MochiTransformer3DModel", 6, (floats(2, 4, 2, 8, 8), TEXT, TIME, Call("tests.elsewhere.diffusion.ones",
            2, 6)), num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
            in_channels=4, text_embed_dim=32, time_embed_dim=4, max_sequence_length=6),
        net("PriorTransformer", 4, (floats(2, 8), TIME, floats(2, 8), floats(2, 7, 8)), **HEADS, num_layers=2,
            embedding_dim=8, num_embeddings=7),
        net("QwenImageTransformer2DModel", 8, {"hidden_states": floats(2, 16, 16), "encoder_hidden_states": TEXT,
            "encoder_hidden_states_mask": Call("tests.elsewhere.diffusion.ones", 2, 6), "timestep": TIME,
            "img_shapes": [[(1, 4, 4)], [(1, 4, 4)]]}, **HEADS, in_channels=16, out_channels=4, num_layers=2,
            joint_attention_dim=32, axes_dims_rope=(8, 4, 4)),
        net("SanaTransformer2DModel", 6, (LATENT, TEXT, TIME), **HEADS, in_channels=4, out_channels=4, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32,
            sample_size=8),
        net("StableAudioDiTModel", 8, (floats(2, 4, 8), TIME, floats(2, 6, 16), floats(2, 1, 16), (floats(9, 8),
            floats(9, 8))), sample_size=8, in_channels=4, num_layers=2, num_attention_heads=2,
            num_key_value_attention_heads=2, attention_head_dim=16, out_channels=4, cross_attention_dim=32,
            time_proj_dim=8, global_states_input_dim=16, cross_attention_input_dim=16),
        net("T5FilmDecoder", 6, ([(floats(2, 6, 32), Call("torch.ones", 2, 6))], floats(2, 8, 8), Call("torch.rand",
            2)), input_dims=8, targets_length=8, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=48),
        net("WanTransformer3DModel", 6, (VIDEO, TIME, TEXT), **HEADS, in_channels=4, out_channels=4, text_dim=32,
            freq_dim=16, ffn_dim=48, num_layers=2, rounded=True),
        net("AllegroTransformer3DModel", 6, (VIDEO, TEXT, TIME), num_attention_heads=2, attention_head_dim=24,
            num_layers=2, cross_attention_dim=48, caption_channels=32, sample_height=8, sample_width=8,
            sample_frames=2),
        net("StableCascadeUNet", 8, (floats(2, 4, 8, 8), Call("torch.rand", 2), floats(2, 1, 16)), in_channels=4,
            out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=32, block_out_channels=(32, 32),
            num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
            clip_text_pooled_in_channels=16),
    ],
    "denoising-diffusion-pytorch": [
        Case(Call("denoising_diffusion_pytorch.Unet", dim=16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8),
            (floats(2, 3, 16, 16), TIME), 16, cannot="float64"),
        Case(Call("denoising_diffusion_pytorch.Unet1D", dim=16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8),
            (floats(2, 3, 16), TIME), 16, cannot="float64"),
        Case(Call("denoising_diffusion_pytorch.KarrasUnet", image_size=16, dim=16, dim_max=32, num_downsamples=1,
            num_blocks_per_stage=1, attn_res=(8,), attn_dim_head=8), (floats(2, 4, 16, 16), floats(2)), 16),
        Case(Call("denoising_diffusion_pytorch.KarrasUnet1D", seq_len=16, dim=16, dim_max=32, num_downsamples=1,
            num_blocks_per_stage=1, attn_res=(8,), attn_dim_head=8), (floats(2, 4, 16), floats(2)), 16),
    ],
}
# fmt: on


def ones(*shape: int) -> Any:
    """A mask that hides nothing."""
    import torch

    return torch.ones(shape, dtype=torch.bool)
