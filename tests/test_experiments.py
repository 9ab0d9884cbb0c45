"""The compare experiment end to end on a tiny budget: what a run folder must hold."""

import dataclasses
import importlib
import json
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from toys import toy_target

import specjax
from experiments import compare, training_data
from specjax import sharding
from specjax.data.rows import pad_rows
from specjax.evaluation.benchmark import Shapes
from specjax.evaluation.report import report_run
from specjax.evaluation.results import FURTHER_KEYS, ROW_KEYS, read_results
from specjax.evaluation.spec_bench import compare_answers, read_answers
from specjax.models.config import ModelConfig
from specjax.models.hf import save_target
from specjax.models.target import BUILTIN
from specjax.models.transformer import init_params
from specjax.training.drafter import TrainingCost
from specjax.training.metrics import MetricsLog
from specjax.training.run import open_run

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMAND = [
    sys.executable, "-m", "experiments.main", "--config=configs/fasteagle.py:smoke",
    "--config.train.steps=6", "--config.train.checkpoint_every=3", "--config.train.tau_every=6",
    "--config.data.count=8", "--config.data.batch=8", "--config.eval.prompts=3",
    "--config.eval.max_new_tokens=16",
]  # fmt: skip


def run(*arguments):
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow
def test_the_common_table_holds_every_drafter_it_lists(tmp_path):
    """configs/compare.py:smoke, at less of everything but drafters."""
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.main", "--config=configs/compare.py:smoke",
            f"--workdir={tmp_path}", "--config.train.steps=2", "--config.train.tau_every=0",
            "--config.train.checkpoint_every=0", "--config.eval.prompts=2",
            "--config.eval.max_new_tokens=12", "--config.eval.temperatures=(0.0,)",
            "--config.eval.timing_repeats=1",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_results(tmp_path / "results.json")["rows"]
    listed = importlib.import_module("configs.compare").get_config("smoke").drafters
    assert {r["method"] for r in rows} == {"vanilla", *listed}
    assert max(r["nodes"] for r in rows) == 7
    for row in rows:
        verdict = row["lossless"]
        assert verdict["identical"] + verdict["ties"] == verdict["checked"] == 2


def test_the_common_table_lists_every_drafter_with_its_own_training():
    config = importlib.import_module("configs.compare").get_config()
    assert {d.drafter for d in config.drafters.values()} == set(specjax.drafter_names())
    for name, drafter in config.drafters.items():
        own = importlib.import_module(f"configs.{drafter.drafter}").get_config()
        if name not in own.drafters:  # variants of other names: compared as they are, by FastEagle
            assert name == "fasteagle_x" and not drafter.train
            continue
        assert compare.train_config(config, name) == compare.train_config(own, name), name


def test_what_is_written_up_can_be_drawn_again(tmp_path):
    config = importlib.import_module("configs.fasteagle").get_config("smoke")
    folder = open_run(str(tmp_path / "run"), config, {"seed": 0})
    metrics = MetricsLog(folder / "metrics.jsonl")
    bench = SimpleNamespace(config=config, folder=folder, target=toy_target(), metrics=metrics)
    samples = [{"method": "x", "prompt": "def", "pieces": [(" f", 0), ("(x)", 2)]}]
    compare.write_up(bench, [], samples, ["a note"], 0.0)
    page = (folder / "report.html").read_text()
    assert 'title="draft depth 2">(x)<' in page and "<li>a note</li>" in page and "seed=0" in page
    report_run(folder)
    assert (folder / "report.html").read_text() == page


