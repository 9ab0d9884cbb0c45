"""EAGLE-3 heads as speculators writes them, for vLLM: "layers.0", a nested config, the embedding.

Layer numbers of features count a layer by its input, as everywhere in specjax.
"""

import pathlib
from typing import Any

import numpy as np

from specjax.drafters.eagle3 import Eagle3
from specjax.interchange.folder import (
    CONFIG,
    EMBEDDING,
    Tensors,
    checked_taps,
    default_taps,
    layer_ids,
    refuse,
    section,
    verifier_section,
    written_taps,
)
from specjax.interchange.head import head_tensors, layer_keys, read_geometry, read_head
from specjax.models.target import Target

FAMILY = Eagle3
PREFIX = "layers.0."
VERSION = "0.8.0.dev0"  # of speculators, whose configs have exactly the keys written here
_IDS = "eagle_aux_hidden_state_layer_ids"
# Of a whole model; a layer's config leaves them out.
NOT_OF_A_LAYER = {
    "architectures", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings",
}  # fmt: skip


def write(definition: Eagle3, params, target: Target, verifier: str | None, dtype: str):
    """(tensors, config) of a head.

    Raises:
      ValueError: what this layout cannot say (names the drafter's field), or a verifier that is no
        hub id.
    """
    layer = layer_keys(definition, ("llama", "qwen3"), dtype)
    record = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": VERSION,
        "draft_vocab_size": definition.draft_vocab_size or definition.target.vocab_size,
        "norm_before_residual": definition.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": definition.fc_norm,
        "norm_output": definition.norm_output,
        "target_hidden_size": None,
        _IDS: list(written_taps(definition)),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformer_layer_config": {k: v for k, v in layer.items() if k not in NOT_OF_A_LAYER},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": definition.depth,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": verifier_section(definition.target, verifier),
        },
    }
    tensors = head_tensors(definition, params, PREFIX)
    return tensors | {EMBEDDING: np.asarray(target.params["embed"])}, record


def read(folder, raw: dict[str, Any], target: Target):
    """(definition, parameters) of a head. Raises ValueError as `read_head` does."""
    source, tensors = pathlib.Path(folder) / CONFIG, Tensors(folder)
    key = "transformer_layer_config"
    layer_raw = section(raw, source, key)
    if layer_raw.get("num_hidden_layers") != 1:
        layers = layer_raw.get("num_hidden_layers")
        refuse(source, f"{key}.num_hidden_layers", f"{layers!r}: a head of one layer is supported")
    layer = read_geometry(layer_raw, f"{source}: {key}", target.config)
    if raw.get("norm_before_residual") is None:
        refuse(source, "norm_before_residual", "missing, and readers differ in what that means")
    taps = layer_ids(raw, source, _IDS) or default_taps(target.config)
    return read_head(
        tensors, source, raw, layer, PREFIX, target,
        feature_layers=checked_taps(taps, target.config, source, _IDS),
        draft_depth=proposal(raw, source).get("speculative_tokens") or 0,
    )  # fmt: skip


def proposal(raw: dict[str, Any], source) -> dict[str, Any]:
    """The default proposal method, {} where there is none."""
    key = "speculators_config"
    settings = section(raw, source, key)
    methods = settings.get("proposal_methods") or []
    if not (isinstance(methods, list) and all(isinstance(m, dict) for m in methods)):
        refuse(source, f"{key}.proposal_methods", "is not a list of objects")
    named = [
        m for m in methods if m.get("proposal_type") == settings.get("default_proposal_method")
    ]
    chosen = (named or methods or [{}])[0]
    for name in ("speculative_tokens", "candidates"):
        count = chosen.get(name)
        if count is not None and (type(count) is not int or count < 1):
            refuse(source, f"{key}.proposal_methods.{name}", f"{count!r} is no number >= 1")
    return chosen
