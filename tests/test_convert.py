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
from specjax.models.hf import save_target

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a target and two of its drafters."""
    folder = tmp_path_factory.mktemp("models")
    target = toy_target(num_layers=7, vocab_size=262)
    save_target(folder / "target", target.config, target.params, "float32")
    save_tokenizer(train_bpe(["aaaa bbbb abab " * 9], 262), folder / "target", 64)
    target = specjax.load_target(folder / "target")
    specjax.init_drafter("eagle3", target, steps=2).save(folder / "eagle3")
    specjax.init_drafter("fasteagle", target, num_layers=1).save(folder / "fasteagle")
    return folder


def run(folder, **flags):
    """(exit status, all that was printed)."""
    command = [sys.executable, "-m", "experiments.convert"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_there_and_back(models):
    here = dict(target=models / "target")
    steps = [("eagle3", "speculators"), ("speculators", "midlayer"), ("midlayer", "back")]
    formats = {"speculators": "speculators", "midlayer": "eagle3", "back": "specjax"}
    for start, end in steps:
        status, page = run(
            models, drafter=models / start, format=formats[end], out=models / end, **here
        )
        assert status == 0 and f"{models / end}: {formats[end]}, " in page, page
    target = specjax.load_target(models / "target")
    first, last = (specjax.load_drafter(models / n, target).params for n in ("eagle3", "back"))
    jax.tree.map(np.testing.assert_array_equal, first, last)
    status, page = run(
        models, drafter=models / "back", format="eagle3", out=models / "back", **here
    )
    assert status == 2 and "not an empty folder" in page
    status, page = run(
        models, drafter=models / "fasteagle", format="fasteagle", out=models / "own", **here
    )
    assert status == 0 and "no server loads" in page
