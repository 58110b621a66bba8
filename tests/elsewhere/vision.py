"""Vision transformers, as vit-pytorch writes them."""

from typing import Any

from tests.elsewhere.case import Call, Case, floats

IMAGE = floats(2, 3, 32, 32)
VIDEO = floats(2, 3, 4, 32, 32)
NARROW = {"dim": 32, "heads": 2, "dim_head": 16, "num_classes": 5}
VIT: dict[str, Any] = {**NARROW, "image_size": 32, "patch_size": 8, "depth": 2, "mlp_dim": 48}
CLIP: dict[str, Any] = {
    **{k: v for k, v in VIT.items() if k != "patch_size"},
    "image_patch_size": 8,
    "frames": 4,
    "frame_patch_size": 2,
}


def vit(name: str, steps: int, inputs: Any = IMAGE, /, cannot: str = "", **options: Any) -> Case:
    return Case(Call(f"vit_pytorch.{name}", **options), inputs, steps, cannot=cannot, name=name.removesuffix(".ViT"))


# fmt: off
PACKAGES = {
    "vit-pytorch": [
        vit("ats_vit.ViT", 4, max_tokens_per_depth=(16, 8), **VIT),
        vit("attn_residual_with_dca_simple_vit.SimpleViT", 4, **VIT),
        vit("cait.CaiT", 6, cls_depth=1, **VIT),
        vit("cct.CCT", 4, img_size=32, embedding_dim=32, num_layers=2, num_heads=2, num_classes=5),
        vit("cct_3d.CCT", 4, VIDEO, img_size=32, num_frames=4, embedding_dim=32, num_layers=2, num_heads=2,
            num_classes=5),
        vit("cross_vit.CrossViT", 8, image_size=32, num_classes=5, sm_dim=16, lg_dim=32, sm_patch_size=8,
            lg_patch_size=16, sm_enc_heads=2, sm_enc_mlp_dim=32, sm_enc_dim_head=8, lg_enc_depth=2, lg_enc_heads=2,
            lg_enc_mlp_dim=48, lg_enc_dim_head=8, cross_attn_depth=1, cross_attn_heads=2, cross_attn_dim_head=8,
            depth=1),
        vit("crossformer.CrossFormer", 16, floats(2, 3, 64, 64), cannot="float64", dim=(32, 32, 32, 32), depth=(1, 1,
            1, 1),
            global_window_size=(4, 2, 2, 1), local_window_size=2, num_classes=5),
        vit("cvt.CvT", 8, floats(2, 3, 64, 64), num_classes=5, s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=32,
            s2_heads=2, s3_heads=2, s2_depth=1, s3_depth=2),
        vit("deepvit.DeepViT", 4, **VIT),
        vit("efficient.ViT", 4, **{k: VIT[k] for k in ("dim", "num_classes", "image_size", "patch_size")},
            transformer=Call("x_transformers.Encoder", dim=32, depth=2, heads=2)),
        vit("jet_vit.JetViT", 4, **VIT),
        vit("jumbo_vit.JumboViT", 2 * 2 + 1, jumbo_cls_k=2, **VIT),
        vit("learnable_memory_vit.ViT", 4, **VIT),
        vit("learnable_memory_vit.Adapter", 4, vit=Call("vit_pytorch.learnable_memory_vit.ViT", **VIT)),
        vit("levit.LeViT", 8, floats(2, 3, 64, 64), image_size=64, num_classes=5, dim=(16, 24, 32), depth=1, heads=(2,
            2, 2), mlp_mult=2, dim_key=8, dim_value=8),
        vit("look_vit.LookViT", 2 * 5, floats(2, 3, 48, 48), dim=32, image_size=48, num_classes=5, depth=2, heads=2,
            dim_head=16, cross_attn_heads=2, cross_attn_dim_head=16),
        vit("looped_vit.LoopedViT", 6, num_classes=5, dim=32, image_size=32, patch_size=8, pre_loop_depth=1,
            num_looped_blocks=1, post_loop_depth=1, loop_depth=2, heads=2, dim_head=16, mlp_dim=48),
        vit("max_vit.MaxViT", 8, floats(2, 3, 64, 64), num_classes=5, dim=16, depth=(1, 1), dim_head=8, window_size=4),
        vit("max_vit_with_registers.MaxViT", 8, floats(2, 3, 64, 64), num_classes=5, dim=16, depth=(1, 1), dim_head=8,
            window_size=4),
        vit("mobile_vit.MobileViT", 3 + 3 * 2, floats(2, 3, 64, 64), image_size=(64, 64), dims=[16, 24, 32],
            channels=[8, 8, 16, 16, 24, 24, 32, 32, 32, 32, 48], num_classes=5, depths=(1, 1, 1)),
        vit("mp3.ViT", 4, **VIT),
        vit("na_vit.NaViT", 5, ([floats(3, 32, 32), floats(3, 16, 32)],), **VIT),
        vit("nest.NesT", 6, image_size=32, patch_size=4, num_classes=5, dim=16, heads=2, num_hierarchies=3,
            block_repeats=(1, 1, 1), dim_head=8),
        vit("parallel_vit.ViT", 4, num_parallel_branches=2, **VIT),
        vit("pit.PiT", 4, floats(2, 3, 32, 32), **{**VIT, "depth": (1, 1), "dim_head": 16}),
        vit("regionvit.RegionViT", 12, floats(2, 3, 64, 64), dim=(16, 16, 32, 32), depth=(1, 1, 1, 1), window_size=2,
            num_classes=5),
        vit("rvt.RvT", 4, **VIT),
        vit("vit.ViT", 4, **VIT),
        vit("sep_vit.SepViT", 2 * 3, floats(2, 3, 56, 56), num_classes=5, dim=16, depth=(1, 1), heads=(2, 2),
            dim_head=8),
        vit("simple_flash_attn_vit.SimpleViT", 4, **VIT),
        vit("simple_flash_attn_vit_3d.SimpleViT", 4, VIDEO, **CLIP),
        vit("simple_uvit.SimpleUViT", 4, **VIT),
        vit("simple_vit.SimpleViT", 4, **VIT),
        vit("simple_vit_1d.SimpleViT", 4, floats(2, 3, 32), seq_len=32, patch_size=8, **{k: VIT[k] for k in (*NARROW,
            "depth", "mlp_dim")}),
        vit("simple_vit_3d.SimpleViT", 4, VIDEO, **CLIP),
        vit("simple_vit_attn_residual.SimpleViTAttnResidual", 0, **VIT),
        vit("simple_vit_orthog_residual_update.SimpleViT", 4, **VIT),
        vit("simple_vit_with_fft.SimpleViT", 4, freq_patch_size=8, **VIT),
        vit("simple_vit_with_hyper_connections.SimpleViT", 4, num_residual_streams=2, **VIT),
        vit("simple_vit_with_patch_dropout.SimpleViT", 4, **VIT),
        vit("simple_vit_with_qk_norm.SimpleViT", 4, **VIT),
        vit("simple_vit_with_register_tokens.SimpleViT", 4, **VIT),
        vit("simple_vit_with_relative_proj_pos_bias.SimpleViT", 4, **VIT),
        vit("simple_vit_with_sparse_gating.SimpleViTWithSparseGating", 4, **VIT),
        vit("simple_vit_with_specialized_cls.SimpleViT", 4, **VIT),
        vit("simple_vit_with_value_residual.SimpleViT", 4, **VIT),
        vit("t2t.T2TViT", 6, image_size=32, t2t_layers=((3, 2), (3, 2)), **{k: v for k,
            v in VIT.items() if k not in ("image_size", "patch_size")}),
        vit("twins_svt.TwinsSVT", 3 * 9 + 5, floats(2, 3, 64, 64), num_classes=5, s1_emb_dim=16, s2_emb_dim=16,
            s3_emb_dim=32, s4_emb_dim=32, s1_local_patch_size=4, s2_local_patch_size=4, s3_local_patch_size=2,
            s4_local_patch_size=2, s1_global_k=4, s2_global_k=4, s3_global_k=2, s4_global_k=2, s3_depth=1,
            s4_depth=1),
        vit("vaat.AST", 4, floats(2, 400), dim=32, depth=2, mlp_dim=48, num_classes=5, dim_head=16, heads=2),
        vit("vit_1d.ViT", 4, floats(2, 3, 32), seq_len=32, patch_size=8, **{k: VIT[k] for k in (*NARROW, "depth",
            "mlp_dim")}),
        vit("vit_3d.ViT", 4, VIDEO, **CLIP),
        vit("vit_5.ViT", 4, **VIT),
        vit("vit_detpool.ViTDetPool", 4, **VIT),
        vit("vit_for_small_dataset.ViT", 4, **VIT),
        vit("vit_with_decorr.ViT", 4, **VIT),
        vit("vit_with_keel_post_ln.ViT", 4, **VIT),
        vit("vit_with_patch_dropout.ViT", 4, **VIT),
        vit("vit_with_patch_merger.ViT", 4, patch_merge_layer=1, **VIT),
        vit("vivit.ViViT", 8, VIDEO, **{**{k: v for k, v in CLIP.items() if k != "depth"}, "spatial_depth": 2,
            "temporal_depth": 2}),
        vit("vivit_with_moss.ViViT", 8 + 1, VIDEO, **{**{k: v for k, v in CLIP.items() if k != "depth"},
            "spatial_depth": 2, "temporal_depth": 2}),
        vit("xcit.XCiT", 8, cls_depth=1, **VIT),
    ],
}
# fmt: on
