"""The report's frame: how the page looks, and the words on it that are the same for every run."""

from specjax.shades import SHADE_RGB, SHADES, opacity

HOW_TO_READ = """A drafter guesses, the target checks all guesses in one pass, and a round of that
emits <b>tau</b> tokens, where plain decoding emits one. A round also costs more than a plain step,
so a method is faster than vanilla only where tau is above its <b>break-even</b>. Look at the
speedup's interval first (one that holds 1.00 shows no gain), then at acceptance and at a round's
parts for the reason."""

DEFINITIONS = """<dl>
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
<dt>nodes, depth</dt><dd>rows of the draft tree that the target verifies, and its deepest draft
token.</dd>
<dt>lossless</dt><dd>at temperature 0 the prompts whose tokens equal vanilla's; a tie parts where
the target's two best logits are all but equal. Above 0 the p-value of a test of the output's law.
"lossy" is a rule that trades exactness away.</dd>
</dl>"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --paper: #fff; --soft: #59626d; --line: #dde1e7;
  --panel: #f5f6f8; --good: #22765a; --bad: #b3242b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #15181d; --soft: #9aa3af; --line: #313842; --panel: #1d2127;
    --good: #5cc39a; --bad: #ff8080; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2.2rem 1.25rem 4rem; max-width: 77rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .3rem;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; letter-spacing: -.005em; margin: 3rem 0 .8rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }
p { margin: 0 0 .8rem; max-width: 46rem; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: .2em; }
.meta, .about, nav { color: var(--soft); font-size: .875rem; }
.meta { margin-bottom: 1.4rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.4rem 0 0; }
.tiles { display: grid; gap: 1rem; padding: 0; margin: 0 0 1.4rem; list-style: none;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.tiles li { background: var(--panel); border-radius: .6rem; padding: 1rem 1.2rem; }
.tiles span { display: block; color: var(--soft); font-size: .875rem; }
.tiles strong { display: block; font-size: 2.1rem; line-height: 1.25; font-weight: 650;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tiles .gain strong { color: var(--good); }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .35rem 1.4rem;
  margin: 0 0 1rem; font-size: .925rem; max-width: 62rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--soft); outline-offset: 4px; }
table { width: 100%; border-collapse: separate; border-spacing: 0; font-size: .8125rem;
  line-height: 1.35; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 2rem); }
th, td { padding: .32rem .5rem; text-align: right; vertical-align: top; white-space: nowrap;
  font-weight: 400; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); vertical-align: bottom; line-height: 1.2; }
th.left, td.left { text-align: left; }
th:first-child { position: sticky; left: 0; z-index: 1; background: var(--paper);
  padding-left: 0; text-align: left; }
tbody th { font-weight: 600; }
tr.group th { padding-top: 1.1rem; font-weight: 600; color: var(--soft);
  border-bottom: 1px solid var(--soft); }
tr.group span { position: sticky; left: 0; }
td small { display: block; color: var(--soft); font-size: .75rem; }
td.best { font-weight: 700; }
td.bad, td.bad small { color: var(--bad); }
.dot { display: inline-block; width: .6em; height: .6em; border-radius: 50%; margin-right: .45em; }
.figures { display: grid; gap: 2.2rem 3rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.narrow { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; min-width: 0; display: grid; grid-row: span 2; grid-template-rows: subgrid;
  row-gap: .6rem; }
.about { margin: .15rem 0 0; line-height: 1.4; }
svg { display: block; width: 100%; max-width: 33rem; height: auto; overflow: visible; }
pre { margin: .4rem 0 0; padding: .8rem .9rem; background: var(--panel); border-radius: .5rem;
  font: .8rem/1.65 ui-monospace, SFMono-Regular, Menlo, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { color: var(--soft); cursor: pointer; font-size: .875rem; }
mark { color: inherit; border-radius: .15rem; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem .5rem; font-size: .84rem; max-width: none; }
.legend mark { padding: 0 .5rem; }
.samples { display: grid; gap: 1.6rem 2rem; margin-top: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.samples > div { min-width: 0; }
.notes { padding-left: 1.1rem; max-width: 52rem; }
.notes li { margin-bottom: .5rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { padding: 1.4rem 1rem 3rem; }
  h1 { font-size: 1.45rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
  tbody th { min-width: 9.2rem; max-width: 9.2rem; white-space: normal; }
  tbody th, thead th:first-child { border-right: 1px solid var(--line); }
  .scroll { margin-right: -1rem; width: calc(100% + 1rem); max-width: none; }
}
@media print { nav { display: none; } figure, .samples > div { break-inside: avoid; } }
""" + "\n".join(
    f".d{depth} {{ background: rgb({' '.join(map(str, SHADE_RGB))} / {opacity(depth):.2f}); }}"
    for depth in range(1, SHADES + 1)
)

PAGE = """<!doctype html>
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
