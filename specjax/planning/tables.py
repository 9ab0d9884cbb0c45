"""An estimate as text."""

from collections.abc import Iterable

from specjax.console import make_console, print_rows
from specjax.planning.estimate import UNKNOWN_PROMPT, Estimate

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(count: float) -> str:
    """Bytes in three digits, decimal units as the data sheets have them."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:.0f} TB"
    return f"{count:.0f} B"


def seconds(time: float) -> str:
    """A short time."""
    return f"{time * 1e3:.3g} ms" if time < 1 else f"{time:.3g} s"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def show(config, found: Estimate, file=None):
    """Prints the tables of docs/planning.md."""
    console, chip = make_console(file), found.chip
    mesh = "x".join(map(str, found.mesh))
    console.print(
        f"{config.name}{':' + config.preset if config.preset else ''}: {config.target.name}, "
        f"{_parameters(found.target_parameters)} parameters in {config.target.dtype}, on "
        f"{found.devices} x {chip.name} ({size(chip.memory)}), mesh data x fsdp x tensor = {mesh}\n"
        f"Evaluation: prompts of {found.prompt} tokens, {found.slots} cache slots"
        + ("" if config.eval.max_prompt_tokens else f" (prompts assumed <= {UNKNOWN_PROMPT})")
    )
    rows = []
    for m in found.methods:
        t = m.training
        if t:
            rows.append(
                (
                    m.name, _parameters(m.parameters), size(t.weights), size(t.optimizer),
                    size(t.gradients), size(t.temporaries), f"{t.tokens}", f"{t.steps}",
                    f"{seconds(t.step.seconds)} ({t.step.bound})",
                    f"{t.steps * t.step.seconds / 3600:.3g} h",
                )
            )  # fmt: skip
    headings = "train|parameters|weights|optimizer|gradients|temporaries|tokens/step|steps"
    if rows:
        _table(console, "Training, a device", headings + "|step >=|all steps >=", rows)
    rows = []
    for m in found.methods:
        rows.append(_decode_row(m.name, m.nodes, config.eval.batch, m.decoding, m.round))
    rows.append(
        _decode_row("regeneration", 1, config.data.batch, found.regeneration,
                    found.regeneration_round)
    )  # fmt: skip
    headings = "decode|rows|batch|KV cache|drafter state|prefill temp.|round temp.|round >="
    _table(console, "Decoding, a device", headings, rows)
    rows = [
        (stage, size(count), f"{count / chip.memory:.0%}", "" if count <= chip.memory else "no")
        for stage, count in found.stages.items()
    ]
    _table(console, "Peak of each stage, a device", f"stage|bytes|of {chip.name}|fits", rows)
    initial = sum(m.initial for m in found.methods)
    console.print(
        f"\nIn all of them: target {size(found.target)}; in training: all drafters as initialised, "
        f"{size(initial)}."
    )
    worst = max((m for m in found.methods if m.training), key=lambda m: m.training.bytes, default=0)
    if worst:
        parts = ", ".join(f"{what} {size(n)}" for what, n in worst.training.alive[:3])
        console.print(f"Largest temporaries, training {worst.name}: {parts}.")
    disk = ", ".join(f"{name} {size(count)}" for name, count in found.disk.items())
    console.print(
        f"Disk: {disk}. Storing the target's features instead of recomputing them would take "
        f"{size(found.features)}."
    )
    console.print("It fits." if found.fits else f"It does not fit {chip.name}.")


def _table(console, title: str, headings: str, rows):
    console.print(f"\n{title}")
    print_rows(console, headings, rows)


def _decode_row(name, nodes, batch, decoding, time) -> tuple[str, ...]:
    return (
        name, str(nodes), str(batch), size(decoding.cache), size(decoding.state),
        size(decoding.prefill.peak), size(decoding.round.peak),
        f"{seconds(time.seconds)} ({time.bound})",
    )  # fmt: skip


def show_advice(found: Estimate, changes: dict, after: Estimate, steps: Iterable, file=None):
    """Prints what to change, each change with what it takes off the peak."""
    console = make_console(file)
    for change, saved in steps:
        (field, value), = change.items()  # fmt: skip
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        flag = f"--config.{field}={value}"
        console.print(f"  {flag}: {size(saved)} less at the peak")
    verdict = "it fits" if after.fits else "still too large"
    if not changes:
        console.print("No field tried here makes it smaller.")
        return
    fields = ", ".join(changes)
    console.print(f"With {fields}: {size(after.peak)} of {size(found.chip.memory)}, {verdict}.")


def show_compiled(rows: Iterable[tuple[str, int, int]], file=None):
    """Prints estimates beside compiled sizes: (program, estimated bytes, compiled bytes)."""
    rows = [(name, size(a), size(b), f"{a / b:.2f}") for name, a, b in rows]
    title = "Estimated against compiled for simulated CPU devices: arguments and temporaries"
    _table(make_console(file), title, "program|estimated|compiled|ratio", rows)
