"""Tiny random models of many families of transformers: which are trained here, with which windows, which not.

`families.py` has the few that most tests use.
"""

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from families import CONFIGS as FIVE
from families import EOS, PAD, VOCAB
from utils.models.loading import in_blocks, with_our_heads, without_dropout

WINDOW = 6  # tokens that a token of a sliding layer sees, itself included; or of a chunk
_SIZES = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS,
          "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "intermediate_size": 24, "max_position_embeddings": 64, "attention_dropout": 0.3}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
           "num_key_value_heads": 4}
_BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
_EVERY = {"sliding_window": WINDOW}


def _of(kind, *parts, **more):
    """A function that makes a fresh config of this kind; None takes a key out."""
    keys = {name: value for part in (_SIZES, *parts, more) for name, value in part.items()}
    return lambda: kind(**{name: value for name, value in keys.items() if value is not None})


# every family whose attention has a window in some of its layers, or in all
WINDOWED = {
    "mistral": _of(hf.MistralConfig, _EVERY),
    "ministral": _of(hf.MinistralConfig, _EVERY, head_dim=4),
    "mixtral": _of(hf.MixtralConfig, _EVERY, num_local_experts=4, num_experts_per_tok=2,
                   router_jitter_noise=0.3),
    "qwen2": _of(hf.Qwen2Config, _EVERY, use_sliding_window=True, max_window_layers=1),
    "qwen3": _of(hf.Qwen3Config, _EVERY, use_sliding_window=True, max_window_layers=1, head_dim=4),
    "qwen2-moe": _of(hf.Qwen2MoeConfig, _EVERY, _EXPERTS, use_sliding_window=True, max_window_layers=1,
                     num_experts=4, shared_expert_intermediate_size=8),
    "qwen3-moe": _of(hf.Qwen3MoeConfig, _EVERY, _EXPERTS, use_sliding_window=True, num_experts=4,
                     head_dim=4),
    "phi3": _of(hf.Phi3Config, _EVERY, resid_pdrop=0.3, embd_pdrop=0.3),
    "phimoe": _of(hf.PhimoeConfig, _EVERY, num_local_experts=4, num_experts_per_tok=2,
                  router_jitter_noise=0.3, input_jitter_noise=0.3),
    "starcoder2": _of(hf.Starcoder2Config, _EVERY, residual_dropout=0.3, embedding_dropout=0.3),
    "olmo3": _of(hf.Olmo3Config, _EVERY, _BOTH),
    "gemma3": _of(hf.Gemma3TextConfig, _EVERY, _BOTH, head_dim=4, final_logit_softcapping=2.0),
    "gemma3n": _of(hf.Gemma3nTextConfig, _EVERY, head_dim=4, num_hidden_layers=4, num_kv_shared_layers=1,
                   layer_types=["sliding_attention", "full_attention"] * 2, laurel_rank=4,
                   activation_sparsity_pattern=[0.0] * 4, hidden_size_per_layer_input=4,
                   vocab_size_per_layer_input=VOCAB, intermediate_size=[24] * 4),
    "gemma4": _of(hf.Gemma4TextConfig, _EVERY, _BOTH, head_dim=8, global_head_dim=8, num_kv_shared_layers=0,
                  num_global_key_value_heads=2, hidden_size_per_layer_input=4,
                  vocab_size_per_layer_input=VOCAB),
    "cohere2": _of(hf.Cohere2Config, _EVERY, _BOTH, logit_scale=0.25),
    "exaone4": _of(hf.Exaone4Config, _EVERY, _BOTH),
    "smollm3": _of(hf.SmolLM3Config, _EVERY, _BOTH, use_sliding_window=True),
    "llama4": _of(hf.Llama4TextConfig, attention_chunk_size=WINDOW, num_local_experts=2,
                  num_experts_per_tok=1, intermediate_size_mlp=24, head_dim=4, num_hidden_layers=4,
                  layer_types=["chunked_attention", "full_attention"] * 2),
    "doge": _of(hf.DogeConfig, _EVERY, hidden_dropout=0.3),
}
# its text model has a config of its own
_IMAGES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 28, "patch_size": 14}
WINDOWED["gemma3-images"] = lambda: hf.Gemma3Config(
    text_config=WINDOWED["gemma3"]().to_dict() | {"final_logit_softcapping": None}, vision_config=_IMAGES,
    mm_tokens_per_image=4, image_token_index=30, boi_token_index=29, eoi_token_index=28,
)
# no window, but something else that few families have
OTHERS = {
    "deepseek-v2": _of(hf.DeepseekV2Config, _LATENT, _EXPERTS, v_head_dim=6, head_dim=4, n_routed_experts=4,
                       n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1),
    "deepseek-v3": _of(hf.DeepseekV3Config, _LATENT, _EXPERTS, v_head_dim=6, head_dim=4, n_routed_experts=4,
                       n_group=1, topk_group=1, first_k_dense_replace=1),
    "falcon": _of(hf.FalconConfig, num_key_value_heads=None, intermediate_size=None, alibi=False,
                  hidden_dropout=0.3),
    "falcon-new": _of(hf.FalconConfig, num_key_value_heads=None, intermediate_size=None, alibi=False,
                      new_decoder_architecture=True, num_kv_heads=2),
    "gpt-bigcode": _of(hf.GPTBigCodeConfig, hidden_size=None, n_embd=16, n_layer=2, n_head=4, n_positions=64,
                       attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3, num_hidden_layers=None,
                       num_attention_heads=None, num_key_value_heads=None, max_position_embeddings=None),
    "seed-oss": _of(hf.SeedOssConfig, residual_dropout=0.3, head_dim=4),
    "opt-norms-first-projected": _of(hf.OPTConfig, ffn_dim=24, word_embed_proj_dim=8,
                                     do_layer_norm_before=True, dropout=0.3, layerdrop=0.3),
    "olmoe": _of(hf.OlmoeConfig, num_experts=4, num_experts_per_tok=2),
    "biogpt": _of(hf.BioGptConfig, hidden_dropout_prob=0.3, layerdrop=0.3, activation_dropout=0.3),
    "phi": _of(hf.PhiConfig, resid_pdrop=0.3, embd_pdrop=0.3, partial_rotary_factor=0.5),
    "stablelm": _of(hf.StableLmConfig, hidden_dropout=0.3),
    "persimmon": _of(hf.PersimmonConfig, hidden_dropout=0.3),
    "granite": _of(hf.GraniteConfig, logits_scaling=8.0),
}
TRAINED = WINDOWED | OTHERS
FIRST = FIVE | {"gemma2": lambda: hf.Gemma2Config()}  # test_models.py, test_behind_the_head.py
# not trained: tokens of a row reach each other without attention, or attention chooses among columns
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4,
           "linear_value_head_dim": 4, "layer_types": ["linear_attention", "full_attention"], "head_dim": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
