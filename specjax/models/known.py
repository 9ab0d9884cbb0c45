"""Geometries of published targets, so that a run on one can be planned without a network.

Source: each repository's config.json and generation_config.json on the Hugging Face hub. Weights
are never here; a local folder or the hub's own file wins where there is one.
"""

from specjax.models.config import ModelConfig, RopeScaling

_LLAMA31_ROPE = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def _llama3(hidden, ffn, layers, heads, ends) -> ModelConfig:
    return ModelConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=ffn, num_layers=layers,
        num_heads=heads, num_kv_heads=8, head_dim=128, rope_theta=500000.0,
        rope_scaling=_LLAMA31_ROPE, max_position_embeddings=131072, bos_token_id=128000,
        eos_token_ids=ends,
    )  # fmt: skip


_LLAMA31_ENDS = (128001, 128008, 128009)
KNOWN: dict[str, ModelConfig] = {
    "Qwen/Qwen3-0.6B": ModelConfig(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16,
        num_kv_heads=8, head_dim=128, model_type="qwen3", rms_norm_eps=1e-6, rope_theta=1000000.0,
        qk_norm=True, tie_word_embeddings=True, max_position_embeddings=40960,
        bos_token_id=151643, eos_token_ids=(151645, 151643),
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _llama3(4096, 14336, 32, 32, _LLAMA31_ENDS),
    "meta-llama/Llama-3.3-70B-Instruct": _llama3(8192, 28672, 80, 64, _LLAMA31_ENDS),
    "lmsys/vicuna-13b-v1.3": ModelConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40,
        num_kv_heads=40, head_dim=128, rms_norm_eps=1e-6, max_position_embeddings=2048,
        bos_token_id=1, eos_token_ids=(2,),
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama3(4096, 14336, 32, 32, (128001,)),
}  # fmt: skip
