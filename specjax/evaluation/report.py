"""report.html: one self-contained page about a run. It asks nothing of the network or a script."""

import json
import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from specjax.evaluation import figures
from specjax.evaluation.records import VANILLA
from specjax.evaluation.tables import COLUMNS, count, setting, shown_columns
from specjax.files import write_text
from specjax.shades import SHADE_RGB, SHADES, opacity, shade


def write_report(
    path: str | os.PathLike,
    results: dict,
    metrics_path: str | os.PathLike | None = None,
    samples: Sequence[dict] | None = None,
    notes: str | Sequence[str] | None = None,
) -> None:
    """Write the page, atomically.

    results:      what `read_results` returns
    metrics_path: metrics.jsonl of the run; training curves are left out where it is missing
    samples:      {"method", "prompt", "pieces": [(text, depth), ...]}; depth 0 is a token of the
                  target's own, 1 and up an accepted draft token of that depth
    notes:        paragraphs of plain text about the run

    Raises OSError, naming the file, when it cannot be written.
    """
    rows = results["rows"]
    curves = read_curves(metrics_path) if metrics_path and Path(metrics_path).exists() else {}
    notes = [notes] if isinstance(notes, str) else notes or []
    title = f"Speculative decoding of {results['target'].get('name', 'the target')}"
    body = [
        f"<header><h1>{escape(title)}</h1>{_headline(rows)}</header>",
        "".join(f"<p>{escape(note)}</p>" for note in notes),
        _section("What ran on what", _facts(results)),
        _section("Results", _table(rows)),
        _section("Figures", _result_figures(rows)),
        _section("Training", _training_figures(rows, curves)),
        _section("Samples", _samples(samples or [])),
        f"<footer><h2>What the numbers mean</h2>{_DEFINITIONS}</footer>",
    ]
    write_text(path, _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body)))


def read_curves(path: str | os.PathLike) -> dict[str, dict[str, figures.Curve]]:
    """metrics.jsonl as {"loss" or "tau": {stage: (steps, values)}}, steps ascending.

    Lines that are not whole JSON objects are skipped, for a run that was killed leaves one behind;
    a step logged again after resuming counts once, as logged last; values that are not finite are
    left out.
    """
    points: dict[str, dict[str, dict]] = {"loss": {}, "tau": {}}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or not _is_number(entry.get("step")):
            continue
        for key, stages in points.items():
            if _is_number(entry.get(key)):
                stage = stages.setdefault(str(entry.get("stage", "train")), {})
                stage[entry["step"]] = entry[key]
    return {
        key: {name: tuple(zip(*sorted(line.items()), strict=True)) for name, line in stages.items()}
        for key, stages in points.items()
    }


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{heading}</h2>{content}</section>" if content else ""


def _headline(rows: Sequence[dict]) -> str:
    """The fastest exact method of each setting, in words, be it slower than vanilla."""
    fastest: dict[str, dict] = {}
    for row in (row for row in rows if row["method"] != VANILLA and row["exact"]):
        best = fastest.setdefault(setting(row), row)
        if row["speedup"] > best["speedup"]:
            fastest[setting(row)] = row
    lines = []
    for name, row in fastest.items():
        low, high = row["speedup_ci95"]
        lead = "fastest is" if row["speedup"] > 1 else "none beats vanilla; nearest is"
        lines.append(
            f"<li>{escape(name)}: {lead} <b>{escape(row['method'])}</b> at "
            f"<b>{row['speedup']:.2f}x</b> vanilla [{low:.2f}, {high:.2f}], "
            f"tau {row['tau']:.2f} where {row['break_even_tau']:.2f} breaks even</li>"
        )
    return f'<ul class="lead">{"".join(lines)}</ul>' if lines else ""


