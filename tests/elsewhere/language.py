"""Transformers for text, proteins, pictures with text and tables."""

from argparse import Namespace
from tempfile import TemporaryDirectory
from typing import Any

from tests.elsewhere.case import Call, Case, floats, ids

TOKENS = ids(50, 2, 16)
LAYERS: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16}


def stack(kind: str, steps: int, name: str = "", /, **options: Any) -> Case:
    """A transformer of x-transformers over tokens."""
    layers = Call(f"x_transformers.{kind}", **{**LAYERS, **options})
    model = Call("x_transformers.TransformerWrapper", num_tokens=50, max_seq_len=16, attn_layers=layers)
    return Case(model, TOKENS, steps, name=f"{kind} {name or ' '.join(options)}".strip())


def tuned(method: str, steps: int, inputs: Any, model: Call, /, **options: Any) -> Case:
    """A small model of transformers under a method of peft."""
    return Case(Call("peft.get_peft_model", model, Call(f"peft.{method}", **options)), inputs, steps, name=method)


LLAMA = Call(
    "transformers.LlamaForCausalLM",
    Call(
        "transformers.LlamaConfig",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    ),
)
TEXT = {"input_ids": TOKENS}
ATTENTION = {"target_modules": ["q_proj", "v_proj"], "r": 4}
LITGPT: dict[str, Any] = {
    "block_size": 16,
    "vocab_size": 50,
    "padded_vocab_size": 50,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
}


