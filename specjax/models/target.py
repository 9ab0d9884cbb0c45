"""A target ready for use: configuration, parameters, tokenizer."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import sharding
from specjax.models import transformer
from specjax.models.config import ModelConfig, read_config
from specjax.models.hf import load_params

BUILTIN = pathlib.Path(__file__).parent / "builtin"
DTYPES = ("float32", "bfloat16")


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, config, tokens_BxT):
    hidden = transformer.forward(params, config, tokens_BxT).hidden_BxTxD
    return transformer.logits_of(params, hidden)


@functools.partial(jax.jit, static_argnums=1)
def _sample(params, num_layers: int):
    """In bfloat16, rows of the embedding, the head and all that three layers consist of.

    A few tell models apart, a merged adapter's too. Listed and stacked layers give the same.
    """
    layers, ids = params["layers"], sorted({0, num_layers // 2, num_layers - 1})
    if transformer.is_stacked(params):
        some = [jax.tree.map(lambda w, i=i: w[i, :8], layers) for i in ids]
    else:
        some = [jax.tree.map(lambda w: w[:8], layers[i]) for i in ids]
    ends = (
        params["final_norm"]["scale"],
        *(params[k][:64] for k in ("embed", "head") if k in params),
    )
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16), (some, ends))


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What `load_target` returns."""

    name: str
    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Any  # a transformers fast tokenizer, or None for a model made in memory
    mesh: jax.sharding.Mesh | None = None

    def logits(self, tokens_BxT):
        """Next-token logits BxTxV (float32) of plain causal decoding; tokens are int ids.

        Raises:
          ValueError: not rows of whole numbers, or ids outside the vocabulary. Ids that are on a
            device already, or traced, are not looked at.
        """
        tokens, V = tokens_BxT, self.config.vocab_size
        if not isinstance(tokens, jax.Array):
            try:
                tokens = np.asarray(tokens)
            except ValueError as error:
                raise ValueError(f"tokens: rows of one length are expected: {error}") from None
            if tokens.dtype.kind in "iu" and np.any((tokens < 0) | (tokens >= V)):
                outside = tokens[(tokens < 0) | (tokens >= V)][0]
                raise ValueError(f"tokens: {outside} is outside the vocabulary of {V}")
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens: BxT token ids are expected ([[1, 2]] is one row), not {tokens.dtype} of "
                f"shape {tokens.shape}"
            )
        return _logits(self.params, self.config, jnp.asarray(tokens, jnp.int32))

    @property
    def num_params(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(w.size for w in jax.tree.leaves(self.params))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the weights a drafter was made for, however they were loaded."""
        sample = sharding.fetch(_sample(self.params, self.config.num_layers))
        bits = b"".join(w.tobytes() for w in jax.tree.leaves(sample))
        return hashlib.sha256(bits).hexdigest()[:16]


def resolve_folder(folder_or_hub_id: str) -> pathlib.Path:
    """The local folder of "builtin", a path or a hub id (fetched). Raises FileNotFoundError."""
    if folder_or_hub_id == "builtin":
        return BUILTIN
    folder = pathlib.Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    parts = str(folder_or_hub_id).split("/")
    looks_like_path = folder_or_hub_id.startswith((".", "/", "~")) or len(parts) != 2
    if looks_like_path:
        raise FileNotFoundError(
            f"{folder_or_hub_id}: no such folder; expected 'builtin', a Hugging Face model folder "
            "or a hub id such as 'Qwen/Qwen3-0.6B'"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja"]  # never pickles, never code
    try:
        return pathlib.Path(snapshot_download(folder_or_hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds
        raise FileNotFoundError(
            f"{folder_or_hub_id}: neither a folder here nor reachable on the hub ({error})"
        ) from error


def load_target(
    folder_or_hub_id: str,
    dtype: str = "float32",
    mesh=None,
    scan_layers: bool = False,
    rules: sharding.Rules = (),
) -> Target:
    """Loads a Llama-family model; no torch is needed and nothing in the folder is executed.

    Args:
      folder_or_hub_id: "builtin", a Hugging Face folder, or a hub id.
      dtype: "float32" or "bfloat16", of parameters and activations.
      mesh: a ("data", "fsdp", "tensor") mesh to shard over; None is the default device.
      scan_layers: stack the layers and scan them (short compile times on deep models).
      rules: how parameters are split over the mesh, before `sharding.MODEL_RULES`.

    Raises:
      FileNotFoundError: no such folder, or a file that the folder must have is missing.
      ValueError: unsupported model, damaged or mismatched weights, a tokenizer larger than the
        embedding; names file and field.
    """
    from specjax.data.tokenizer import load_tokenizer

    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not supported; one of {DTYPES}")
    folder = resolve_folder(str(folder_or_hub_id))
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'}: {len(tokenizer)} tokens, but config.json has "
            f"vocab_size {config.vocab_size}"
        )
    sharding_of = None
    if mesh is not None:
        sharding.check_mesh(mesh, config)
        rules = (*rules, *sharding.MODEL_RULES)
        sharding_of = functools.partial(sharding.leaf_sharding, mesh, rules=rules)
    params = load_params(folder, config, dtype, sharding_of, scan_layers)
    name = str(folder_or_hub_id)  # of a hub id the folder is named after a commit
    if folder == BUILTIN:
        name = "builtin"
    elif pathlib.Path(name).is_dir():
        name = pathlib.Path(os.path.abspath(folder)).name  # of a link, its own
    return Target(name, config, params, tokenizer, mesh)
