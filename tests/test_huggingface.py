"""The model types of Hugging Face transformers, built small from their configurations."""

from collections.abc import Callable

import pytest

import eulernet
from tests.helpers.checks import assert_identical, check, run
from tests.helpers.zoo import hugging_face_model, hugging_face_types

transformers = pytest.importorskip("transformers")

QUICK = "bert llama t5 clip".split()

# Stacks of convolutions; hyper-connections (DeepSeek-V4, GLM-5), whose skip is a mixture of streams by a matrix that
# depends on the input; I-BERT, which adds in its quantiser, two modules below the one whose caller began the branch;
# Reformer, whose layers run in an autograd function with a backward of its own; ZAYA, whose skip has a learned bias
# besides its scale.
WITHOUT_STEPS = """
    mobilenet_v1 pp_lcnet reformer superpoint
""".split()

# What the original itself cannot do: run in float64, since it computes some of it in float32 whatever it is given; run
# under autocast on a CPU; train on these inputs.
CANNOT = {
    "float64": """
    autoformer dab-detr fastspeech2_conformer fastspeech2_conformer_with_hifigan gemma4_audio inkling2 inkling2_loop
    inkling2_loop_text inkling2_text mimi mra slanext xglm
    """.split(),
    "autocast": "deberta".split(),
    "train": "fastspeech2_conformer fastspeech2_conformer_with_hifigan wavtokenizer_encoder".split(),
}

# Types whose residuals are all gated: an interpolation towards the update at a learned rate (nGPT), and a GRU.
ONLY_GATED = {"dory", "slanet"}

# Types that end a branch in float32: sum their experts in it, or norm the branch.
ROUNDED = """
    gemma3n_text hy_v3 hy_v4 hy_v4_vl hy_v4_vl_text inkling_mm_model inkling_text nemo_speechlm nemotron_h
    nemotron_h_omni openai_privacy_filter
""".split()

# No model is built of these: what `hugging_face_model` says, why, and the types.
NOT_BUILT = {
    # another package
    "requires the": """
    dinat higgs_audio_v2_tokenizer layoutlmv2
    """,
    # a set of models without a forward of its own
    'missing the required "forward"': """
    bark glm_image_vqmodel qwen2_5_omni
    """,
    # arguments that only its processor makes
    "its inputs cannot be guessed": """
    edgetam_video gemma3n_audio gemma4_vision jev muse_glimmer_assistant omdet-turbo oneformer pi0 sam2_video
    sam3_tracker_video sam3_video seggpt siglip2_vision_model timesfm mimi_decoder
    pocket_tts_audio_tokenizer_decoder
    """,
    # The default configuration lacks a value, its parts fit at no scale, or the inputs need more than a shape (image
    # tokens, positions of patches, several code books) or are so large that the test would take minutes.
    "no size fits": """
    apertus1p5 blt chameleon chmv2 clvp cohere_compass cohere_compass_text dbrx deepseek_ocr2 depth_pro dia
    diffusion_gemma edgetam edgetam_vision_model efficientloftr emu3 ernie4_5_moe ernie4_5_vl_moe evolla fast_vlm
    fun_asr_nano_encoder funnel gemma3n gemma3n_vision gemma4_assistant gemma4_unified_assistant granite4_vision
    granitemoehybrid hunyuan_vl hunyuan_vl_text idefics inkling2_vision instructblipvideo kimi_k25_vision kosmos-2
    kyutai_speech_to_text lfm2_moe lightglue llama4 lw_detr minicpm_ocr_vision minicpmv4_7_vision molmo2
    moonshine_streaming muse_spark_audio musicgen musicgen_melody nemotron3_5_transcribe_asr_audio
    nemotron3_5_transcribe_audio nemotron3_diarization nemotron3_diarization_audio neucodec omniasr_audio omniasr_ctc
    pe_audio_video pe_audio_video_encoder pe_video pe_video_encoder perception_lm pp_doclayout_v2 pp_ocrv5_server_det
    pp_ocrv6_medium_det pp_ocrv6_small_det qwen3_asr_encoder qwen3_omni_moe qwen4_exp qwen4_exp_text sam2
    sam2_hiera_det_model sam2_vision_model sam3_tracker shieldgemma2 siglip2 speech-encoder-decoder speecht5 step3p7
    superglue t5gemma2_encoder timm_backbone tvp univnet uvdoc vibevoice vibevoice_acoustic_tokenizer
    vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder vibevoice_asr videomt vitmatte
    voxtral_realtime voxtral_realtime_text xcodec2 xmod
    """,
}


def _reason(kind: str) -> str | None:
    return next((message for message, kinds in NOT_BUILT.items() if kind in kinds.split()), None)


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.sweep) for k in hugging_face_types()]
)
def test_each_model_of_hugging_face_is_patched(kind: str, cover: Callable[..., None]) -> None:
    reason = _reason(kind)
    if reason is not None:
        with pytest.raises(RuntimeError, match=reason):
            hugging_face_model(kind)
        return
    specimen = hugging_face_model(kind)
    if kind in WITHOUT_STEPS:
        with pytest.raises(eulernet.EulernetError, match="no residual step"):
            eulernet.patch(specimen.model, example_inputs=specimen.example)
        return
    if kind in ONLY_GATED:
        with pytest.raises(eulernet.EulernetError, match="is gated"):
            eulernet.patch(specimen.model, example_inputs=specimen.example)
        expected = run(specimen.model, specimen.inputs)
        eulernet.patch(specimen.model, 1.0, example_inputs=specimen.example, include="*")
        assert_identical(run(specimen.model, specimen.inputs), expected)
        return
    specimen.fails_as(CANNOT, kind)
    specimen.rounded = kind in ROUNDED
    steps, folded = check(specimen)
    cover("Hugging Face", kind, kind, specimen, steps, folded)


@pytest.mark.sweep
def test_at_least_270_types_are_verified() -> None:
    left_out = {*WITHOUT_STEPS, *ONLY_GATED, *" ".join(NOT_BUILT.values()).split()}
    assert left_out <= set(hugging_face_types())
    assert len(set(hugging_face_types()) - left_out) >= 270
