"""report.html: one self-contained page about a run. It asks nothing of the network or a script."""

import json
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from specjax.evaluation import figures
from specjax.evaluation.findings import (
    curves_over_seeds,
    fastest_by_setting,
    notes_on,
    over_seeds,
)
from specjax.evaluation.page import DEFINITIONS, HOW_TO_READ, PAGE, STYLE
from specjax.evaluation.records import VANILLA
from specjax.evaluation.run_folder import Run, read_run
from specjax.evaluation.tables import COLUMNS, count, setting, shown_columns
from specjax.files import write_text
from specjax.shades import shade


def report_run(folder: str | os.PathLike) -> Path:
    """Write FOLDER/report.html from the other files of a run folder; returns its path.

    Raises what `read_run` raises, and OSError, naming the file, when it cannot be written.
    """
    path = Path(folder) / "report.html"
    write_text(path, render(read_run(folder)))
    return path


def render(run: Run) -> str:
    """The page, as HTML."""
    results, rows = run.results, run.results["rows"]
    title = f"Speculative decoding of {results['target'].get('name', 'the target')}"
    sections = {
        "Results": _table(rows),
        "Figures": _result_figures(rows),
        "Training": _training_figures(rows, run.curves),
        "Samples": _samples(run.samples),
        "Notes": _notes([*notes_on(rows), *run.notes]),
        "What ran on what": _facts(results, run.config, run.overrides),
        "What the numbers mean": DEFINITIONS,
    }
    sections = {name: content for name, content in sections.items() if content}
    links = "".join(f'<a href="#{_id(name)}">{name}</a>' for name in sections)
    body = [
        f'<header><h1>{escape(title)}</h1><p class="meta">{_summary(results)}</p>{_tiles(rows)}',
        f'<p>{HOW_TO_READ}</p><nav aria-label="Sections">{links}</nav></header>\n<main>',
        *(
            f'<section aria-labelledby="{_id(name)}"><h2 id="{_id(name)}">{name}</h2>{content}'
            "</section>"
            for name, content in sections.items()
        ),
        "</main>",
    ]
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body))


def _id(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _summary(results: dict) -> str:
    """The line below the title."""
    target = results["target"]
    parts = [f"{count(target['parameters'])} parameters"] if "parameters" in target else []
    parts += [f"{target['layers']} layers"] if "layers" in target else []
    return escape(" · ".join([*parts, results["device"], results["dtype"], _seeds(results)]))


def _seeds(results: dict) -> str:
    seeds = figures.unique(row["seed"] for row in results["rows"]) or [results["seed"]]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _tiles(rows: Sequence[dict]) -> str:
    """The fastest exact method of each setting, be it slower than vanilla."""
    tiles = ""
    for row in fastest_by_setting(rows):
        low, high = row["speedup_ci95"]
        lead = "fastest is" if row["speedup"] > 1 else "none beats vanilla; nearest is"
        seeds = f"mean of {row['seeds']} seeds " if row["seeds"] > 1 else ""
        tiles += (
            f"<li{_class(gain=low > 1)}><span>{escape(setting(row))}</span>"
            f"<strong>{row['speedup']:.2f}×</strong>"
            f"<span>{lead} <b>{escape(row['method'])}</b>, {seeds}[{low:.2f}, {high:.2f}]<br>"
            f"tau {row['tau']:.2f} where {row['break_even_tau']:.2f} breaks even</span></li>"
        )
    return f'<ul class="tiles">{tiles}</ul>' if tiles else ""


# ---- the table -----------------------------------------------------------------------------------


def _table(rows: Sequence[dict]) -> str:
    """A group of lines per setting and seed, which stand above it instead of in columns.

    What to look at first comes first, for a phone shows few columns; methods as in the figures.
    """
    grouped = ("task", "temperature", "batch", "seed")
    shown = dict.fromkeys(["method", "speedup", "lossless", *shown_columns(rows)])
    columns = {name: COLUMNS[name] for name in shown if name not in grouped}
    order = [VANILLA, *figures.ranked(rows)]
    several = len({row["seed"] for row in rows}) > 1
    name_of = lambda row: setting(row) + (f", seed {row['seed']}" if several else "")  # noqa: E731
    heads = "".join(
        f'<th scope="col"{_class(left=column.left)}>'
        f"{escape(column.heading).replace(chr(10), '<br>')}</th>"
        for column in columns.values()
    )
    looks, bodies = figures.looks_of(rows), ""
    for name, members in figures.group(rows, name_of).items():
        best = {key: _highest(members, key) for key in ("tau", "speedup")}
        members = sorted(members, key=lambda row: order.index(row["method"]))
        lines = "".join(_line(row, columns, best, looks) for row in members)
        head = f'<th scope="rowgroup" colspan="{len(columns)}"><span>{escape(name)}</span></th>'
        bodies += f'<tbody><tr class="group">{head}</tr>{lines}</tbody>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table of results">'
        "<table><caption><span>Bold: the highest of its setting. Red: slower than vanilla, or not "
        f"its output.</span></caption><thead><tr>{heads}</tr></thead>{bodies}</table></div>"
    )


