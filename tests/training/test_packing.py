"""Several texts in one row train as each text in a row of its own: every trained drafter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_target

from configs.common import loss as plain_loss
from specjax.data.rows import pack_rows, pad_marked
from specjax.drafters import DRAFTERS
from specjax.models.transformer import text_layout
from specjax.trained import init_drafter
from specjax.training.acceptance import _states_and_labels
from specjax.training.objective import drafter_loss, make_objective

T = 16
LENGTHS = (7, 9, 4, 12, 3, 6)  # some depths have no label in the short ones
CASES = {
    "fasteagle": (
        dict(num_layers=2, entry="wide_qkv", draft_vocab_size=40),
        dict(feature=0.3, chunk=4, gate="rejected"),
    ),
    "fasteagle_x": (dict(num_layers=2, rank=2), dict(gate="adaspec", hard=0.5)),
    "eagle3": (dict(steps=3, draft_vocab_size=40), {}),
    "p_eagle": (dict(num_layers=1, draft_depth=2), {}),
    "dflash": (dict(num_layers=1, block_size=3, anchors=3), {}),
    "medusa": (dict(heads=2), {}),
    "draft_model": (dict(num_layers=1), {}),
    "kangaroo": (dict(exit_layer=1), {}),
}


@pytest.fixture(scope="module")
def small():
    return random_target(
        num_layers=1, hidden_size=16, intermediate_size=16, num_heads=1, num_kv_heads=1
    )


@pytest.fixture(scope="module")
def batches():
    """(padded, packed) rows of the same texts."""
    rng = np.random.default_rng(0)
    sequences = []
    for length in LENGTHS:
        marks = rng.random(length) < 0.7
        marks[-1] = True
        sequences.append((rng.integers(0, 61, length).tolist(), marks))
    padded = pad_marked(sequences, T)
    packed = pack_rows(padded)
    assert len(packed["tokens"]) == 3
    return padded, packed


def test_every_trained_drafter_is_here():
    trained = {name for name, family in DRAFTERS.items() if family.trained is True}
    assert trained == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_packed_texts_train_as_texts_by_themselves(small, batches, name):
    fields, changes = CASES[name]
    size = fields.get("draft_vocab_size", 0)
    ids = np.random.default_rng(0).permutation(61)[:size] if size else None
    drafter = init_drafter(name, small, vocab_ids=ids, **fields)
    # Away from the start, where some families are still the target's own head at every depth.
    key = jax.random.key(1)
    noisy = lambda w: w + 0.1 * jax.random.normal(key, w.shape) if w.dtype == jnp.float32 else w  # noqa: E731
    params = {k: jax.tree.map(noisy, v) for k, v in drafter.params.items() if k != "buffers"}
    frozen = {"target": small.params, "buffers": drafter.params.get("buffers", {})}
    cfg = plain_loss()
    cfg.update(changes)
    if cfg.gate == "adaspec":
        frozen["reference"] = jax.tree.map(lambda w: 0.9 * w, params)
    objective = make_objective(cfg, 10)

    @jax.jit
    def run(params, batch):
        loss = lambda p: drafter_loss(drafter.definition, objective, p, frozen, batch)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    padded, packed = (run(params, rows) for rows in batches)
    assert f"agree_{drafter.definition.unrolled}" in padded[0][1]
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, packed, padded)


def test_without_segments_texts_run_together(small, batches):
    """The comparison above can fail."""
    drafter = init_drafter("draft_model", small, num_layers=1)
    objective, frozen = make_objective(plain_loss(), 10), {"target": small.params, "buffers": {}}
    joined = {k: v for k, v in batches[1].items() if k != "segments"}

    @jax.jit
    def loss(batch):
        return drafter_loss(drafter.definition, objective, drafter.params, frozen, batch)[0]

    apart, packed, together = (float(loss(rows)) for rows in (*batches, joined))
    assert abs(apart - packed) < 1e-5 and abs(apart - together) > 1e-3


def test_layout_of_texts():
    segments = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1] * 8])
    positions, mask = text_layout(np.zeros((2, 8), np.int32), segments)
    assert positions.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], list(range(8))]
    for b in range(2):
        for t in range(8):
            sees = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            assert np.flatnonzero(mask[b, t]).tolist() == sees
    plain_positions, plain_mask = text_layout(np.zeros((2, 8), np.int32))
    np.testing.assert_array_equal(plain_positions[0], positions[1])
    np.testing.assert_array_equal(plain_mask[0], mask[1])


def test_the_acceptance_head_reads_texts_apart(small, batches):
    """The first token of every text is given, not drawn."""
    drafter = init_drafter("draft_model", small, num_layers=1, stop="specdec")
    sides = drafter.definition, small.config, drafter.params, small.params
    _, labels, counts = _states_and_labels(*sides, batches[1], jax.random.key(0))
    first = text_layout(*(batches[1][k] for k in ("tokens", "segments")))[0] == 0
    assert not np.any(counts & first) and counts.sum() > 10
    assert np.all((labels >= 0) & (labels <= 1))