def sentences() -> Any:
    """A Sentence Transformer, which is read from a folder, about a BERT with a vocabulary of single letters."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    config = BertConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    with TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
        transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")


FEATURES = {"input_ids": TOKENS, "attention_mask": Call("torch.ones", 2, 16)}

# fmt: off
PACKAGES = {
    "sentence-transformers": [Case(Call("tests.elsewhere.language.sentences"), (FEATURES,), 4,
        name="BERT and pooling")],
    "x-transformers": [
        stack("Encoder", 4, "plain"),
        stack("Decoder", 4, "plain"),
        stack("Decoder", 4, use_rmsnorm=True, ff_glu=True, ff_swish=True, rotary_pos_emb=True),
        stack("Decoder", 4, pre_norm=False),
        stack("Decoder", 4, sandwich_norm=True),
        stack("Decoder", 6, macaron=True),
        stack("Decoder", 4, scale_residual=True),
        stack("Decoder", 4, alibi_pos_bias=True),
        stack("Decoder", 4, attn_gate_values=True),
        stack("Decoder", 4, shift_tokens=1),
        stack("Decoder", 4, residual_attn=True),
        stack("Decoder", 4, num_residual_streams=2),
        stack("Decoder", 4, add_value_residual=True),
        stack("Encoder", 4, rel_pos_bias=True),
        Case(Call("x_transformers.XTransformer", dim=32, enc_num_tokens=50, enc_depth=2, enc_heads=2,
            enc_max_seq_len=16, dec_num_tokens=50, dec_depth=2, dec_heads=2, dec_max_seq_len=16), (TOKENS, TOKENS),
            10),
        Case(Call("x_transformers.ContinuousTransformerWrapper", dim_in=8, dim_out=8, max_seq_len=16,
            attn_layers=Call("x_transformers.Encoder", **LAYERS)), floats(2, 16, 8), 4),
        Case(Call("x_transformers.ViTransformerWrapper", image_size=32, patch_size=8, num_classes=5,
            attn_layers=Call("x_transformers.Encoder", **LAYERS)), floats(2, 3, 32, 32), 4),
        Case(Call("x_transformers.AutoregressiveWrapper", Call("x_transformers.TransformerWrapper", num_tokens=50,
            max_seq_len=16, attn_layers=Call("x_transformers.Decoder", **LAYERS))), TOKENS, 4),
        Case(Call("x_transformers.multi_input.MultiInputTransformerWrapper", num_tokens={"a": 50, "b": 50},
            max_seq_len=16, attn_layers=Call("x_transformers.Decoder", **LAYERS)), ({"a": TOKENS, "b": TOKENS},), 4),
    ],
    "open_clip_torch": [
        Case(Call("open_clip.transformer.VisionTransformer", image_size=32, patch_size=8, width=32, layers=2, heads=2,
            mlp_ratio=2.0, output_dim=16), floats(2, 3, 32, 32), 4),
        Case(Call("open_clip.transformer.TextTransformer", context_length=16, vocab_size=50, width=32, heads=2,
            layers=2, output_dim=16), TOKENS, 4),
        Case(Call("open_clip.modified_resnet.ModifiedResNet", layers=(1, 1, 1, 1), output_dim=16, heads=2,
            image_size=64, width=8), floats(2, 3, 64, 64), 4),
        Case(Call("open_clip.CLIP", 16, {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2},
            {"context_length": 16, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}), (floats(2, 3, 32, 32),
            TOKENS), 8),
        Case(Call("open_clip.CustomTextCLIP", 16, {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2},
            {"context_length": 16, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}), (floats(2, 3, 32, 32),
            TOKENS), 8),
    ],
    "openai-whisper": [
        Case(Call("whisper.model.Whisper", Call("whisper.model.ModelDimensions", 8, 16, 32, 2, 2, 50, 16, 32, 2, 2)),
            (floats(2, 8, 32), TOKENS), 10, cannot="float64"),
        Case(Call("whisper.model.AudioEncoder", 8, 16, 32, 2, 2), floats(2, 8, 32), 4, cannot="float64"),
        Case(Call("whisper.model.TextDecoder", 50, 16, 32, 2, 2), (TOKENS, floats(2, 16, 32)), 6, cannot="float64"),
    ],
    "fair-esm": [
        Case(Call("esm.model.esm2.ESM2", num_layers=2, embed_dim=32, attention_heads=2), ids(20, 2, 16), 4),
        Case(Call("esm.model.esm1.ProteinBertModel", Namespace(arch="roberta_large", layers=2, embed_dim=32,
            ffn_embed_dim=48, attention_heads=2, max_positions=32, emb_layer_norm_before=True, token_dropout=True,
            logit_bias=True), Call("esm.data.Alphabet.from_architecture", "ESM-1b")), ids(20, 2, 16), 4),
        Case(Call("esm.model.msa_transformer.MSATransformer", Namespace(arch="msa_transformer", layers=2,
            embed_dim=32, ffn_embed_dim=48, attention_heads=2, max_positions=32, embed_positions_msa=True,
            embed_positions_msa_dim=32, dropout=0.1, attention_dropout=0.1, activation_dropout=0.1, max_tokens=256,
            logit_bias=True, max_tokens_per_msa=256), Call("esm.data.Alphabet.from_architecture", "msa_transformer")),
            ids(20, 2, 4, 8), 6),
    ],
    "peft": [
        tuned("LoraConfig", 4, TEXT, LLAMA, **ATTENTION),
        tuned("LoHaConfig", 4, TEXT, LLAMA, **ATTENTION),
        tuned("LoKrConfig", 4, TEXT, LLAMA, **ATTENTION),
        tuned("IA3Config", 4, TEXT, LLAMA, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        tuned("AdaLoraConfig", 4, TEXT, LLAMA, target_modules=["q_proj"], init_r=4, target_r=2, total_step=10),
        tuned("OFTConfig", 4, TEXT, LLAMA, target_modules=["q_proj"], r=2, oft_block_size=0),
        tuned("VeraConfig", 4, TEXT, LLAMA, **ATTENTION),
        tuned("PromptTuningConfig", 4, TEXT, LLAMA, task_type="CAUSAL_LM", num_virtual_tokens=4),
        tuned("LNTuningConfig", 4, TEXT, LLAMA, target_modules=["input_layernorm"]),
    ],
    "litgpt": [
        Case(Call("litgpt.GPT", Call("litgpt.Config", **LITGPT)), TOKENS, 2),
        Case(Call("litgpt.GPT", Call("litgpt.Config", **LITGPT, parallel_residual=False, norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP", intermediate_size=48)), TOKENS, 4, name="GPT like LLaMA"),
    ],
    "linformer": [Case(Call("linformer.Linformer", dim=32, seq_len=16, depth=2, k=8, heads=2), floats(2, 16, 32), 4)],
    "performer-pytorch": [
        Case(Call("performer_pytorch.Performer", dim=32, depth=2, heads=2, dim_head=16), floats(2, 16, 32), 4),
        Case(Call("performer_pytorch.PerformerLM", num_tokens=50, max_seq_len=16, dim=32, depth=2, heads=2,
            dim_head=16), TOKENS, 4),
    ],
    "tab-transformer-pytorch": [
        Case(Call("tab_transformer_pytorch.TabTransformer", categories=(4, 5), num_continuous=3, dim=16, dim_out=2,
            depth=2, heads=2, mlp_act=Call("torch.nn.ReLU")), (ids(4, 2, 2), floats(2, 3)), 4, rounded=True),
        Case(Call("tab_transformer_pytorch.FTTransformer", categories=(4, 5), num_continuous=3, dim=16, dim_out=2,
            depth=2, heads=2), (ids(4, 2, 2), floats(2, 3)), 4),
    ],
    "rtdl_revisiting_models": [
        Case(Call("rtdl_revisiting_models.ResNet", d_in=4, d_out=2, n_blocks=2, d_block=16, d_hidden=None,
            d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.0), floats(4, 4), 2),
        Case(Call("rtdl_revisiting_models.FTTransformer", n_cont_features=3, cat_cardinalities=[4, 5], d_out=2,
            n_blocks=2, d_block=16, attention_n_heads=2, attention_dropout=0.1, ffn_d_hidden=None,
            ffn_d_hidden_multiplier=2.0, ffn_dropout=0.1, residual_dropout=0.0), (floats(2, 3), ids(4, 2, 2)), 4),
    ],
}
# fmt: on
