"""What both EAGLE-3 layouts share: the head's tensors by name, and its config's keys.

A head is fc, one layer over [norm(embedding), norm(features)], a norm and a readout matrix. The
layouts differ in the layer's prefix and in where the config keeps its keys.
"""

from typing import Any

import numpy as np

from specjax.drafters.eagle3 import Eagle3
from specjax.interchange.folder import (
    Tensors,
    as_params,
    check_embedding,
    flag,
    refuse,
    same_as_target,
)
from specjax.interchange.vocabulary import read_vocabulary, split_vocabulary
from specjax.models.config import ModelConfig, config_from_hf, config_to_hf
from specjax.models.hf import split_layer
from specjax.models.target import Target

# Keys of heads unlike ours, with the values that say "not here".
ABSENT = {
    "norm_before_fc": (False,),  # one norm over all taps together
    "use_aux_norm": (False,),
    "bias": (False,),
    "logit_scale": (1,),
    "tie_word_embeddings": (False,),
    "parallel_drafting": (False,),
}


# ---- tensors -------------------------------------------------------------------------------------


def fusion_tensors(params) -> dict[str, np.ndarray]:
    """What stands before and after the layers of every feature drafter."""
    tensors = {"fc.weight": np.asarray(params["fc"]).T, "norm.weight": params["norm"]["scale"]}
    norms = enumerate(params.get("fc_norm", ()))
    tensors |= {f"fc_norm.{i}.weight": norm["scale"] for i, norm in norms}
    return {name: np.asarray(w) for name, w in tensors.items()}


def read_fusion(tensors: Tensors, taps: int, D: int, fc_norm: bool) -> dict[str, Any]:
    """The inverse of `fusion_tensors`."""
    params = {
        "fc": tensors.read("fc.weight", (D, taps * D)).T,
        "norm": {"scale": tensors.read("norm.weight", (D,))},
    }
    if fc_norm:
        names = [f"fc_norm.{i}.weight" for i in range(taps)]
        params["fc_norm"] = [{"scale": tensors.read(name, (D,))} for name in names]
    return params


def split_midlayer(layer, config: ModelConfig, prefix: str) -> dict[str, np.ndarray]:
    """A `MidLayer`: a decoder layer with a second norm, of the features."""
    tensors = split_layer(layer | {"attn_norm": layer["input_norm"]}, config, prefix)
    return tensors | {f"{prefix}hidden_norm.weight": np.asarray(layer["hidden_norm"]["scale"])}


def read_midlayer(tensors: Tensors, config: ModelConfig, prefix: str) -> dict[str, Any]:
    """The inverse of `split_midlayer`."""
    D = config.hidden_size
    layer = tensors.read_layer(prefix, config, 2 * D)
    layer["input_norm"] = layer.pop("attn_norm")
    return layer | {"hidden_norm": {"scale": tensors.read(f"{prefix}hidden_norm.weight", (D,))}}


def head_tensors(definition: Eagle3, params, prefix: str) -> dict[str, np.ndarray]:
    """Everything a head's file holds but the target's embedding."""
    tensors = fusion_tensors(params)
    tensors |= split_midlayer(params["midlayer"], definition.block, prefix)
    tensors["lm_head.weight"] = np.asarray(params["head"])
    if definition.draft_vocab_size:
        ids_W = definition.vocab_ids(params)
        tensors |= split_vocabulary(ids_W, definition.target.vocab_size)
    return tensors


# ---- config --------------------------------------------------------------------------------------


def layer_keys(definition: Eagle3, families: tuple[str, ...], dtype: str) -> dict[str, Any]:
    """The layer's geometry as config.json keys of a one-layer model.

    Raises:
      ValueError: a layer that is not of one of the families, or that no config can say.
    """
    block, target = definition.block, definition.target
    if block.model_type not in families:
        raise ValueError(
            f"own_layer: this layout holds a layer of {' or '.join(families)}, not of "
            f"{block.model_type}; train the head with an own_layer of such a geometry"
        )
    longest = max(block.max_position_embeddings, target.max_position_embeddings)
    one = block.replace(
        num_layers=1, tie_word_embeddings=False, max_position_embeddings=longest,
        bos_token_id=target.bos_token_id, eos_token_ids=target.eos_token_ids,
    )  # fmt: skip
    return config_to_hf(one, dtype)


def read_geometry(raw: dict[str, Any], source, target: ModelConfig) -> ModelConfig:
    """The layer's geometry; refuses another target's, and what our layer does not do."""
    other = [kind for kind in raw.get("layer_types") or () if kind != "full_attention"]
    if other:
        refuse(source, "layer_types", f"{other[0]!r} is not supported, only 'full_attention'")
    layer = config_from_hf(raw, source)
    same_as_target(layer, target, source)
    return layer.replace(
        num_layers=1, tie_word_embeddings=False, bos_token_id=None, eos_token_ids=(),
        max_position_embeddings=target.max_position_embeddings,
    )  # fmt: skip


def read_head(
    tensors: Tensors, source, raw, layer: ModelConfig, prefix: str, target: Target, **fields
):
    """(definition, parameters) of a head.

    Args:
      tensors: its file.
      source: its config.json, for messages.
      raw: the config, whose top level names the variant.
      layer: geometry of its layer.
      prefix: of the layer's tensors.
      target: the model it drafts for.
      **fields: of the drafter, as far as the layout has keys of its own for them.

    Raises:
      ValueError: a variant that the drafter does not have (names the key), tensors missing, of
        another shape or left over, or a head of another target.
    """
    for key, values in ABSENT.items():
        if raw.get(key) is not None and raw[key] not in values:
            refuse(source, key, f"{raw[key]!r} is not supported")
    D, V = target.config.hidden_size, target.config.vocab_size
    if raw.get("target_hidden_size") not in (None, D):
        refuse(
            source, "target_hidden_size",
            f"{raw['target_hidden_size']}, but the target's hidden_size is {D}; a head of a width "
            "of its own is not supported",
        )  # fmt: skip
    ids_W = read_vocabulary(tensors, source, raw.get("draft_vocab_size"), V)
    definition = Eagle3(
        target.config,
        draft_vocab_size=0 if ids_W is None else len(ids_W),
        fc_norm=flag(raw, source, "fc_norm"),
        norm_before_residual=flag(raw, source, "norm_before_residual"),
        norm_output=flag(raw, source, "norm_output"),
        own_layer=layer,
        **fields,
    )
    check_embedding(tensors, target)
    params = read_fusion(tensors, len(definition.taps), D, definition.fc_norm)
    params["midlayer"] = read_midlayer(tensors, definition.block, prefix)
    params["head"] = tensors.read("lm_head.weight", (definition.draft_vocab_size or V, D))
    if ids_W is not None:
        params["buffers"] = {"vocab_ids": ids_W}
    tensors.finish()
    return definition, as_params(params)
