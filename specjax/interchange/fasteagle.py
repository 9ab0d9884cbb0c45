"""FastEagle in a layout of our own, after speculators': no server loads it yet.

"layers.0" to "layers.N-1", read out after each through "norm" and the target's own head. Embedding
and head are the target's, frozen, and not stored; a fingerprint ties the folder to its target.
"""

import pathlib
from typing import Any

import numpy as np

from specjax.drafters.fasteagle import FastEagle
from specjax.interchange.folder import (
    CONFIG,
    Tensors,
    as_params,
    checked_taps,
    flag,
    layer_ids,
    refuse,
    same_as_target,
    section,
    verifier_section,
    written_taps,
)
from specjax.interchange.head import fusion_tensors, read_fusion, read_midlayer, split_midlayer
from specjax.interchange.speculators import NOT_OF_A_LAYER, proposal
from specjax.interchange.vocabulary import read_vocabulary, split_vocabulary
from specjax.models.config import config_from_hf, config_to_hf
from specjax.models.hf import split_layer
from specjax.models.target import Target

FAMILY = FastEagle
VERSION = 1  # of this layout
_IDS = "eagle_aux_hidden_state_layer_ids"
# Kernels outside the layers, stored transposed as torch's Linear has them: ours -> file, by entry.
_SAMPLING = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_GEOMETRY = (
    "hidden_size", "vocab_size", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
    "qkv_bias", "o_bias", "qk_norm",
)  # fmt: skip


def write(definition: FastEagle, params, target: Target, verifier: str | None, dtype: str):
    """(tensors, config) of a cascade.

    Raises:
      ValueError: what this layout cannot say (names the drafter's field), or a verifier that is no
        hub id.
    """
    block = definition.block.replace(num_layers=definition.num_layers)
    layer = {k: v for k, v in config_to_hf(block, dtype).items() if k not in NOT_OF_A_LAYER}
    record = {
        "architectures": ["FastEagleSpeculator"],
        "speculators_model_type": "fasteagle",
        "fasteagle_version": VERSION,
        "target_fingerprint": target.fingerprint,
        "draft_vocab_size": definition.draft_vocab_size or definition.target.vocab_size,
        "entry": definition.entry,
        "partial_alignment": definition.partial_alignment,
        _IDS: list(written_taps(definition)),
        "torch_dtype": dtype,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": "fasteagle",
            "default_proposal_method": "backbone",
            "proposal_methods": [
                {
                    "proposal_type": "backbone",
                    "speculative_tokens": definition.depth,
                    "candidates": definition.candidates,
                }
            ],
            "verifier": verifier_section(definition.target, verifier),
        },
    }
    tensors = fusion_tensors(params)
    for i, weights in enumerate(params["layers"]):
        split = split_midlayer if "hidden_norm" in weights else split_layer
        tensors |= split(weights, block, f"layers.{i}.")
    if "entry" in params:
        tensors["entry.weight"] = np.asarray(params["entry"]).T
        for name in ("g_norm", "e_norm"):
            tensors[f"{name}.weight"] = np.asarray(params[name]["scale"])
    if "sampling" in params:
        own = params["sampling"]
        for ours, theirs in _SAMPLING.items():
            tensors[f"sampling.{theirs}.weight"] = np.asarray(own[ours]).T
        tensors["sampling.norm.weight"] = np.asarray(own["norm"]["scale"])
    if definition.draft_vocab_size:
        tensors |= split_vocabulary(definition.vocab_ids(params), block.vocab_size)
    return tensors, record


def read(folder, raw: dict[str, Any], target: Target):
    """(definition, parameters) of a cascade.

    Raises:
      ValueError: another target or another version of the layout, a value out of range, tensors
        missing, of another shape or left over.
    """
    source = pathlib.Path(folder) / CONFIG
    if raw.get("fasteagle_version") != VERSION:
        refuse(source, "fasteagle_version", f"{raw.get('fasteagle_version')!r} is not {VERSION}")
    key = "transformer_layer_config"
    layer = config_from_hf(section(raw, source, key), f"{source}: {key}")
    same_as_target(layer, target.config, f"{source}: {key}")
    if raw.get("target_fingerprint") != target.fingerprint:
        refuse(
            source, "target_fingerprint",
            f"{raw.get('target_fingerprint')!r}: made for another target; {target.name} has "
            f"{target.fingerprint!r}",
        )  # fmt: skip
    for name in _GEOMETRY:
        if getattr(layer, name) != getattr(target.config, name):
            refuse(source, f"{key}: {name}", f"{getattr(layer, name)} is not the target's")
    tensors, chosen = Tensors(folder), proposal(raw, source)
    ids_W = read_vocabulary(tensors, source, raw.get("draft_vocab_size"), layer.vocab_size)
    taps = layer_ids(raw, source, _IDS)
    if taps is None:
        refuse(source, _IDS, "missing")
    fields = {
        "draft_vocab_size": 0 if ids_W is None else len(ids_W),
        "feature_layers": checked_taps(taps, target.config, source, _IDS),
        "intermediate_size": layer.intermediate_size,
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "num_layers": layer.num_layers,
        "entry": raw.get("entry"),
        "partial_alignment": flag(raw, source, "partial_alignment"),
        "draft_depth": chosen.get("speculative_tokens") or 0,
        "candidates": chosen.get("candidates") or 1,
    }
    try:
        definition = FastEagle(target.config, **fields)
    except ValueError as error:  # names the field, not the file
        raise ValueError(f"{source}: {error}") from error
    params = _read_params(tensors, definition)
    if ids_W is not None:
        params["buffers"] = {"vocab_ids": ids_W}
    tensors.finish()
    return definition, as_params(params)


def _read_params(tensors: Tensors, definition: FastEagle) -> dict[str, Any]:
    block, D = definition.block, definition.target.hidden_size
    outputs = 2 if definition.partial_alignment else 1
    params = read_fusion(tensors, len(definition.taps), D, True)
    wide = definition.entry == "wide_qkv"
    params["layers"] = [
        read_midlayer(tensors, block, f"layers.{i}.")
        if wide and i == 0
        else tensors.read_layer(f"layers.{i}.", block, outputs=outputs)
        for i in range(definition.num_layers)
    ]
    if not wide:
        params["entry"] = tensors.read("entry.weight", (D, 2 * D)).T
        for name in ("g_norm", "e_norm"):
            params[name] = {"scale": tensors.read(f"{name}.weight", (D,))}
    if definition.entry == "sampled":
        F = block.intermediate_size
        shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        params["sampling"] = {
            ours: tensors.read(f"sampling.{theirs}.weight", shapes[ours]).T
            for ours, theirs in _SAMPLING.items()
        } | {"norm": {"scale": tensors.read("sampling.norm.weight", (D,))}}
    return params
