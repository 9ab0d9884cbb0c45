"""Shared fixtures: small random targets, a compilation cache that outlives the process."""

import gc
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from toys import random_target

from specjax.models.target import Target

cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/specjax-xla-cache")
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; all else runs on the first
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

MAPPINGS = pathlib.Path("/proc/self/maps")
MANY_MAPPINGS = 20_000  # Linux gives a process 65530; past them the next compilation aborts

SHARED = pathlib.Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="module", autouse=True)
def bounded_mappings():
    """Every compiled program holds memory mappings: a module that ends with too many drops all."""
    yield
    if MAPPINGS.is_file() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


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