def _facts(results: dict) -> str:
    target = results["target"]
    shape = ", ".join(
        f"{target[key]} {word}"
        for key, word in (("layers", "layers"), ("hidden_size", "wide"), ("vocab_size", "tokens"))
        if key in target
    )
    size = f"{count(target['parameters'])} parameters" if "parameters" in target else ""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    facts = {
        "target": ", ".join(part for part in (target.get("name", ""), size, shape) if part),
        "device": results["device"],
        "dtype": results["dtype"],
        "versions": versions,
        "seed": results["seed"],
        "preset": results["preset"] or "default",
    }
    cells = (f"<dt>{key}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    return f"<dl>{''.join(cells)}</dl>"


def _table(rows: Sequence[dict]) -> str:
    columns = [COLUMNS[name] for name in shown_columns(rows)]
    heads = "".join(
        f"<th{_class(left=column.left)}>{escape(column.heading).replace(chr(10), '<br>')}</th>"
        for column in columns
    )
    lines = ""
    for above, row in zip([None, *rows], rows, strict=False):
        new = above is not None and setting(above) != setting(row)
        cells = "".join(_table_cell(column, row) for column in columns)
        lines += f"<tr{_class(new=new)}>{cells}</tr>"
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="results">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _table_cell(column, row: dict) -> str:
    classes = _class(left=column.left, bad=column.bad(row))
    detail = column.detail(row)
    below = f"<small>{escape(detail)}</small>" if detail else ""
    return f"<td{classes}>{escape(column.text(row))}{below}</td>"


def _class(**names: bool) -> str:
    """The class attribute of an element that has the true ones of `names`."""
    given = " ".join(name for name, true in names.items() if true)
    return f' class="{given}"' if given else ""


def _result_figures(rows: Sequence[dict]) -> str:
    if not rows:
        return ""
    drafted = [row for row in rows if row["method"] != VANILLA]
    if not drafted:
        return _grid([_figure("Where a round's time goes", figures.draw_rounds(rows))])
    settings = dict.fromkeys(setting(row) for row in drafted if row["acceptance_by_depth"])
    acceptance = [
        _figure(f"Acceptance by depth, {name}", figures.draw_acceptance(rows, name))
        for name in settings
    ]
    return _grid(
        [
            _figure("tau", figures.draw_tau(rows)),
            _figure("Speedup", figures.draw_speedups(rows)),
            _figure("Speedup over tau", figures.draw_speedup(rows)),
            _figure("tau over what a draft costs", figures.draw_cost(rows)),
            _figure("Where a round's time goes", figures.draw_rounds(rows)),
            *acceptance,
        ]
    )


def _training_figures(rows: Sequence[dict], curves: dict) -> str:
    colours = figures.method_colours(rows)
    titles = {"loss": "Training loss", "tau": "tau on held-out prompts while training"}
    drawn = []
    for key, stages in curves.items():
        lines = {stage: figures.thin_out(*line) for stage, line in stages.items()}
        if lines:
            drawn.append(_figure(titles[key], figures.draw_curves(lines, key, colours)))
    return _grid(drawn) if drawn else ""


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def _grid(parts: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(parts)}</div>'


def _samples(samples: Sequence[dict]) -> str:
    if not samples:
        return ""
    depths = [shade(depth) for sample in samples for _, depth in sample["pieces"]]
    swatches = "".join(_piece(f"depth {n}", n) for n in range(1, max(depths, default=0) + 1))
    legend = f'<p class="legend"><span>the target\'s own token</span>{swatches}</p>'
    return legend + "".join(_sample(sample) for sample in samples)


def _sample(sample: dict) -> str:
    pieces = "".join(_piece(text, depth) for text, depth in sample["pieces"] if text)
    return (
        f"<h3>{escape(sample['method'])}</h3>"
        f"<details><summary>prompt</summary><pre>{escape(sample['prompt'])}</pre></details>"
        f"<pre>{pieces}</pre>"
    )


def _piece(text: str, depth: int) -> str:
    if depth < 1:
        return escape(text)
    return f'<mark class="d{shade(depth)}" title="draft depth {depth}">{escape(text)}</mark>'


_DEFINITIONS = """
<dl>
<dt>tau</dt><dd>tokens per round, the target's own extra token included and the prefill's token left
out; the sum over all prompts. Vanilla decoding is 1.</dd>
<dt>break-even tau</dt><dd>the milliseconds of a round over those of a vanilla token: with a smaller
tau a method is slower than vanilla, however good its drafts.</dd>
<dt>accepted by depth</dt><dd>of the rounds that accepted a draft token at the depth before, the
share that accepted one at this depth. The last round of an answer may be cut short, so it counts
for what it accepted and not for where it stopped.</dd>
<dt>tokens per s</dt><dd>all new tokens over all seconds, each answer at the median of its repeats;
prefill included, compiling excluded, answers cut at the stop token before counting.</dd>
<dt>speedup</dt><dd>tokens per second over vanilla's: same model code, same process, same prompts.
</dd>
<dt>[low, high]</dt><dd>95% bootstrap interval over prompts, both methods resampled together. It
covers the choice of prompts, not the noise of the clock.</dd>
<dt>draft, verify, round</dt><dd>median milliseconds; draft and verify are timed apart, the round as
it runs, in one piece. Overhead is the round over a vanilla token, less one.</dd>
<dt>nodes/depth</dt><dd>rows of the draft tree that the target verifies, and its deepest draft
token.</dd>
<dt>lossless</dt><dd>at temperature 0 the prompts whose tokens equal vanilla's; a tie parts where
the target's two best logits are all but equal. Above 0 the p-value of a test of the output's law.
"lossy" is a rule that trades exactness away.</dd>
</dl>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --paper: #fff; --soft: #5c6570; --line: #d9dde3;
  --panel: #f5f6f8; --bad: #c0262d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #15181d; --soft: #98a1ad; --line: #333a44; --panel: #1d2127;
    --bad: #ff7b7b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 76rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.lead { padding-left: 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; line-height: 1.2; }
th.left, td.left { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper);
  padding-left: 0; font-weight: 600; }
tr.new td { border-top: 2px solid var(--soft); }
td small { display: block; color: var(--soft); }
td.bad, td.bad small { color: var(--bad); }
.figures { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .95rem; font-weight: 600; margin-bottom: .3rem; }
svg { display: block; width: 100%; max-width: 32rem; height: auto; overflow: visible; }
svg text { font-family: system-ui, sans-serif !important; }
pre { margin: .4rem 0; padding: .8rem; background: var(--panel); border-radius: .4rem;
  font: .85rem/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { color: var(--soft); cursor: pointer; }
mark { color: inherit; border-radius: .15rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem .6rem; font-size: .85rem; }
.legend mark { padding: 0 .4rem; }
footer { font-size: .9rem; }
@media (max-width: 40rem) {
  footer dl, dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
}
""" + "\n".join(
    f".d{depth} {{ background: rgb({' '.join(map(str, SHADE_RGB))} / {opacity(depth):.2f}); }}"
    for depth in range(1, SHADES + 1)
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
