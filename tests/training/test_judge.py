"""The judge's head: learns a planted direction, reads the state at the token, survives a file."""

import numpy as np
import pytest
from toys import toy_target

from specjax.training.judge import Labelled, fit_judge, token_features
from specjax.verification import JudgeHead


@pytest.fixture(scope="module")
def labelled():
    """(target, examples, features, labels): acceptable where a hidden direction says so."""
    target = toy_target()
    rng = np.random.default_rng(0)
    direction = rng.normal(size=target.config.hidden_size)
    examples, rows = [], []
    for _ in range(40):
        prompt, tokens = rng.integers(12, size=3).tolist(), rng.integers(12, size=20).tolist()
        features = token_features(target, prompt + tokens)[len(prompt) :]
        rows.append(features)
        examples.append(Labelled(prompt, tokens, (features @ direction > 0).tolist()))
    return target, examples, np.concatenate(rows), np.concatenate([e.acceptable for e in examples])


def test_head_learns_the_planted_direction(labelled):
    target, examples, features, labels = labelled
    head = fit_judge(target, examples[:30])
    held_out = slice(30 * 20, None)
    right = (np.asarray(head.logit(features[held_out])) > 0) == labels[held_out]
    assert right.mean() > 0.95


def test_features_are_read_at_the_token_not_before_it(labelled):
    target, (first, *_), _, _ = labelled
    ids = [*first.prompt, *first.tokens]
    full, shorter = token_features(target, ids), token_features(target, ids[:-1])
    np.testing.assert_allclose(full[:-1], shorter, atol=1e-5)
    changed = token_features(target, [*ids[:-1], (ids[-1] + 1) % 12])
    assert np.abs(changed[-1] - full[-1]).max() > 1e-2  # the last token's own state moves
    np.testing.assert_allclose(changed[:-1], full[:-1], atol=1e-5)


def test_mistakes_can_weigh_more(labelled):
    target, examples, features, labels = labelled
    noisy = [
        Labelled(e.prompt, e.tokens, np.random.default_rng(i).random(20) > 0.3)
        for i, e in enumerate(examples[:10])
    ]
    share = [
        float((np.asarray(fit_judge(target, noisy, w).logit(features)) > 0).mean())
        for w in (1.0, 8.0)
    ]
    assert share[1] < share[0]


def test_head_survives_its_file(labelled, tmp_path):
    target, examples, features, _ = labelled
    head = fit_judge(target, examples[:5])
    head.save(tmp_path / "head.safetensors")
    again = JudgeHead.load(tmp_path / "head.safetensors")
    np.testing.assert_allclose(again.logit(features), head.logit(features), rtol=1e-6)
    (tmp_path / "bad.safetensors").write_bytes(b"no head")
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a judge head"):
        JudgeHead.load(tmp_path / "bad.safetensors")


def test_bad_labels_are_refused(labelled):
    target, examples, _, _ = labelled
    with pytest.raises(ValueError, match="one label for each token"):
        Labelled([1], [2, 3], [True])
    with pytest.raises(ValueError, match="both acceptable tokens and mistakes"):
        fit_judge(target, [Labelled([1], [2, 3], [True, True])])
