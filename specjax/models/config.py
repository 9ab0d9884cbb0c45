"""The shape of a target: one frozen, hashable record read from a Hugging Face config.json."""

import dataclasses
import json
import pathlib
from typing import Any

# What `config.json` may name as `model_type`; the differences between them are fields below.
FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched; `kind` is one of ROPE_TYPES, the rest as in Llama 3.1."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Geometry of a decoder-only target (letters of the conventions page in the comments)."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # G
    head_dim: int  # K
    model_type: str = "llama"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")

    def replace(self, **changes) -> "ModelConfig":
        return dataclasses.replace(self, **changes)

    def feature_layers(self) -> tuple[int, int, int]:
        """Layers whose *input* is the low, mid and high feature tap (EAGLE-3: 2, L//2, L-3).

        Shallow targets would repeat or go negative, so ids are pushed apart inside [0, L) as far
        as L allows; below three layers they coincide.
        """
        top = self.num_layers - 1
        low, mid, high = 2, self.num_layers // 2, self.num_layers - 3
        if not 0 <= low < mid < high <= top:
            low, mid, high = 0, top // 2, top
        return low, mid, high


def _fail(source, field, message):
    raise ValueError(f"{source}: {field}: {message}")


def _rope(raw: dict[str, Any], source) -> tuple[float, RopeScaling]:
    """transformers < 5 writes rope_theta + rope_scaling, later versions one rope_parameters."""
    merged = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    theta = float(merged.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind not in ROPE_TYPES:
        _fail(source, "rope_scaling.rope_type", f"{kind!r} is not supported; one of {ROPE_TYPES}")
    fields = {f.name for f in dataclasses.fields(RopeScaling)} - {"kind"}
    if kind != "default" and "factor" not in merged:
        _fail(source, "rope_scaling.factor", f"rope type {kind!r} needs it")
    return theta, RopeScaling(kind, **{k: merged[k] for k in fields if merged.get(k) is not None})


def config_from_hf(raw: dict[str, Any], source: str | pathlib.Path = "config.json") -> ModelConfig:
    """Reads a Hugging Face config dictionary.

    Raises:
      ValueError: an unsupported architecture, RoPE type or option; names `source` and the field.
    """
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        _fail(source, "model_type", f"{model_type!r} is not supported; one of {FAMILIES}")
    if raw.get("hidden_act", "silu") != "silu":
        _fail(source, "hidden_act", f"{raw['hidden_act']!r} is not supported, only 'silu'")
    if raw.get("mlp_bias"):
        _fail(source, "mlp_bias", "true is not supported")
    if raw.get("use_sliding_window"):
        _fail(source, "use_sliding_window", "true is not supported")
    if raw.get("quantization_config"):
        _fail(source, "quantization_config", "quantised checkpoints are not supported")
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        theta, scaling = _rope(raw, source)
        eos = raw.get("eos_token_id")
        eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)
        bos = raw.get("bos_token_id")
        attention_bias = bool(raw.get("attention_bias", False))
        return ModelConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            model_type=model_type,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            # Qwen2 always has biases on q, k, v and never on o; elsewhere one flag rules all four.
            qkv_bias=True if model_type == "qwen2" else attention_bias,
            o_bias=False if model_type == "qwen2" else attention_bias,
            qk_norm=model_type == "qwen3",
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
            bos_token_id=None if bos is None else int(bos),
            eos_token_ids=eos,
        )
    except KeyError as error:
        _fail(source, error.args[0], "missing")


def config_to_hf(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The inverse of `config_from_hf`: a dictionary that `transformers` reads."""
    architecture = {
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }[config.model_type]
    scaling = config.rope_scaling
    if scaling.kind == "default":
        rope_scaling = None
    elif scaling.kind == "linear":
        rope_scaling = {"rope_type": "linear", "factor": scaling.factor}
    else:
        rope_scaling = {"rope_type": scaling.kind} | {
            f.name: getattr(scaling, f.name)
            for f in dataclasses.fields(RopeScaling)
            if f.name != "kind"
        }
    eos = config.eos_token_ids
    return {
        "architectures": [architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        "attention_bias": config.o_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "torch_dtype": dtype,
    }


def read_config(folder: str | pathlib.Path) -> ModelConfig:
    """Reads `folder/config.json`.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it is not JSON, or describes an unsupported model (names file and field).
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a Hugging Face model folder has one")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    config = config_from_hf(raw, path)
    # Chat models list further stop ids (Llama 3: <|eot_id|>) only in generation_config.json.
    generation = pathlib.Path(folder) / "generation_config.json"
    if generation.is_file():
        eos = json.loads(generation.read_text()).get("eos_token_id")
        extra = () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)
        ids = config.eos_token_ids + tuple(i for i in extra if i not in config.eos_token_ids)
        config = config.replace(eos_token_ids=ids)
    return config
