"""The feature cache: the same features, the same loss, written once, resumed, refused in time."""

import collections
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_target

from configs.common import loss as plain_loss
from specjax.data import feature_cache
from specjax.data.feature_cache import FeatureCache, cache_bytes, with_features
from specjax.data.rows import Rows, pack_rows, pad_marked
from specjax.models.transformer import text_features
from specjax.trained import init_drafter
from specjax.training.objective import drafter_loss, make_objective

TAPS = (0, 1, 2)  # the last one is the LM head's input


@pytest.fixture(scope="module")
def small():
    return random_target(
        num_layers=2, hidden_size=16, intermediate_size=16, num_heads=1, num_kv_heads=1
    )


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(0, 61, n).tolist(), [True] * n) for n in (5, 8, 3, 8, 6, 4, 2)]
    return pad_marked(sequences, 8)


@pytest.fixture
def shards_of_two(monkeypatch, small):
    row = cache_bytes(small.config, 1, 8, TAPS, 4)
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 2 * row + 1)


def features(target, rows, taps=TAPS):
    given = [rows[name] for name in ("tokens", "segments") if name in rows]
    return text_features(target.params, target.config, taps, *given)


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_read_is_what_the_target_computes(small, rows, shards_of_two, tmp_path, packed):
    rows = pack_rows(rows) if packed else rows
    cache = FeatureCache(tmp_path, small, TAPS, rows, batch=3)
    picks = np.array([2, 0, 2, 1])
    expected = {name: np.asarray(x)[picks] for name, x in features(small, rows).items()}
    close(cache.batch(picks), expected)
    again = FeatureCache(tmp_path, small, TAPS, rows, batch=2)  # read, whatever the batch
    for name, array in again.batch(picks).items():
        np.testing.assert_array_equal(array, cache.batch(picks)[name])


def test_size_is_what_was_said(small, rows, shards_of_two, tmp_path, capsys):
    cache = FeatureCache(tmp_path, small, TAPS, rows, batch=3)
    size = cache_bytes(small.config, 7, 8, TAPS, 4)
    assert size == 7 * 8 * 3 * 16 * 4  # two inner taps and the head's input, which is the third
    files = list(cache.folder.iterdir())
    assert len(files) == 4 and size < sum(f.stat().st_size for f in files) < size + 4 * 400
    said = capsys.readouterr().out
    assert "10.5 KiB of disk for 7 rows of 8 tokens, 10.5 KiB of them still to write" in said
    FeatureCache(tmp_path, small, TAPS, rows, batch=3)
    assert "7 rows read from" in capsys.readouterr().out


def test_an_interrupted_cache_goes_on(small, rows, shards_of_two, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    written, write = [], feature_cache.write_safetensors

    def dying(path, tensors):
        if len(written) == 2:
            raise Killed
        written.append(path)
        write(path, tensors)

    monkeypatch.setattr(feature_cache, "write_safetensors", dying)
    with pytest.raises(Killed):
        FeatureCache(tmp_path, small, TAPS, rows, batch=2)
    times = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(feature_cache, "write_safetensors", write)
    cache = FeatureCache(tmp_path, small, TAPS, rows, batch=2)
    assert {path: path.stat().st_mtime_ns for path in written} == times
    assert len(list(cache.folder.iterdir())) == 4
    whole = FeatureCache(tmp_path / "whole", small, TAPS, rows, batch=2)
    for name, array in whole.batch(range(7)).items():
        np.testing.assert_array_equal(cache.batch(range(7))[name], array)


def test_everything_that_matters_is_in_the_key(small, rows, tmp_path):
    def folder(target=small, taps=TAPS, rows=rows):
        return FeatureCache(tmp_path, target, taps, rows, batch=7).folder

    # A fine-tuned layer, embedding and last norm as they were.
    layers = [dict(layer) for layer in small.params["layers"]]
    layers[1]["attn"] = layers[1]["attn"] | {"o": 1.01 * layers[1]["attn"]["o"]}
    tuned = dataclasses.replace(small, params=small.params | {"layers": layers})
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), small.params)
    half = dataclasses.replace(small, params=half)
    other = rows | {"tokens": rows["tokens"] + (rows["tokens"] == 51)}
    found = [
        folder(), folder(tuned), folder(half), folder(taps=(0,)), folder(rows=other),
        folder(rows=pack_rows(rows)),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    # What is supervised changes no feature, and the last tap is stored anyway.
    assert (
        folder(rows=rows | {"supervised": ~rows["supervised"]}) == folder(taps=(0, 1)) == found[0]
    )
    stored = FeatureCache(tmp_path, half, TAPS, rows, batch=7).batch([1])
    computed = feature_cache._features(half.params, half.config, (0, 1), rows["tokens"])
    assert stored["taps"].dtype == stored["hidden"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(stored["hidden"], np.asarray(computed["hidden"])[1:2])


def test_a_disk_that_is_too_small_is_refused(small, rows, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 11_000))
    with pytest.raises(ValueError, match=r"train\.cache_features: .* 10\.5 KiB, .*10\.21 KiB"):
        FeatureCache(tmp_path / "new" / "folder", small, TAPS, rows, batch=2)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 12_000))
    FeatureCache(tmp_path, small, TAPS, rows, batch=7)


def test_a_damaged_shard_is_named(small, rows, tmp_path):
    (path,) = FeatureCache(tmp_path, small, TAPS, rows, batch=7).folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"features-00000\.safetensors: .*remove it"):
        FeatureCache(tmp_path, small, TAPS, rows, batch=7)
    path.unlink()
    feature_cache.write_safetensors(path, {"hidden": np.zeros((7, 8, 4), np.float32)})
    with pytest.raises(ValueError, match=r"features-00000\.safetensors: holds .* expected"):
        FeatureCache(tmp_path, small, TAPS, rows, batch=7)


def test_only_whole_caches_are_read_by_several_processes(small, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"train\.cache_features: .* one process must write"):
        FeatureCache(tmp_path, small, TAPS, rows, batch=7)
    monkeypatch.undo()
    FeatureCache(tmp_path, small, TAPS, rows, batch=7)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    FeatureCache(tmp_path, small, TAPS, rows, batch=7)


@pytest.mark.parametrize("name", ["fasteagle", "draft_model"])
def test_the_loss_is_the_same_without_the_targets_forward(small, rows, tmp_path, name):
    fields = dict(feature_layers=TAPS) if name == "fasteagle" else {}
    drafter = init_drafter(name, small, num_layers=1, **fields)
    definition, rows = drafter.definition, pack_rows(rows)
    stream = Rows(rows, 2, seed=0)
    cached = with_features(stream, FeatureCache(tmp_path, small, definition.taps, rows, batch=2))
    objective = make_objective(plain_loss(), 10)

    @jax.jit
    def loss(target_params, batch):
        frozen = {"target": target_params, "buffers": {}}
        return drafter_loss(definition, objective, drafter.params, frozen, batch)[0]

    for step in range(3):
        np.testing.assert_allclose(
            loss(small.params, cached(step)), loss(small.params, stream.batch(step)), rtol=1e-6
        )
    # With the layers gone only the cache can know: they are not run.
    without = small.params | {"layers": jax.tree.map(jnp.zeros_like, small.params["layers"])}
    np.testing.assert_allclose(loss(without, cached(0)), loss(small.params, cached(0)), rtol=1e-7)