@pytest.mark.slow
def test_a_run_folder_is_complete_and_resumes(tmp_path):
    folder = tmp_path / "run"
    first = run(f"--workdir={folder}")
    assert first.returncode == 0, first.stderr
    results = read_results(folder / "results.json")
    methods = ["vanilla", "eagle3", "fasteagle", "eagle3/best", "fasteagle/best"]
    for temperature in (0.0, 1.0):
        rows = [r for r in results["rows"] if r["temperature"] == temperature]
        assert sorted(r["method"] for r in rows) == sorted(methods)
        assert all(list(r) == [*ROW_KEYS, *FURTHER_KEYS] for r in rows)
    for row in results["rows"]:
        verdict = row["lossless"]
        if row["temperature"] == 0:
            assert verdict["identical"] + verdict["ties"] == verdict["checked"] == 3
        else:
            assert verdict["kind"] == "distribution" and 0 <= verdict["p_value"] <= 1
    vanilla = read_answers(folder / "answers" / "vanilla-temp-0.0.jsonl")
    for method in methods[1:]:
        name = f"{method.replace('/', '-')}-temp-0.0.jsonl"
        assert compare_answers(vanilla, read_answers(folder / "answers" / name)).equal
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "fasteagle/best" in page and 'id="samples"' in page
    report_run(folder)
    assert (folder / "report.html").read_text() == page
    assert json.loads((folder / "config.json").read_text())["overrides"]
    assert any("tau" in json.loads(line) for line in (folder / "metrics.jsonl").open())

    target = specjax.load_target("builtin")
    plain = specjax.generate(target, ["def main():\n"], max_new_tokens=20)
    for name in ("fasteagle", "eagle3"):
        drafter = specjax.load_drafter(folder / "drafters" / name, target)
        drafted = specjax.generate(target, ["def main():\n"], drafter, max_new_tokens=20)
        assert plain.tokens == drafted.tokens

    again = run(f"--workdir={folder}")
    assert again.returncode == 0, again.stderr
    assert "train/fasteagle: resuming at step 6 of 6" in again.stdout

    other = run(f"--workdir={folder}", "--config.seed=1")
    assert other.returncode == 2 and "seed: 0 there, 1 now" in other.stderr


UNTRAINED = ("prompt_lookup", "token_recycling")


@pytest.mark.parametrize("name", UNTRAINED)
def test_drafters_that_are_not_trained_cost_nothing(name, tmp_path, monkeypatch):
    """They come out as they went in, at the recipe's tree, and lie in the run folder."""
    monkeypatch.setattr(compare, "train_drafter", None)  # not even called
    config = importlib.import_module(f"configs.{name}").get_config()
    target = toy_target()
    bench = compare.Bench(
        config, tmp_path, target, mesh=None, metrics=MetricsLog(tmp_path / "metrics.jsonl"),
        train_prompts=[], train_rows={}, tasks={"none": []}, shapes={"none": Shapes()},
    )  # fmt: skip
    (method,) = compare.train_all(bench, seed=0)
    assert (method.name, method.cost, method.rule) == (name, TrainingCost(0, 0.0), None)
    tree = config.drafters[name].tree.to_dict()
    assert all(getattr(method.drafter.definition, k) == v for k, v in tree.items())
    loaded = specjax.load_drafter(tmp_path / "drafters" / name, target)
    assert loaded.definition == method.drafter.definition
    for budget in config.drafters[name].budgets:
        assert method.drafter.with_budget(**budget).definition.nodes > 1
    assert not bench.metrics.path.exists()


def test_a_ready_model_is_not_trained_but_its_head_is_fitted(tmp_path, monkeypatch):
    """The folder's weights come out as they went in; only steps of its own ask for training."""
    monkeypatch.setattr(compare, "train_drafter", None)  # not even called
    target, small = toy_target(), toy_target(seed=3, num_layers=1)
    save_target(tmp_path / "small", small.config, small.params, "float32")
    config = importlib.import_module("configs.draft_model").get_config("smoke").lock()
    for name in ("draft_model", "draft_model_specdec"):
        config.drafters[name].init.folder = str(tmp_path / "small")
    config.train.acceptance_steps, config.train.batch_size = 2, 1
    rows = pad_rows([([1, 2, 3, 4, 5], 1)], 8, True)
    bench = compare.Bench(
        config, tmp_path, target, sharding.make_mesh((1, 1, 1), jax.devices()[:1]),
        metrics=None, train_prompts=[], train_rows=rows, tasks={"none": []},
        shapes={"none": Shapes()},
    )  # fmt: skip
    names = ("draft_model", "draft_model_specdec")
    for method in compare.train_all(bench, 0, names):
        drafter = specjax.load_drafter(tmp_path / "drafters" / method.name, target)
        assert method.cost == TrainingCost(0, 0.0)
        for weight in ("embed", "layers", "final_norm"):
            expected = small.params[weight]
            jax.tree.map(np.testing.assert_array_equal, drafter.params[weight], expected)
    head = drafter.params["buffers"]["acceptance"]
    assert all(np.any(np.asarray(block["kernel"])) for block in head["blocks"])
    with config.unlocked():
        config.drafters.draft_model.train.steps = 5
    with pytest.raises(TypeError, match="not callable"):
        compare.train_all(bench, 0, ("draft_model",))


