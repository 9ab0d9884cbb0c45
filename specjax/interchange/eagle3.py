"""EAGLE-3 heads as SafeAILab and SpecForge write them: one layer named "midlayer", a flat config.

Layer numbers of features: the nested key `eagle_config.eagle_aux_hidden_state_layer_ids` counts a
layer by its *output* (SpecForge, SGLang), the top-level key of the same name by its *input* (vLLM).
Readers of the nested key that find another first number than 1 disagree about it. Both keys are
written, each in its own convention, and only where no reader can take them for something else.
"""

import pathlib
from typing import Any

from specjax.drafters.eagle3 import Eagle3
from specjax.interchange.folder import (
    CONFIG,
    Tensors,
    checked_taps,
    default_taps,
    flag,
    layer_ids,
    refuse,
    section,
    written_taps,
)
from specjax.interchange.head import head_tensors, layer_keys, read_geometry, read_head
from specjax.models.config import ModelConfig
from specjax.models.target import Target

FAMILY = Eagle3
PREFIX = "midlayer."
_IDS = "eagle_aux_hidden_state_layer_ids"


def write(definition: Eagle3, params, target: Target, verifier: str | None, dtype: str):
    """(tensors, config) of a head; the target's embedding stays with the target.

    Raises:
      ValueError: what this layout cannot say (names the drafter's field).
    """
    if verifier is not None:
        raise ValueError("verifier: this layout does not name it")
    taps = written_taps(definition)
    record = layer_keys(definition, ("llama",), dtype)
    if definition.block.qkv_bias or definition.block.o_bias:
        raise ValueError("own_layer: qkv_bias, o_bias: this layout's layer has none")
    if taps[0] != 2:
        raise ValueError(
            f"feature_layers: {taps}: readers of this layout disagree about taps whose first is "
            "not the input of layer 2; the speculators layout can say it"
        )
    record |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": definition.draft_vocab_size or definition.target.vocab_size,
        "eagle_config": {_IDS: [tap - 1 for tap in taps], "use_aux_hidden_state": True},
        _IDS: list(taps),
    }
    variants = ("fc_norm", "norm_before_residual", "norm_output")
    record |= {key: True for key in variants if getattr(definition, key)}
    return head_tensors(definition, params, PREFIX), record


def read(folder, raw: dict[str, Any], target: Target):
    """(definition, parameters) of a head. Raises ValueError as `read_head` does."""
    source, tensors = pathlib.Path(folder) / CONFIG, Tensors(folder)
    if not any(name.startswith(PREFIX) for name in tensors.names):
        raise ValueError(
            f"{folder}: no tensor {PREFIX}*: no EAGLE-3 head; a whole model drafts by "
            "init_drafter('draft_model', target, folder=...)"
        )
    eagle = section(raw, source, "eagle_config")
    if not flag(eagle, source, "use_aux_hidden_state", True):
        refuse(source, "eagle_config.use_aux_hidden_state", "false is not supported")
    layer = read_geometry(raw, source, target.config)
    taps = read_taps(raw, eagle, source, target.config)
    return read_head(tensors, source, raw, layer, PREFIX, target, feature_layers=taps)


def read_taps(raw, eagle, source, target: ModelConfig) -> tuple[int, ...]:
    """The field `feature_layers` that a config describes, whichever of the keys it has."""
    entered, nested = layer_ids(raw, source, _IDS), layer_ids(eagle, source, _IDS)
    key, default = f"eagle_config.{_IDS}", default_taps(target)
    if nested is not None:
        output_of = tuple(i + 1 for i in nested)
        if nested[0] == 1:
            meanings = (output_of,)
        else:
            meanings = (nested,) if nested == default else (nested, output_of)
        if entered is None and len(meanings) > 1:
            refuse(
                source, key,
                f"{list(nested)}: numbers of layers entered for some programs, of layers left for "
                f"others; add the key {_IDS} with the numbers of the layers entered",
            )  # fmt: skip
        if entered is not None and entered not in meanings:
            refuse(source, key, f"{list(nested)} contradicts {_IDS} {list(entered)}")
        entered = entered or meanings[0]
    return checked_taps(entered or default, target, source, _IDS)
