"""The shape of a target: one frozen, hashable record read from a Hugging Face config.json."""

import dataclasses
import json
import math
import numbers
import pathlib
from typing import Any

# What `config.json` may name as `model_type`; the differences between them are fields below.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched; `kind` is one of ROPE_TYPES, the rest as in Llama 3.1."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip


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
        for field in _COUNTS:
            value = getattr(self, field)
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{field}: {value!r} is not a positive whole number")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")

    @classmethod
    def of(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Reads back what `dataclasses.asdict` and JSON made of one."""
        scaling, ends = RopeScaling(**raw["rope_scaling"]), tuple(raw["eos_token_ids"])
        return cls(**raw | {"rope_scaling": scaling, "eos_token_ids": ends})

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


def _count(raw: dict[str, Any], field: str, source, default: int | None = None) -> int:
    """A positive whole number; null counts as absent."""
    value = default if raw.get(field) is None else raw[field]
    if value is None:
        _fail(source, field, "missing")
    if not isinstance(value, int) or value < 1:
        _fail(source, field, f"{value!r} is not a positive whole number")
    return value


def _positive(raw: dict[str, Any], field: str, source, default: float | None = None) -> float:
    """A positive finite number; null counts as absent."""
    value = default if raw.get(field) is None else raw[field]
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        _fail(source, field, f"{value!r} is not a positive number")
    return value


def _rope(raw: dict[str, Any], source) -> tuple[float, RopeScaling]:
    """transformers < 5 writes rope_theta + rope_scaling, later versions one rope_parameters."""
    merged = {}
    for field in ("rope_scaling", "rope_parameters"):
        part = raw.get(field) or {}
        if not isinstance(part, dict):
            _fail(source, field, f"{part!r} is not an object")
        merged |= part
    theta = _positive({"rope_theta": raw.get("rope_theta")} | merged, "rope_theta", source, 10000.0)
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind not in ROPE_TYPES:
        _fail(source, "rope_scaling.rope_type", f"{kind!r} is not supported; one of {ROPE_TYPES}")
    if merged.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1):
        _fail(source, "partial_rotary_factor", "only 1 is supported")
    fields = {f.name for f in dataclasses.fields(RopeScaling)} - {"kind"}
    if kind != "default" and merged.get("factor") is None:
        _fail(source, "rope_scaling.factor", f"rope type {kind!r} needs it")
    given = {f"rope_scaling.{k}": merged[k] for k in fields if merged.get(k) is not None}
    numbers = {k.partition(".")[2]: _positive(given, k, source) for k in given}
    return float(theta), RopeScaling(kind, **numbers)


def config_from_hf(raw: dict[str, Any], source: str | pathlib.Path = "config.json") -> ModelConfig:
    """Reads a Hugging Face config dictionary.

    Raises:
      ValueError: an unsupported architecture, RoPE type or option, or a value that cannot be;
        names `source` and the field.
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
    # Where Mistral's configs leave the window out, transformers takes 4096.
    if model_type == "mistral" and raw.get("sliding_window", 4096) is not None:
        _fail(source, "sliding_window", "only null is supported (Mistral v0.2 and later)")
    if raw.get("quantization_config"):
        _fail(source, "quantization_config", "quantised checkpoints are not supported")
    heads = _count(raw, "num_attention_heads", source)
    hidden = _count(raw, "hidden_size", source)
    theta, scaling = _rope(raw, source)
    bos = raw.get("bos_token_id")
    # Mistral knows no biases, whatever its config says.
    attention_bias = bool(raw.get("attention_bias", False)) and model_type != "mistral"
    fields = dict(
        vocab_size=_count(raw, "vocab_size", source),
        hidden_size=hidden,
        intermediate_size=_count(raw, "intermediate_size", source),
        num_layers=_count(raw, "num_hidden_layers", source),
        num_heads=heads,
        num_kv_heads=_count(raw, "num_key_value_heads", source, heads),
        # The defaults of transformers' own config classes.
        head_dim=_count(raw, "head_dim", source, 128 if model_type == "qwen3" else hidden // heads),
        model_type=model_type,
        rms_norm_eps=float(_positive(raw, "rms_norm_eps", source, 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        # Qwen2 always has biases on q, k, v and never on o; elsewhere one flag rules all four.
        qkv_bias=True if model_type == "qwen2" else attention_bias,
        o_bias=False if model_type == "qwen2" else attention_bias,
        qk_norm=model_type == "qwen3",
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position_embeddings=_count(raw, "max_position_embeddings", source, 2048),
        bos_token_id=None if bos is None else int(bos),
        eos_token_ids=_eos_ids(raw),
    )
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _eos_ids(raw: dict[str, Any]) -> tuple[int, ...]:
    eos = raw.get("eos_token_id")
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)


def config_to_hf(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The inverse of `config_from_hf`: a dictionary that `transformers` reads.

    Raises:
      ValueError: the architecture cannot say what a field asks; names the field.
    """
    for field, said in (
        ("qkv_bias", config.model_type == "qwen2" or config.o_bias),
        ("o_bias", config.o_bias and config.model_type not in ("qwen2", "mistral")),
        ("qk_norm", config.model_type == "qwen3"),
    ):
        if getattr(config, field) != said:
            raise ValueError(
                f"{field}: a {config.model_type} checkpoint cannot say {getattr(config, field)}"
            )
    architecture = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
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
    window = {"sliding_window": None} if config.model_type == "mistral" else {}
    return window | {
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


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file where it holds none."""
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: not a JSON object")
    return raw


def read_config(folder: str | pathlib.Path) -> ModelConfig:
    """Reads `folder/config.json`.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it is not JSON, or describes an unsupported model (names file and field).
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a Hugging Face model folder has one")
    config = config_from_hf(read_json(path), path)
    # Chat models list further stop ids (Llama 3: <|eot_id|>) only in generation_config.json.
    generation = pathlib.Path(folder) / "generation_config.json"
    if generation.is_file():
        extra = _eos_ids(read_json(generation))
        ids = config.eos_token_ids + tuple(i for i in extra if i not in config.eos_token_ids)
        config = config.replace(eos_token_ids=ids)
    return config
