"""Every supported family gives the logits of transformers' own torch model, live and stored."""

import json
import pathlib

import jax
import numpy as np
import numpy_llama
import pytest
from families import FAMILIES, tokens, weights, write_folder

from specjax.models.config import config_from_hf, read_config
from specjax.models.hf import load_params, save_target
from specjax.models.target import Target

GOLDENS = pathlib.Path(__file__).parent / "goldens.npz"
TOLERANCE = 1e-4  # float32, largest absolute difference of any logit

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as file:
        return dict(file)


def loaded(folder) -> Target:
    config = read_config(folder)
    return Target("random", config, load_params(folder, config), tokenizer=None)


def check_logits(target, tokens_BxT, expected_BxTxV):
    actual = np.asarray(target.logits(tokens_BxT))
    assert actual.dtype == np.float32 and actual.shape == expected_BxTxV.shape
    assert np.abs(expected_BxTxV).max() > 2, "flat logits would agree whatever the model does"
    assert np.abs(actual - expected_BxTxV).max() < TOLERANCE


def test_stored_goldens_are_of_these_models(goldens):
    names = {key.rsplit("/", 1)[0] for key in goldens if "/" in key}
    assert names == set(FAMILIES), "run make_goldens.py"
    for family, raw in FAMILIES.items():
        assert json.loads(str(goldens[f"{family}/config"])) == raw, "run make_goldens.py"
    assert GOLDENS.stat().st_size < 300_000


@every_family
def test_logits_agree_with_stored_goldens(family, goldens, tmp_path):
    raw = FAMILIES[family]
    tensors = weights(raw, int(goldens["seed"]))
    tokens_BxT, expected = goldens[f"{family}/tokens"], goldens[f"{family}/logits"]
    folder = write_folder(tmp_path / "one", raw, tensors)
    check_logits(loaded(folder), tokens_BxT, expected)
    # The oracle of the other tests has to deserve the name.
    oracle, _ = numpy_llama.forward(raw, tensors, tokens_BxT[0])
    assert np.abs(oracle - expected[0]).max() < TOLERANCE
    # Where a tensor lies makes no difference.
    shards = loaded(write_folder(tmp_path / "three", raw, tensors, shards=3))
    assert_same_params(shards.params, loaded(folder).params)


def assert_same_params(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@every_family
def test_logits_agree_with_torch(family, goldens, tmp_path):
    torch = pytest.importorskip("torch")
    from make_goldens import torch_logits
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = FAMILIES[family]
    config = AutoConfig.for_model(**raw)
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 0.5 if weight.ndim == 1 or "embed" in name else 0.2)
        tokens_BxT = tokens(raw, *goldens[f"{family}/tokens"].shape, seed=4)
        expected = model(torch.as_tensor(tokens_BxT, dtype=torch.int64)).logits.numpy()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="12KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2

    ours = loaded(tmp_path / "one")
    # This version of transformers spells the config in its own way; it means the same model.
    assert ours.config == config_from_hf(raw)
    check_logits(ours, tokens_BxT, expected)
    assert_same_params(ours.params, loaded(tmp_path / "many").params)

    # And back: transformers reads what we write.
    save_target(tmp_path / "back", ours.config, ours.params, "float32")
    assert np.abs(torch_logits(tmp_path / "back", tokens_BxT) - expected).max() < TOLERANCE
