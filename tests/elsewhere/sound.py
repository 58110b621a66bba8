"""Networks for speech and music."""

from typing import Any

from tests.elsewhere.case import Call, Case, floats, ids

FRAMES = floats(2, 16, 32)
LAYER: dict[str, Any] = {"num_layers": 2, "d_model": 32, "nhead": 2}
ASR: dict[str, Any] = {
    "tgt_vocab": 20,
    "input_size": 8,
    "d_model": 32,
    "nhead": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "d_ffn": 48,
}
ROTARY = {"attention_type": "RoPEMHA"}


def sb(
    path: str,
    steps: int,
    inputs: Any,
    /,
    name: str = "",
    long: int = 0,
    missed: int = 0,
    cannot: str = "",
    **options: Any,
) -> Case:
    return Case(Call(f"speechbrain.lobes.models.{path}", **options), inputs, steps, long, missed, cannot, name=name)


# fmt: off
PACKAGES = {
    "speechbrain": [
        sb("transformer.Transformer.TransformerEncoder", 4, FRAMES, **LAYER, d_ffn=48),
        sb("transformer.Transformer.TransformerEncoder", 4, FRAMES, **LAYER, d_ffn=48, ffn_type="1dcnn",
            normalize_before=True, name="TransformerEncoder 1dcnn"),
        sb("transformer.Transformer.TransformerDecoder", 6, (FRAMES, FRAMES), **LAYER, d_ffn=48),
        sb("transformer.Conformer.ConformerEncoder", 8, FRAMES, **LAYER, d_ffn=48, kernel_size=3, **ROTARY),
        sb("transformer.Branchformer.BranchformerEncoder", 2, FRAMES, **LAYER, kernel_size=3, csgu_linear_units=32,
            attention_type="hypermixing"),
        sb("transformer.TransformerASR.TransformerASR", 10, (floats(2, 16, 8), ids(20, 2, 6)), cannot="float64", **ASR),
        sb("transformer.TransformerASR.TransformerASR", 14, (floats(2, 16, 8), ids(20, 2, 6)), **ASR,
            encoder_module="conformer", normalize_before=True, kernel_size=3, **ROTARY,
            name="TransformerASR conformer"),
        sb("transformer.TransformerLM.TransformerLM", 4, ids(20, 2, 6), vocab=20, d_model=32, nhead=2,
            num_encoder_layers=2, d_ffn=48),
        sb("transformer.TransformerSE.CNNTransformerSE", 4, FRAMES, cannot="float64", d_model=32, output_size=8,
            nhead=2, num_layers=2,
            d_ffn=48),
        sb("ECAPA_TDNN.ECAPA_TDNN", 3, floats(2, 16, 8), input_size=8, channels=[16, 16, 16, 16, 48],
            attention_channels=8, res2net_scale=2, se_channels=8, lin_neurons=8),
        sb("conv_tasnet.MaskNet", 4, floats(2, 8, 16), N=8, B=8, H=16, P=3, X=2, R=2, C=2),
        sb("dual_path.SBTransformerBlock", 4, FRAMES, num_layers=2, d_model=32, nhead=2, d_ffn=48),
        sb("dual_path.Dual_Path_Model", 8, floats(2, 8, 24), in_channels=8, out_channels=16,
            intra_model=Call("speechbrain.lobes.models.dual_path.SBTransformerBlock", num_layers=2, d_model=16,
            nhead=2, d_ffn=24), inter_model=Call("speechbrain.lobes.models.dual_path.SBTransformerBlock",
            num_layers=2, d_model=16, nhead=2, d_ffn=24), K=8, long=2),
        sb("HifiGAN.HifiganGenerator", 2 * 3, floats(2, 8, 16), in_channels=8, out_channels=1, resblock_type="1",
            resblock_dilation_sizes=[[1, 3, 5]], resblock_kernel_sizes=[3], upsample_kernel_sizes=[4, 4],
            upsample_initial_channel=16, upsample_factors=[2, 2], inference_padding=0),
        sb("DiffWave.DiffWave", 2, (floats(2, 1, 64), ids(10, 2)), input_channels=8, residual_layers=2,
            residual_channels=8, dilation_cycle_length=2, total_steps=10, unconditional=True),
        sb("ContextNet.ContextNet", 2, floats(2, 16, 8), input_shape=(2, 16, 8), out_channels=16, conv_channels=[8,
            8], strides=[1, 1], num_blocks=2, num_layers=2, inner_dim=4),
        sb("ResNet.ResNet", 4, floats(2, 16, 16), input_size=16, channels=[8, 8, 16, 16], block_sizes=[1, 1, 1, 1],
            lin_neurons=8),
        sb("EnhanceResnet.EnhanceResnet", 2, floats(2, 1600), n_fft=64, win_length=4, hop_length=2, channel_counts=[8,
            8], dense_nodes=16, long=1),
        sb("convolution.ConvolutionFrontEnd", 2, floats(2, 16, 8), input_shape=(2, 16, 8), num_blocks=2,
            num_layers_per_block=2, out_channels=[8, 8], kernel_sizes=[3, 3], strides=[1, 2], dilations=[1, 1],
            residuals=[True, True]),
        sb("CRDNN.CRDNN", 0, floats(2, 16, 8), input_shape=(2, 16, 8), cnn_channels=[4, 4], rnn_layers=1,
            rnn_neurons=8, dnn_neurons=8),
    ],
    "encodec": [
        Case(Call("encodec.modules.SEANetEncoder", dimension=16, n_filters=4, ratios=[4, 2]), floats(2, 1, 64), 3),
        Case(Call("encodec.modules.SEANetDecoder", dimension=16, n_filters=4, ratios=[4, 2]), floats(2, 16, 8), 3),
    ],
    "demucs": [
        Case(Call("demucs.demucs.Demucs", ["a", "b"], channels=8, depth=2, lstm_layers=1, dconv_comp=2,
            normalize=False, resample=False), floats(2, 2, 256), 4, long=1),
        Case(Call("demucs.hdemucs.HDemucs", ["a", "b"], channels=8, nfft=64, depth=2, hybrid_old=False, dconv_comp=2),
            floats(2, 2, 1024), 6, long=2),
        Case(Call("demucs.htdemucs.HTDemucs", ["a", "b"], channels=8, nfft=64, depth=2, t_layers=2, t_heads=2,
            dconv_comp=2, bottom_channels=16, samplerate=1024, segment=1), floats(2, 2, 1024), 14, long=3),
    ],
    "conformer": [
        Case(Call("conformer.Conformer", dim=32, depth=2, dim_head=16, heads=2, conv_kernel_size=3), floats(2, 16,
            32), 8),
    ],
}
# fmt: on
