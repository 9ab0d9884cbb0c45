"""Rows put together are means over the very rows they are of."""

import numpy as np
import pytest

from specjax.evaluation.summaries import by_setting, mean_by_setting, seed_table


def row(method, task, temperature, seed, tau):
    return {
        "method": method, "task": task, "temperature": temperature, "seed": seed, "batch": 1,
        "tau": tau,
    }  # fmt: skip


@pytest.fixture
def rows():
    """Two methods, two tasks, two temperatures, three seeds; one method skips a task."""
    rng = np.random.default_rng(0)
    return [
        row(method, task, temperature, seed, float(rng.uniform(1, 4)))
        for seed in (2, 0, 1)
        for task in ("code", "chat")
        for temperature in (0.0, 1.0)
        for method in ("vanilla", "eagle3", "fasteagle")
        if (method, task) != ("eagle3", "chat")
    ]


def test_means_are_over_the_rows_of_a_method_in_a_setting(rows):
    methods, settings, mean_MxS = mean_by_setting(rows)
    assert methods == ["eagle3", "fasteagle"]
    assert settings == ["code T=0", "code T=1", "chat T=0", "chat T=1"]
    for m, method in enumerate(methods):
        for s, where in enumerate(settings):
            task, temperature = where.split(" T=")
            taus = [
                r["tau"] for r in rows
                if (r["method"], r["task"], r["temperature"]) == (method, task, float(temperature))
            ]  # fmt: skip
            expected = np.mean(taus) if taus else np.nan
            np.testing.assert_allclose(mean_MxS[m, s], expected)
    assert np.isnan(mean_MxS).sum() == 2
    # The order of rows decides the order of names, nothing else.
    again = mean_by_setting(sorted(rows, key=lambda r: r["seed"]))[2]
    np.testing.assert_allclose(again, mean_MxS)


def test_a_seed_table_has_every_seed_its_mean_and_spread(rows):
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in seed_table(rows).splitlines()
    ]
    head = ["method", "setting", "seed 0", "seed 1", "seed 2", "mean tau", "sd"]
    assert lines[0] == head and len(lines) == 2 + 6
    for method, where, *numbers in lines[2:]:
        found = by_setting(rows)[2][method, where]
        values = [found[seed] for seed in (0, 1, 2)]
        expected = [*values, np.mean(values), np.std(values, ddof=1)]
        assert numbers == [f"{number:.2f}" for number in expected]


def test_one_seed_has_no_spread():
    assert "| 2.50 | 2.50 | - |" in seed_table([row("fasteagle", "code", 0.0, 7, 2.5)])


def test_rows_given_twice_are_refused(rows):
    with pytest.raises(ValueError, match="eagle3, code T=0, seed 2: given twice"):
        by_setting([*rows, rows[1]])