MIXED = {
    "qwen3.5": _of(hf.Qwen3_5TextConfig, _LINEAR),
    "qwen3-next": _of(hf.Qwen3NextConfig, _LINEAR, _EXPERTS, num_experts=4,
                      shared_expert_intermediate_size=8),
    "lfm2": _of(hf.Lfm2Config, layer_types=["conv", "full_attention"]),
    "falcon-h1": _of(hf.FalconH1Config, _MAMBA, mamba_d_ssm=32),
    "jamba": _of(hf.JambaConfig, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4,
                 num_experts=2),
    "bamba": _of(hf.BambaConfig, _MAMBA, attn_layer_indices=[1]),
    "granite-hybrid": _of(hf.GraniteMoeHybridConfig, _MAMBA, layer_types=["mamba", "attention"],
                          shared_intermediate_size=24, num_local_experts=2, num_experts_per_tok=1),
    "recurrent-gemma": _of(hf.RecurrentGemmaConfig, lru_width=16, attention_window_size=WINDOW,
                           num_hidden_layers=3),
    "minimax": _of(hf.MiniMaxConfig, layer_types=["linear_attention", "full_attention"],
                   num_local_experts=2),
    "zamba": _of(hf.ZambaConfig, num_hidden_layers=6, attn_layer_period=2, attn_layer_offset=1,
                 n_mamba_heads=2, mamba_d_state=8, mamba_dt_rank=4),
    "deepseek-v3.2": _of(hf.DeepseekV32Config, _LATENT, _EXPERTS, v_head_dim=6, head_dim=4,
                         n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
}


def table() -> list[str]:
    """The lines of the table in docs/models.md."""
    lines = ["| family of transformers | layers | result |", "|---|---|---|"]
    for name, make in sorted({**FIRST, **TRAINED, **MIXED}.items()):
        config = make().get_text_config()
        window = ("sliding windows" if getattr(config, "sliding_window", None) else
                  "chunks" if getattr(config, "attention_chunk_size", None) else "full attention")
        keys = ("num_local_experts", "num_experts", "n_routed_experts")
        experts = any(getattr(config, key, None) for key in keys)
        layers = "other layers than attention, or chosen columns" if name in MIXED else window
        result = "refused at load" if name in MIXED else "trained"
        kind = type(make()).__name__.removesuffix("Config").removesuffix("Text")
        lines.append(f"| {kind} (`{name}`) | {layers}{', experts' if experts else ''} | {result} |")
    return lines


def tiny(family: str, kind=AutoModelForCausalLM, window: int = WINDOW, std: float | None = 0.2):
    """A model of the table as it is loaded: our heads, blocks, no dropout. None where transformers has no
    such class for the family.

    Args:
        std: of the matrices, so that differences show; None: as transformers starts them.
    """
    config = (TRAINED | MIXED)[family]()
    config.num_labels = 1
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(config.get_text_config(), name, None):
            setattr(config.get_text_config(), name, window)
    torch.manual_seed(0)
    try:
        model = kind.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            return None
        raise
    for weight in model.parameters():
        if weight.ndim > 1 and std is not None:
            torch.nn.init.normal_(weight.data, std=std)
    return without_dropout(with_our_heads(in_blocks(model))).eval()


def tiny_scalar(family: str, **more):
    return tiny(family, AutoModelForSequenceClassification, **more)
