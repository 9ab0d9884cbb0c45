"""A pair checked, and what was found printed."""

from rich.console import Console

from specjax.console import make_console, print_rows
from specjax.evaluation.exactness import (
    Check,
    Settings,
    check_pair,
    outcome,
    overall,
    rounding_tie,
    verdict_line,
)


def print_check(console: Console, check: Check, settings: Settings, tie: float, drafted: bool):
    """Tables, explanations and the verdict line of one temperature."""
    drafts = f", {check.accepted} of {check.tokens} tokens accepted drafts" if drafted else ""
    console.print(f"\nT={check.temperature:g}, rule {check.rule}{drafts}", style="bold")
    if check.tests:
        rows = [
            (t.name, f"{t.symbol} = {t.statistic:.3f}", f"{t.p_value:.3g}") for t in check.tests
        ]
        print_rows(console, "test|statistic|p-value", rows)
    if check.divergences:
        rows = [
            (
                str(d.answer), str(d.position), f"{d.gap:.3g}", str(d.reference), str(d.emitted),
                "tie" if d.gap < tie else "differs",
            )
            for d in check.divergences
        ]  # fmt: skip
        print_rows(console, "prompt|new token|logit gap|reference|emitted|triage", rows)
    for failure in check.failures:
        console.print(f"failed: {failure}", style="red")
    if drafted and not check.accepted:
        console.print("note: no drafted token was accepted, so acceptance itself was not checked")
    style = {True: "green", False: "red", None: "yellow"}[check.passed]
    console.print(verdict_line(check, settings), style=style)


def verify(target, drafter, prompts, rule=None, settings=None, file=None) -> tuple[int, dict]:
    """Checks a pair and prints what it finds.

    Args:
      target, drafter, prompts, rule, settings: see `exactness.check_pair`; the rule may be an
        object of one's own.
      file: where to print; standard output if absent.

    Returns:
      (exit status, the outcome; --json adds what was asked).
    """
    settings = settings or Settings()
    console = make_console(file, soft_wrap=True)
    tie, noise = rounding_tie(target, drafter, prompts)
    console.print(
        f"{target.name}, {'no drafter' if drafter is None else drafter.name}, "
        f"{target.params['embed'].dtype}, {len(prompts)} prompts x {settings.max_new_tokens} tokens"
    )
    measured = f", 4 x the measured {noise:.2g}" if noise else ""
    console.print(f"logits closer than {tie:.2g} count as tied{measured}")
    checks = check_pair(target, drafter, prompts, rule, settings, tie)
    for check in checks:
        print_check(console, check, settings, tie, drafter is not None)
    console.print(f"\n{overall(checks)}", style="bold")
    report = outcome(checks, settings, tie)
    return int(not report["passed"]), report
