"""Run folders and recipes."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import builtin_target, common, eagle3, fasteagle
from experiments.compare import any_paths, budgets_of, init_of
from specjax.data.rows import Rows, pad_rows
from specjax.data.windows import Windows
from specjax.distillation.deepkd import STREAMS, DeepKD, deepkd_trace
from specjax.distillation.gsnr import probe_gsnr
from specjax.drafters import DRAFTERS
from specjax.models.config import ModelConfig
from specjax.processes import lock
from specjax.training.optimizers import make_optimizer
from specjax.training.run import open_run, plain
from specjax.training.state import create

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOT_RECIPES = ("__init__", "builtin_target", "common")


def test_config_is_recorded_and_reopened(tmp_path):
    config = fasteagle.get_config("smoke")
    config.train.steps = 7
    folder = open_run(str(tmp_path / "run"), config, {"train.steps": 7})
    record = json.loads((folder / "config.json").read_text())
    assert record["config"]["train"]["steps"] == 7
    assert record["overrides"] == {"train.steps": 7}
    assert open_run(str(folder), config) == folder


def test_a_folder_of_another_config_is_refused_by_field(tmp_path):
    config = fasteagle.get_config("smoke")
    config.train.steps = 7
    open_run(str(tmp_path), config)
    config.train.steps = 8
    with pytest.raises(ValueError, match="another config's run.*:\n  train.steps: 7 there, 8 now$"):
        open_run(str(tmp_path), config)


def test_what_one_config_lacks_is_one_line(tmp_path):
    open_run(str(tmp_path), fasteagle.get_config("smoke"))
    config = fasteagle.get_config("smoke")
    del config.drafters["eagle3"]
    config.drafters.more = config.drafters.fasteagle
    with pytest.raises(ValueError) as refusal:
        open_run(str(tmp_path), config)
    fields = str(refusal.value).splitlines()[1:]
    assert fields == ["  drafters.eagle3: only there", "  drafters.more: only now"]


@pytest.mark.parametrize("made, free, bound", [
    # what is in the folder, what may be corrected, what may not
    ((), {"eval.rule": "match", "eval.max_prompt_tokens": 9}, {"train.steps": 8}),
    (("data", "checkpoints", "metrics.jsonl"), {"eval.batch": 2, "eval.temperatures": (0.5,)},
     {"eval.max_prompt_tokens": 9, "eval.prompts": 3}),
    (("drafters", "answers"), {}, {"eval.rule": "match", "eval.batch": 2}),
    (("results.json",), {}, {"eval.repeats": 2}),
])  # fmt: skip
def test_eval_may_be_corrected_until_something_depends_on_it(tmp_path, made, free, bound):
    def changed(**fields):
        config = fasteagle.get_config("smoke")
        config.update_from_flattened_dict(fields)
        return config

    open_run(str(tmp_path), changed())
    for name in made:
        (tmp_path / name).touch()
    before = (tmp_path / "config.json").read_text()
    for field, value in bound.items():
        with pytest.raises(ValueError, match=f"\n  {field}: .* there, "):
            open_run(str(tmp_path), changed(**free, **{field: value}))
        assert (tmp_path / "config.json").read_text() == before
    with lock(tmp_path):  # a run that is at it keeps its config
        open_run(str(tmp_path), changed())
        if free:
            with pytest.raises(ValueError, match="another run is writing here"):
                open_run(str(tmp_path), changed(**free))
        assert (tmp_path / "config.json").read_text() == before
    open_run(str(tmp_path), changed(**free), free)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"] == plain(changed(**free))
    assert not free or record["overrides"] == plain(free)


def test_a_folder_with_a_broken_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not a run's config"):
        open_run(str(tmp_path), fasteagle.get_config("smoke"))


@pytest.mark.parametrize("recipe", [fasteagle, eagle3])
@pytest.mark.parametrize("preset", ["", "smoke", *fasteagle.PUBLISHED])
def test_every_preset_builds(recipe, preset):
    config = recipe.get_config(preset)
    assert config.drafters and config.eval.temperatures == (0.0, 1.0)
    json.dumps(config.to_dict())


RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in NOT_RECIPES)


@pytest.mark.parametrize("preset", ["", "smoke"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_s_drafters_exist_with_every_tree(name, preset):
    config = importlib.import_module(f"configs.{name}").get_config(preset)
    config.lock()
    target = ModelConfig(
        vocab_size=3072, hidden_size=32, intermediate_size=64, num_layers=6, num_heads=4,
        num_kv_heads=2, head_dim=8,
    )  # fmt: skip
    assert config.name == name and len(config.drafters)
    for cfg in config.drafters.values():
        drafter = DRAFTERS[cfg.drafter].of(target, init_of(cfg))
        for budget in budgets_of(cfg):
            shaped = drafter.with_budget(**any_paths(budget))
            assert shaped.nodes > shaped.depth >= 1
        assert "best_nodes" not in cfg.tree or shaped.nodes == cfg.tree.best_nodes


def test_configs_are_locked_and_presets_are_named():
    config = fasteagle.get_config()
    config.lock()
    with pytest.raises(AttributeError, match="stepz"):
        config.train.stepz = 3
    with pytest.raises(TypeError):
        config.train.steps = "many"
    for recipe in (fasteagle, builtin_target):
        with pytest.raises(ValueError, match="unknown preset 'nope'"):
            recipe.get_config("nope")


def test_every_optimiser_is_a_change_of_one_field():
    for recipe in (fasteagle, builtin_target):
        config = recipe.get_config()
        cfg = config.optimizer if "optimizer" in config else config.train.optimizer
        for name in ("adamw", "muon"):
            cfg.name = name
            make_optimizer(cfg, 10)


def test_windows_are_pure_and_cover_an_epoch():
    stream = np.arange(1000, dtype=np.int32)
    a, b = Windows(stream, 7, seed=3), Windows(stream, 7, seed=3)
    np.testing.assert_array_equal(a.batch(11, 4), b.batch(11, 4))
    starts = sorted(int(a.window(i)[0]) for i in range(a.per_epoch))
    assert np.diff(starts).tolist() == [7] * (a.per_epoch - 1)
    assert all(np.diff(w).tolist() == [1] * 6 for w in a.batch(0, 5))
    with pytest.raises(ValueError, match="too few"):
        Windows(stream[:10], 7)


def test_rows_are_pure_and_masked():
    rows = pad_rows([([5, 6, 7, 8], 2), ([1] * 9, 3)], 6, supervise_prompt=False)
    assert rows["tokens"].tolist() == [[5, 6, 7, 8, 0, 0], [1] * 6]
    assert rows["supervised"].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]
    stream = Rows(rows, 2, seed=0)
    np.testing.assert_array_equal(stream.batch(5)["tokens"], stream.batch(5)["tokens"])
    assert sorted(stream.batch(3)["tokens"][:, 0].tolist()) == [1, 5]
    with pytest.raises(ValueError, match="fewer than batch_size"):
        Rows(rows, 3, seed=0)


def test_a_fresh_state_shares_no_memory():
    """It is donated whole: a buffer that occurs twice would be given away twice."""
    params = {"w": jnp.ones((3, 2))}
    tx = optax.chain(probe_gsnr(), deepkd_trace())
    state = create(params, tx)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("normalised", [True, False])
def test_every_optimiser_takes_the_three_streams(name, normalised):
    """With gradients in one stream and no deltas it is what that stream's gradient is to it."""
    cfg = common.optimizer(learning_rate=1e-2, warmup_steps=1)
    cfg.name, cfg.clip_norm = name, 1e9
    params = {"layers": [{"mlp": {"down": jnp.ones((4, 3))}}], "scale": jnp.ones(3)}
    tx = make_optimizer(cfg, 10, DeepKD(deltas=(0.0, 0.0, 0.0), normalised=normalised))
    state, steps = tx.init(params), []
    for seed in range(3):
        grads = jax.tree.map(
            lambda w, s=seed: jax.random.normal(jax.random.key(s), w.shape), params
        )
        thirds = {s: jax.tree.map(lambda g: g / 3, grads) for s in STREAMS}
        whole = {s: grads if s == "tcg" else jax.tree.map(jnp.zeros_like, grads) for s in STREAMS}
        a, _ = tx.update(thirds, state, params)
        b, state = tx.update(whole, state, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)
        steps.append(b)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(steps))