def _line(row: dict, columns: dict, best: dict, looks: dict) -> str:
    dot = f'<i class="dot" style="background:{looks[row["method"]].colour}"></i>'
    breakable = re.sub("([/_])", r"\1<wbr>", escape(row["method"]))
    cells = f'<th scope="row">{dot}{breakable}</th>'
    for name, column in columns.items():
        if name == "method":
            continue
        top = name in best and row["method"] != VANILLA and row[name] == best[name]
        classes = _class(left=column.left, bad=column.bad(row), best=top)
        detail = column.detail(row)
        below = f"<small>{escape(detail)}</small>" if detail else ""
        cells += f"<td{classes}>{escape(column.text(row))}{below}</td>"
    return f"<tr>{cells}</tr>"


def _highest(rows: Sequence[dict], key: str) -> float | None:
    """The highest value of the exact methods that draft."""
    values = [row[key] for row in rows if row["method"] != VANILLA and row["exact"]]
    return max(values, default=None)


def _class(**names: bool) -> str:
    """The class attribute of an element that has the true ones of `names`."""
    given = " ".join(name for name, true in names.items() if true)
    return f' class="{given}"' if given else ""


# ---- figures -------------------------------------------------------------------------------------


def _result_figures(rows: Sequence[dict]) -> str:
    if not rows:
        return ""
    several = len({row["seed"] for row in rows}) > 1
    ranges = "Lines: lowest to highest seed." if several else "Lines: 95% intervals over prompts."
    rows = over_seeds(rows)
    time = [
        _figure(
            f"Where a round's time goes, {name}",
            "Draft and verify are timed apart; the rest is what the round takes beyond them.",
            figures.draw_rounds(rows, name),
        )
        for name in figures.unique(map(figures.load, rows))
    ]
    drafted = [row for row in rows if row["method"] != VANILLA]
    if not drafted:
        return _grid(time)
    settings = figures.unique(map(setting, drafted))
    accepted = figures.unique(setting(row) for row in drafted if row["acceptance_by_depth"])
    return _grid(
        [
            _figure(
                "tau by task and temperature",
                f"Fastest on average first. {ranges}",
                figures.draw_tau(rows),
            ),
            _figure(
                "Speedup by setting",
                "Paired with vanilla by prompt. Hollow marks: lossy rules.",
                figures.draw_speedups(rows),
            ),
            *(
                _figure(
                    f"Acceptance by depth, {name}",
                    f"Of the rounds that got so deep. Hollow: fewer than {figures.FEW} rounds.",
                    figures.draw_acceptance(rows, name),
                )
                for name in accepted
            ),
            *(
                _figure(
                    f"tau against draft cost, {name}",
                    "Best is the upper left: many tokens, a cheap draft. Verifying does not count.",
                    figures.draw_cost(rows, name),
                )
                for name in settings
            ),
            *time,
        ]
    )


