"""What the fast rules return: root paths, tokens the target can say, nothing of other rows."""

import jax
import numpy as np
import proofs
import pytest
from samples import DEPTH, ROWS, RULES, VOCAB, WIDTH, batched, noises, repeated


@pytest.mark.parametrize("name", RULES)
def test_results_are_root_paths_and_rows_stand_alone(name):
    rule, drafts, targets, force = repeated(name, 3)
    noise = noises(3, len(targets))
    out = jax.device_get(batched(rule, noise, drafts, targets, force))
    assert out.count.min() >= 1 and out.count.max() <= DEPTH + 1
    assert len(np.unique(out.count)) > 1
    for i, (path, tokens, count) in enumerate(
        zip(out.path_D, out.tokens_A, out.count, strict=True)
    ):
        steps = path[: count - 1]
        assert (steps > 0).all() and (path[count - 1 :] == -1).all()
        assert (tokens[:count] >= 0).all() and (tokens[count:] == -1).all()
        assert (drafts.parent_T[i, steps] == [0, *steps][: count - 1]).all()
        assert (drafts.tokens_T[i, steps] == tokens[: count - 1]).all()
        assert drafts.valid_T[i, steps].all()
        if force is None and name != "unverified":  # what is not forced has probability
            rows = [0, *steps]
            assert (targets[i, rows, tokens[:count]] > -np.inf).all()

    # The same rows in another order and company, at the same shapes.
    order = np.random.default_rng(4).integers(0, len(targets), len(targets))
    pick = lambda x: None if x is None else x[order]  # noqa: E731
    parts = jax.tree.map(pick, (noise, drafts, targets, force))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(batched(rule, *parts)),
        jax.tree.map(pick, out),
    )


@pytest.mark.parametrize(
    "name",
    ["match", "token", "block", "rrs", "k_seq", "traversal", "typical", "lenient", "unverified"],
)
def test_more_padding_changes_nothing(name):
    rule, drafts, targets, force = repeated(name, 5)
    noise, rng = noises(5, len(targets)), np.random.default_rng(6)
    wider = [
        proofs.padded(rng, jax.tree.map(lambda x, i=i: x[i], drafts), t, ROWS + 3, WIDTH + 2)
        for i, t in enumerate(targets)
    ]
    grown = jax.tree.map(lambda *x: np.stack(x), *[draft for draft, _ in wider])
    grown = jax.tree.map(lambda a, b: a.astype(b.dtype), grown, drafts)
    longer = noise.replace(
        accept_T=np.append(noise.accept_T, noises(7, len(targets), 3).accept_T, 1)
    )
    logits = np.stack([logp for _, logp in wider]).astype(np.float32)
    assert logits.shape[1:] == (ROWS + 3, VOCAB)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(batched(rule, longer, grown, logits, force)),
        jax.device_get(batched(rule, noise, drafts, targets, force)),
    )