@pytest.fixture(scope="module")
def writers(tmp_path_factory):
    """A bench over four prompts of the built-in target, one of them without a known answer."""
    target = specjax.load_target("builtin")
    config = importlib.import_module("configs.fasteagle").get_config("smoke")
    folder = tmp_path_factory.mktemp("prompts")
    answers = ["return 1", "", "a" * 400, "x = 2"]
    lines = [
        json.dumps({"question_id": i, "category": "c", "turns": [f"def f{i}():"]} | reference)
        for i, reference in enumerate({"reference": a} if a else {} for a in answers)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    config.data.prompts, config.data.count = str(folder / "prompts.jsonl"), len(answers)
    ids = training_data.training_prompts(config, target)
    rows = pad_rows([(row, len(row)) for row in ids], config.data.length, True)
    bench = compare.Bench(
        config, folder, target, sharding.make_mesh((1, 1, 1), jax.devices()[:1]), metrics=None,
        train_prompts=ids, train_rows=rows, tasks={}, shapes={},
    )  # fmt: skip
    return bench, answers


def test_people_s_text_is_the_prompt_and_its_known_answer(writers):
    bench, answers = writers
    rows = training_data.text_rows(bench.config, bench.target, bench.train_prompts)
    for prompt, answer, tokens, mask in zip(
        bench.train_prompts, answers, rows["tokens"], rows["supervised"], strict=True
    ):
        text = tokens[mask].tolist()
        assert text[: len(prompt)] == prompt
        new = text[len(prompt) :]
        assert len(new) <= bench.config.data.max_new_tokens
        assert ("\n" + answer if answer else "").startswith(bench.target.tokenizer.decode(new))
        assert bool(new) == bool(answer)


def test_training_prompts_are_cut_by_their_own_field(writers):
    bench, _ = writers
    config = bench.config.copy_and_resolve_references()
    config.eval.max_prompt_tokens = 2  # of evaluation prompts only

    def prompts(most):
        config.data.max_prompt_tokens = most
        return training_data.training_prompts(config, bench.target)

    whole, cut = prompts(0), prompts(3)
    assert min(map(len, whole)) > 3
    assert cut == [row[:1] + row[-2:] for row in whole]


def test_a_source_that_cannot_be_is_refused_by_name(writers):
    bench, _ = writers
    cfg = compare.train_config(bench.config, "fasteagle")
    for source, gate, message in (
        ("web", "everything", "train.source: 'web' is unknown.*'mix'"),
        ("mix", "adaspec", "train.source: 'mix'.*'adaspec' trains two"),
    ):
        cfg.source, cfg.loss.gate = source, gate
        with pytest.raises(ValueError, match=message):
            training_data.batches(bench, "fasteagle", cfg, 0, "")


def test_rows_that_change_are_neither_packed_nor_cached(writers):
    bench, _ = writers
    cfg = compare.train_config(bench.config, "fasteagle")
    cfg.source, cfg.cache_features = "drafter", "somewhere"
    with pytest.raises(ValueError, match="train.cache_features: .*'drafter' change"):
        training_data.batches(bench, "fasteagle", cfg, 0, "")
    packing = bench.config.copy_and_resolve_references()
    packing.data.packing, cfg.cache_features = True, ""
    with pytest.raises(ValueError, match="data.packing: .*'drafter' change"):
        training_data.batches(dataclasses.replace(bench, config=packing), "fasteagle", cfg, 0, "")


def test_conversations_packed_and_cached_are_what_is_trained_on(writers, tmp_path, capsys):
    """A file with a damaged line -> marked answers -> packed rows -> batches with features."""
    bench, _ = writers
    turns = (("user", "a = 1 "), ("assistant", "b = 2 "))
    lines = [
        json.dumps({"messages": [{"role": role, "content": n * text} for role, text in turns]})
        for n in (1, 1, 9, 1, 2, 1)
    ]
    (tmp_path / "talk.jsonl").write_text("\n".join([*lines, "{"]))
    config = bench.config.copy_and_resolve_references()
    config.data.conversations, config.data.regenerate = str(tmp_path / "talk.jsonl"), False
    config.data.skip_damaged, config.data.packing, config.data.length = True, True, 32
    config.eval.chat_template.name, config.data.count = "plain", 99
    prompts, rows = training_data.training_data(config, bench.target, tmp_path)
    said = capsys.readouterr().out
    assert "1 damaged rows skipped" in said and "talk.jsonl:7: " in said and "cut to 32" in said
    assert rows["tokens"].shape == (6, 32)
    for prompt, tokens, mask in zip(prompts, rows["tokens"], rows["supervised"], strict=True):
        assert tokens[: len(prompt)].tolist() == prompt[:32]
        assert not mask[: len(prompt)].any()
    cfg = compare.train_config(config, "fasteagle")
    cfg.batch_size, cfg.cache_features = 2, str(tmp_path / "cache")
    packed = dataclasses.replace(bench, config=config, train_rows=rows, train_prompts=prompts)
    batch = training_data.batches(packed, "fasteagle", cfg, 0, "", (0, 1))(3, None)
    assert batch["segments"].max() > 1 and batch["tokens"].shape == (2, 32)
    assert batch["features"]["taps"].shape == (2, 32, 2 * bench.target.config.hidden_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNTRAINED)
def test_recipes_without_training_run(name, tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.main", f"--config=configs/{name}.py:smoke",
            f"--workdir={tmp_path}",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_results(tmp_path / "results.json")["rows"]
    assert {r["method"] for r in rows} == {"vanilla", name, f"{name}/best"}
    for row in rows:
        assert (row["train_tokens"], row["train_seconds"], row["drafter_parameters"]) == (0, 0, 0)
        if row["temperature"] == 0:
            assert row["lossless"]["identical"] + row["lossless"]["ties"] == 4
            assert row["method"] == "vanilla" or row["tau"] > 1
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_a_published_preset_runs_on_local_files(tmp_path):
    """Chat template, two turns, conversations, bfloat16, a chunked loss, trees of 57 rows."""
    config = ModelConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=2,
        num_kv_heads=1, head_dim=16, max_position_embeddings=512, bos_token_id=0,
        eos_token_ids=(1,),
    )  # fmt: skip
    folder, data = tmp_path / "target", tmp_path / "data"
    save_target(folder, config, init_params(jax.random.key(0), config), "bfloat16")
    shutil.copy(BUILTIN / "tokenizer.json", folder)
    rows = {
        "sharegpt": {"conversations": [{"from": "human", "value": "Count to ten."}]},
        "mt_bench": {"category": "math", "turns": ["What is 2 + 3?", "And doubled?"]},
    }
    for name, row in rows.items():
        (data / name).mkdir(parents=True)
        (data / name / "question.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    small = [
        "data.count=4", "data.batch=4", "data.length=128", "data.max_prompt_tokens=64",
        "data.max_new_tokens=32", "train.loss.chunk=64", "train.steps=2", "train.batch_size=2",
        "train.tau_every=0", "train.checkpoint_every=2", "eval.tasks=('mt_bench',)",
        "eval.temperatures=(0.0,)", "eval.prompts=2", "eval.max_new_tokens=8",
        "calibrate.prompts=1", "calibrate.max_new_tokens=4",
        "drafters.fasteagle.budgets=()", "drafters.eagle3.budgets=()",
        "drafters.eagle3.init.draft_vocab_size=512",
        f"target.name={folder}", f"data.data_dir={data}",
    ]  # fmt: skip
    done = subprocess.run(
        [
            sys.executable, "-m", "experiments.main", "--config=configs/fasteagle.py:vicuna_13b",
            f"--workdir={tmp_path / 'run'}", *(f"--config.{field}" for field in small),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_results(tmp_path / "run" / "results.json")["rows"]
    assert {r["nodes"] for r in rows} == {1, 57} and len(rows) == 5
    # Two prompts of two turns; second ones are compared where the first were equal.
    assert all(2 <= r["lossless"]["checked"] <= 4 for r in rows)


@pytest.mark.slow
def test_bad_configs_name_their_field(tmp_path):
    """Without a traceback, and with the run folder left for the corrected command."""
    unknown = run("--config.train.stepz=3")
    assert unknown.returncode == 2 and "stepz" in unknown.stderr
    workdir = f"--workdir={tmp_path}"
    for arguments, words in (
        (["--config=configs/fasteagle.py:nope"], "main: --config: fasteagle: unknown preset"),
        ([workdir, "--config.eval.rule=tokens"], "eval.rule: 'tokens' is unknown"),
        ([workdir, "--config.eval.tasks=('none.jsonl',)"], "none.jsonl: no such prompt file"),
        ([workdir, "--config.seed=1"], "seed: 0 there, 1 now"),
    ):
        refused = run(*arguments)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
    assert "Traceback" in run(workdir, "--config.eval.rule=tokens", "--verbosity=1").stderr