_TRAINING = {
    "loss": (
        "Training loss",
        "A sum over depths: it compares methods of one objective and as many depths.",
        "loss",
    ),
    "agree_1": (
        "Agreement at depth 1",
        "Share of the target's choices it predicts.",
        "agreement at depth 1",
    ),
    "tau": ("Decode-time tau", "A few prompts, decoded greedily.", "tau"),
}


def _training_figures(rows: Sequence[dict], curves: dict) -> str:
    looks, drawn = figures.looks_of(rows), []
    for key, (caption, about, label) in _TRAINING.items():
        lines = curves_over_seeds(curves.get(key, {}))
        lines = {name: figures.thin_out(*line) for name, line in lines.items()}
        if lines:
            drawn.append(_figure(caption, about, figures.draw_curves(lines, label, looks)))
    return _grid(drawn, narrow=True) if drawn else ""


def _figure(caption: str, about: str, svg: str) -> str:
    return (
        f'<figure><figcaption><h3>{escape(caption)}</h3><p class="about">{escape(about)}</p>'
        f"</figcaption>{svg}</figure>"
    )


def _grid(parts: Sequence[str], narrow: bool = False) -> str:
    return f'<div class="figures{" narrow" if narrow else ""}">{"".join(parts)}</div>'


# ---- texts ---------------------------------------------------------------------------------------


def _samples(samples: Sequence[dict]) -> str:
    """One answer a method. A prompt that all share stands once."""
    if not samples:
        return ""
    depths = [shade(depth) for sample in samples for _, depth in sample["pieces"]]
    swatches = "".join(_piece(f"depth {n}", n) for n in range(1, max(depths, default=0) + 1))
    legend = (
        "<p>Shaded: drafted and accepted, the stronger the deeper in the draft. Unshaded: the "
        f'target\'s own token, one a round.</p><p class="legend">{swatches}</p>'
    )
    prompts = figures.unique(sample["prompt"] for sample in samples)
    shared = _prompt(prompts[0], "the prompt of all") if len(prompts) == 1 else ""
    answers = "".join(
        f"<div><h3>{escape(sample['method'])}</h3>"
        f"{'' if shared else _prompt(sample['prompt'], 'prompt')}<pre>{_answer(sample)}</pre></div>"
        for sample in samples
    )
    return f'{legend}{shared}<div class="samples">{answers}</div>'


def _prompt(text: str, name: str) -> str:
    return f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>"


def _answer(sample: dict) -> str:
    return "".join(_piece(text, depth) for text, depth in sample["pieces"] if text)


def _piece(text: str, depth: int) -> str:
    if depth < 1:
        return escape(text)
    return f'<mark class="d{shade(depth)}" title="draft depth {depth}">{escape(text)}</mark>'


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{lines}</ul>' if lines else ""


def _facts(results: dict, config: dict, overrides: dict) -> str:
    target = results["target"]
    shape = ", ".join(
        f"{target[key]} {word}"
        for key, word in (("layers", "layers"), ("hidden_size", "wide"), ("vocab_size", "tokens"))
        if key in target
    )
    size = f"{count(target['parameters'])} parameters" if "parameters" in target else ""
    facts = {
        "target": ", ".join(part for part in (target.get("name", ""), size, shape) if part),
        "device": results["device"],
        "dtype": results["dtype"],
        "versions": ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        "seeds": _seeds(results).split(maxsplit=1)[1],
        "preset": results["preset"] or "default",
    }
    if config:
        changed = (f"{name}={json.dumps(value)}" for name, value in overrides.items())
        facts["overrides"] = ", ".join(changed) or "none"
    cells = (f"<dt>{key}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    whole = escape(json.dumps(config, indent=2))
    details = f"<details><summary>the whole config</summary><pre>{whole}</pre></details>"
    return f"<dl>{''.join(cells)}</dl>{details if config else ''}"
