"""Networks for medical images, as MONAI writes them."""

from typing import Any

from tests.elsewhere.case import Call, Case, floats, ids

FLAT, VOLUME = floats(2, 1, 32, 32), floats(2, 1, 32, 32, 32)
STAGES = {"channels": (8, 16, 16), "strides": (2, 2)}
IO = {"in_channels": 1, "out_channels": 2}
LEVELS: dict[str, Any] = {
    "num_res_blocks": (1, 1),
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
}


def net(name: str, steps: int, inputs: Any, /, long: int = 0, cannot: str = "", **options: Any) -> Case:
    return Case(Call(f"monai.networks.nets.{name}", **options), inputs, steps, long, cannot=cannot)


# fmt: off
PACKAGES = {
    "monai": [
        net("AttentionUnet", 0, FLAT, spatial_dims=2, **IO, **STAGES),
        net("AutoEncoder", 4, FLAT, spatial_dims=2, num_res_units=2, **IO, channels=(8, 16), strides=(2, 2)),
        net("AutoencoderKL", 12, FLAT, spatial_dims=2, **LEVELS),
        net("BasicUNet", 0, FLAT, spatial_dims=2, features=(8, 8, 16, 16, 16, 8)),
        net("Classifier", 2, FLAT, in_shape=(1, 32, 32), classes=3, **STAGES),
        net("Critic", 2, FLAT, in_shape=(1, 32, 32), **STAGES),
        net("Discriminator", 2, FLAT, in_shape=(1, 32, 32), **STAGES),
        net("DiffusionModelUNet", 12, (FLAT, ids(10, 2)), spatial_dims=2, in_channels=1, out_channels=1,
            num_head_channels=8, **LEVELS),
        net("DynUNet", 3, FLAT, spatial_dims=2, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2],
            filters=[8, 16, 16], res_block=True, **IO),
        net("EfficientNetBN", 9, floats(2, 1, 64, 64), model_name="efficientnet-b0", pretrained=False, in_channels=1),
        net("FlexibleUNet", 8, floats(2, 1, 64, 64), backbone="resnet18", **IO),
        net("Generator", 2, floats(2, 6), latent_shape=(6,), start_shape=(8, 4, 4), channels=(8, 16), strides=(2, 2)),
        net("HighResNet", 9, floats(2, 1, 16, 16), spatial_dims=2),
        net("MaskedAutoEncoderViT", 6, FLAT, in_channels=1, img_size=32, patch_size=8, hidden_size=32, mlp_dim=48,
            num_layers=2, num_heads=2, decoder_hidden_size=32, decoder_mlp_dim=48, decoder_num_layers=1,
            decoder_num_heads=2, spatial_dims=2, cannot="autocast"),
        net("MedNeXt", 17, FLAT, spatial_dims=2, init_filters=8, kernel_size=3, blocks_down=(1, 1, 1, 1),
            blocks_bottleneck=1, blocks_up=(1, 1, 1, 1), use_residual_connection=True, long=1),
        net("Regressor", 2, FLAT, in_shape=(1, 32, 32), out_shape=(1,), **STAGES),
        net("GlobalNet", 3, FLAT, image_size=(32, 32), spatial_dims=2, in_channels=1, num_channel_initial=8, depth=2,
            cannot="float64"),
        net("LocalNet", 4, FLAT, spatial_dims=2, in_channels=1, num_channel_initial=8, extract_levels=(0, 1, 2),
            out_channels=2, long=1),
        net("RegUNet", 3, FLAT, spatial_dims=2, in_channels=1, num_channel_initial=8, depth=2, out_channels=2),
        net("ResNet", 4, floats(2, 3, 32, 32), block="basic", layers=[1, 1, 1, 1], block_inplanes=[8, 8, 16, 16],
            spatial_dims=2, num_classes=3),
        net("ResNet", 4, floats(2, 3, 32, 32), block="bottleneck", layers=[1, 1, 1, 1], block_inplanes=[8, 8, 16, 16],
            spatial_dims=2, num_classes=3, shortcut_type="A")._replace(
            name="ResNet of bottlenecks"),
        net("SegResNet", 7, floats(1, 1, 16, 16, 16), blocks_down=(1, 1, 1, 1), long=1),
        net("SegResNetVAE", 7, FLAT, input_image_size=(32, 32), spatial_dims=2, blocks_down=(1, 1, 1, 1), vae_nz=8,
            long=1),
        net("SegResNetDS", 5, FLAT, spatial_dims=2, init_filters=8, blocks_down=(1, 1, 1), long=1),
        net("SegResNetDS2", 7, FLAT, spatial_dims=2, init_filters=8, blocks_down=(1, 1, 1), long=2),
        net("SPADEAutoencoderKL", 12, (FLAT, floats(2, 3, 32, 32)), spatial_dims=2, label_nc=3,
            spade_intermediate_channels=8, **LEVELS),
        net("SPADEDiffusionModelUNet", 12, (FLAT, ids(10, 2), floats(2, 3, 32, 32)), spatial_dims=2, in_channels=1,
            out_channels=1, label_nc=3, num_head_channels=8, spade_intermediate_channels=8, **LEVELS),
        net("SwinUNETR", 4 * 2 + 10, floats(2, 1, 64, 64), spatial_dims=2, feature_size=12, depths=(1, 1, 1, 1),
            num_heads=(2,
            2, 2, 2), **IO),
        net("DecoderOnlyTransformer", 6, (ids(20, 2, 8), floats(2, 4, 32)), num_tokens=20, max_seq_len=8,
            attn_layers_dim=32, attn_layers_depth=2, attn_layers_heads=2, with_cross_attention=True),
        net("UNet", 5, FLAT, spatial_dims=2, num_res_units=2, **IO, **STAGES),
        net("UNETR", 32, FLAT, img_size=32, feature_size=8, hidden_size=32, mlp_dim=48, num_heads=2, spatial_dims=2,
            **IO),
        net("VarAutoEncoder", 4, FLAT, spatial_dims=2, in_shape=(1, 32, 32), out_channels=1, latent_size=4,
            num_res_units=2, channels=(8, 16), strides=(2, 2)),
        net("ViT", 4, FLAT, in_channels=1, img_size=32, patch_size=8, hidden_size=32, mlp_dim=48, num_layers=2,
            num_heads=2, spatial_dims=2, classification=True),
        net("ViTAutoEnc", 4, FLAT, in_channels=1, img_size=(32, 32), patch_size=(4, 4), hidden_size=32, mlp_dim=48,
            num_layers=2, num_heads=2, spatial_dims=2),
        net("VQVAE", 8, FLAT, spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16), num_res_layers=2,
            num_res_channels=(8, 16), downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1,
            0),) * 2, num_embeddings=8, embedding_dim=8, cannot="float64"),
    ],
}
# fmt: on
