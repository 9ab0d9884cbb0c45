"""Shared fixtures: small random targets, a compilation cache that outlives the process."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from specjax.models.config import ModelConfig
from specjax.models.target import Target
from specjax.models.transformer import init_params

cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/specjax-xla-cache")
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

SHARED = pathlib.Path(__file__).resolve().parents[1].parent / "shared"


def random_target(seed=0, scale=1.0, **changes) -> Target:
    """A tiny random Llama without a tokenizer; `scale` sharpens its distributions."""
    fields = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4,
        num_kv_heads=2, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    config = ModelConfig(**(fields | changes))
    params = init_params(jax.random.key(seed), config)
    # Embeddings of std 0.02 would make every distribution flat and every test toothless.
    params = params | {
        name: scale * 20 * params[name] for name in ("embed", "head") if name in params
    }
    return Target("random", config, params, tokenizer=None)


@pytest.fixture(scope="session")
def target() -> Target:
    """One tiny float32 target shared by all tests that do not care which."""
    return random_target()


@pytest.fixture(scope="session")
def shared_models() -> pathlib.Path:
    """The folder of real small checkpoints beside the clone; the test is skipped without it."""
    folder = SHARED / "data" / "models"
    if not folder.is_dir():
        pytest.skip("shared data is not here")
    return folder
