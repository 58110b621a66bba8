"""Networks that restore and enlarge images, as spandrel keeps them."""

from typing import Any

from tests.elsewhere.case import Call, Case, floats

IMAGE = floats(2, 3, 32, 32)
SWIN: dict[str, Any] = {"img_size": 32, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8}


def net(path: str, steps: int, inputs: Any = IMAGE, /, long: int = 0, cannot: str = "", **options: Any) -> Case:
    package, _, rest = path.partition(".")
    return Case(Call(f"spandrel.architectures.{package}.__arch.{rest}", **options), inputs, steps, long, cannot=cannot)


# fmt: off
PACKAGES = {
    "spandrel": [
        net("ATD.atd_arch.ATD", 8, **SWIN, category_size=64, num_tokens=16, convffn_kernel_size=3, upscale=2,
            upsampler="pixelshuffledirect", long=3),
        net("DAT.DAT.DAT", 4, img_size=32, embed_dim=32, split_size=[8, 8], depth=[2], num_heads=[2],
            expansion_factor=2.0, long=2),
        net("DITN.DITN_Real.DITN_Real", 4, dim=16, ITL_blocks=1, SAL_blocks=1, upscale=2, long=1),
        net("DRCT.drct_arch.DRCT", 10, **{**SWIN, "depths": (6,), "num_heads": (2,)}, gc=16, upscale=2,
            upsampler="pixelshuffle", long=2),
        net("DRUNet.network_unet.DRUNet", 7, floats(1, 1, 32, 32), nc=[8, 8, 16, 16], nb=1, long=4),
        net("ESRGAN.RRDB.RRDBNet", 2 * 3, num_filters=16, num_blocks=2, long=2 + 1),
        net("FDAT.fdat.FDAT", 8, embed_dim=32, num_groups=1, depth_per_group=2, long=2),
        net("FFTformer.fftformer_arch.FFTformer", 13, dim=16, num_blocks=[1, 1, 1], num_refinement_blocks=1, long=1,
            cannot="channels_last"),
        net("GRL.grl.GRL", 4, img_size=32, embed_dim=32, depths=[2], num_heads_window=[2], num_heads_stripe=[2],
            mlp_ratio=2.0, long=3),
        net("HAT.HAT.HAT", 6, **{**SWIN, "depths": (2,), "num_heads": (2,)}, squeeze_factor=8, upscale=2, long=2),
        net("IPT.ipt.IPT", 9, floats(1, 3, 24, 24), patch_size=24, n_feats=8, num_heads=2, num_layers=1, long=1),
        net("KBNet.kbnet_s.KBNet_s", 10, width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1], long=2),
        net("MMRealSR.mmrealsr_arch.MMRRDBNet_test", 2 * 3 + 2 * 4, num_in_ch=3, num_out_ch=3, num_feat=8, num_block=2,
            num_grow_ch=8, num_feats=[8, 8, 16, 16], num_blocks=[1, 1, 1, 1], long=2 + 1),
        net("MixDehazeNet.MixDehazeNet.MixDehazeNet", 12, floats(2, 3, 64, 64), embed_dims=[8, 16, 32, 16, 8],
            depths=[1, 1, 1, 1, 1], long=1),
        net("MoESR.MoESR.MoESR", 5, dim=16, n_blocks=1, n_block=2, upsample_dim=16, long=2),
        net("MoSR.mosr_arch.MoSR", 3, n_block=2, dim=16, long=1),
        net("NAFNet.NAFNet_arch.NAFNet", 10, width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1], long=2),
        net("OmniSR.OmniSR.OmniSR", 9, num_feat=16, up_scale=2, long=2),
        net("PLKSR.PLKSR.PLKSR", 2, dim=16, n_blocks=2, kernel_size=5, long=1),
        net("PLKSR.RealPLKSR.RealPLKSR", 2, dim=16, n_blocks=2, kernel_size=5, long=1),
        net("RCAN.rcan_arch.RCAN", 4, scale=2, n_resgroups=2, n_resblocks=2, n_feats=16, long=3),
        net("RGT.rgt.RGT", 4, img_size=32, embed_dim=32, depth=[2], num_heads=[2], mlp_ratio=2.0, long=4),
        net("RealCUGAN.upcunet_v3.UpCunet2x", 2, floats(1, 3, 40, 40)),
        net("RestoreFormer.restoreformer_arch.RestoreFormer", 15, floats(1, 3, 32, 32), n_embed=16, embed_dim=16,
            ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(16,), resolution=32, z_channels=16,
            head_size=4),
        net("RetinexFormer.retinexformer_arch.RetinexFormer", 12, n_feat=16, stage=1),
        net("SAFMN.safmn.SAFMN", 4, dim=16, n_blocks=2, long=1),
        net("SAFMNBCIE.safmn_bcie.SAFMN_BCIE", 8, dim=16, n_blocks=2, num_layers=2, long=3),
        net("SPAN.span.SPAN", 6, num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2),
        net("SwiftSRGAN.SwiftSRGAN.Generator", 2, num_channels=16, num_blocks=2, long=1),
        net("Swin2SR.Swin2SR.Swin2SR", 8, **SWIN, upsampler="pixelshuffledirect", long=3),
        net("SwinIR.SwinIR.SwinIR", 8, **SWIN, long=4),
    ],
}
# fmt: on
