"""experiments.convert as a person runs it."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from toys import toy_target

import specjax
from specjax.data.tokenizer import save_tokenizer, train_bpe
from specjax.drafters import Eagle3
from specjax.models.hf import save_target
from specjax.trained import TrainedDrafter

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a target and a head."""
    folder = tmp_path_factory.mktemp("models")
    target = toy_target(num_layers=7, vocab_size=262)
    save_target(folder / "target", target.config, target.params, "float32")
    save_tokenizer(train_bpe(["aaaa bbbb abab " * 9], 262), folder / "target", 64)
    target = specjax.load_target(folder / "target")
    definition, rng = Eagle3(target.config), np.random.default_rng(0)
    shapes = jax.eval_shape(definition.init, jax.random.key(0), target.params)
    params = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), shapes)
    TrainedDrafter(definition, params, target.fingerprint).save(folder / "head")
    return folder


def run(models, drafter, format, out):
    """(exit status, all that was printed)."""
    flags = dict(
        target=models / "target", drafter=models / drafter, format=format, out=models / out
    )
    command = [sys.executable, "-m", "experiments.convert"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_there_and_back(models):
    status, page = run(models, "head", "speculators", "theirs")
    assert status == 0 and f"{models / 'theirs'}: speculators, 17 tensors" in page, page
    status, page = run(models, "theirs", "specjax", "back")
    assert status == 0 and "eagle3" in page, page
    target = specjax.load_target(models / "target")
    first, last = (specjax.load_drafter(models / name, target).params for name in ("head", "back"))
    jax.tree.map(np.testing.assert_array_equal, first, last)
    status, page = run(models, "back", "eagle3", "head")
    assert status == 2 and "not an empty folder" in page, page
