"""Checks one pair of target and drafter: is what it emits what the target would have emitted?"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax.cache import causal_cache_mask, empty_cache
from specjax.evaluation.lossless import (
    TIE,
    Divergence,
    divergences,
    lossy_verdict,
    recomputed,
    tested_answers,
)
from specjax.evaluation.output_tests import OutputTest
from specjax.generation import generate, make_engine
from specjax.models import transformer
from specjax.models.target import Target
from specjax.progress import progress
from specjax.sampling import Sampling
from specjax.trained import TrainedDrafter
from specjax.verification import Rule


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a pair is checked; top_k and top_p count above temperature 0 only."""

    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64
    batch: int = 0  # prompts decoded at once, 0 = all
    seed: int = 0
    alpha: float = 0.01  # chance of refusing an exact pair at any temperature

    def __post_init__(self):
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures: {self.temperatures} must be some, each once")
        for name, least in (("max_new_tokens", 1), ("batch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least {least}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha: {self.alpha} must lie between 0 and 1")
        Sampling(1.0, self.top_k, self.top_p)
        for temperature in self.temperatures:
            try:
                Sampling(temperature)
            except ValueError as error:
                raise ValueError(f"temperatures: {error}") from error

    def sampling(self, temperature: float) -> Sampling:
        """The filter at one temperature."""
        return Sampling(temperature, self.top_k, self.top_p) if temperature else Sampling()

    @property
    def level(self) -> float:
        """The level of one sampled temperature: alpha shared out evenly (Bonferroni)."""
        return self.alpha / max(1, sum(t > 0 for t in self.temperatures))


@dataclasses.dataclass(frozen=True)
class Check:
    """One temperature's outcome.

    passed is None for a lossy rule, which promises nothing. `failures` are sentences.
    """

    temperature: float
    rule: str
    verdict: dict  # as in results.json
    passed: bool | None
    tokens: int
    accepted: int  # tokens emitted beyond one a round: drafted ones, at least
    tests: tuple[OutputTest, ...] = ()
    divergences: tuple[Divergence, ...] = ()
    failures: tuple[str, ...] = ()


def decode(target, prompts, drafter, sampling: Sampling, settings: Settings, rule):
    """(new tokens of every prompt, tokens emitted beyond one a round)."""
    size = settings.batch or len(prompts)
    tokens, accepted = [], 0
    who = "plain" if drafter is None else drafter.name
    with progress(f"decode {who} T={sampling.temperature:g}", len(prompts)) as advance:
        for first in range(0, len(prompts), size):
            group = prompts[first : first + size]
            # Requests are numbered inside a batch: only another seed gives another batch new noise.
            out = generate(
                target, group, drafter, settings.max_new_tokens, sampling.temperature,
                sampling.top_k, sampling.top_p, settings.seed + first, rule=rule,
            )  # fmt: skip
            tokens += out.tokens
            accepted += sum(n - 1 for row in out.accept_lengths for n in row)
            advance(len(group))
    return tokens, accepted


def _greedy(target, drafter, prompts, settings, rule, tie) -> Check:
    answers, accepted = decode(target, prompts, drafter, Sampling(), settings, rule)
    tokens = sum(map(len, answers))
    pairs = list(zip(prompts, answers, strict=True))
    if drafter is None:
        references = [recomputed(target, p, a) for p, a in pairs]
    else:
        references, _ = decode(target, prompts, None, Sampling(), settings, None)
    triples = [(p, r, a) for (p, a), r in zip(pairs, references, strict=True)]
    parted = divergences(target, triples)
    if not rule.exact:
        verdict = lossy_verdict(target, Sampling(), pairs, tie, settings.seed)
        return Check(0.0, rule.name, verdict, None, tokens, accepted, (), tuple(parted))
    ties = sum(d.gap < tie for d in parted)
    same = len(pairs) - len(parted)
    verdict = {"kind": "identical", "checked": len(pairs), "identical": same, "ties": ties}
    failures = tuple(_explain(d, tie) for d in parted if d.gap >= tie)
    return Check(
        0.0, rule.name, verdict, not failures, tokens, accepted, (), tuple(parted), failures
    )


def _explain(d: Divergence, tie: float) -> str:
    where = f"prompt {d.answer}, new token {d.position}: "
    if d.reference is None or d.emitted is None:
        ended = "the reference ends" if d.reference is None else "the answer ends"
        return where + f"{ended} here and the other goes on: stop tokens or lengths are cut wrong"
    return where + (
        f"token {d.emitted} where the reference has {d.reference}, though their logits lie "
        f"{d.gap:.3g} from the maximum, more than rounding explains ({tie:.2g}): what is emitted "
        "is not the target's greedy choice"
    )


def _sampled(target, drafter, prompts, temperature, settings, rule, tie) -> Check:
    sampling = settings.sampling(temperature)
    answers, accepted = decode(target, prompts, drafter, sampling, settings, rule)
    tokens = sum(map(len, answers))
    pairs = list(zip(prompts, answers, strict=True))
    if not rule.exact:
        verdict = lossy_verdict(target, sampling, pairs, tie, settings.seed)
        return Check(temperature, rule.name, verdict, None, tokens, accepted)
    verdict, tests = tested_answers(target, sampling, pairs, tie, settings.seed)
    level = settings.level
    failures = tuple(t.meaning for t in tests if t.p_value * len(tests) < level)
    passed = verdict["p_value"] >= level
    return Check(
        temperature, rule.name, verdict, passed, tokens, accepted, tuple(tests), (), failures
    )


def resolve_rules(target, drafter, rule, settings: Settings) -> dict[float, Rule]:
    """The rule used at each temperature (every exact one is greedy at 0).

    Raises:
      ValueError: an unknown rule, or one that refuses the drafter or a temperature.
    """
    return {
        t: make_engine(target, drafter, settings.sampling(t), rule=rule)[0].rule
        for t in settings.temperatures
    }


def check_pair(
    target: Target,
    drafter: TrainedDrafter | None,
    prompts: Sequence[list[int]],
    rule: str | Rule | None = None,
    settings: Settings = Settings(),
    tie: float = TIE,
) -> list[Check]:
    """Decodes the prompts at every temperature and checks what comes out.

    At temperature 0 tokens must equal plain decoding's (without a drafter: those of one forward
    that uses no cache) up to ties. Above it the emitted tokens are tested against the target's law
    (`output_tests`). A lossy rule is measured instead.

    Args:
      target, drafter: the pair; None checks plain decoding itself.
      prompts: token ids.
      rule: None (the drafter's default), a name or a rule object.
      settings: see `Settings`.
      tie: logits this close may be ranked either way; see `row_noise` for bfloat16.

    Raises:
      ValueError: no prompts, or a rule that refuses drafter or temperature; nothing is decoded.
    """
    if not prompts:
        raise ValueError("prompts: the list is empty")
    checks = []
    for t, used in resolve_rules(target, drafter, rule, settings).items():
        if t == 0:
            check = _greedy(target, drafter, prompts, settings, used, tie)
        else:
            check = _sampled(target, drafter, prompts, t, settings, used, tie)
        checks.append(check)
    return checks


# ---- in words and for machines -------------------------------------------------------------------


def verdict_line(check: Check, settings: Settings) -> str:
    """One sentence on one temperature."""
    at, verdict = f"T={check.temperature:g}", check.verdict
    if check.passed is None:
        return (
            f"{at}: LOSSY by design, divergence {verdict['divergence']:.3f} "
            f"(an exact rule: {verdict['chance']:.3f}); {verdict['measure']}"
        )
    word = "holds" if check.passed else "FAILS"
    if verdict["kind"] == "identical":
        return (
            f"{at}: {word}, {verdict['identical']} of {verdict['checked']} answers identical, "
            f"{verdict['ties']} more part at a tie"
        )
    sign = ">=" if check.passed else "<"
    return (
        f"{at}: {word}, p = {verdict['p_value']:.3g} {sign} {settings.level:.3g} "
        f"({len(check.tests)} tests of {check.tokens} tokens, Bonferroni)"
    )


def overall(checks: Sequence[Check]) -> str:
    """The last line: in one sentence, what was found."""
    failed = [f"T={c.temperature:g}" for c in checks if c.passed is False]
    lossy = [f"T={c.temperature:g}" for c in checks if c.passed is None]
    if failed:
        return f"VERDICT: NOT LOSSLESS at {', '.join(failed)}"
    if lossy:
        return f"VERDICT: LOSSY rule at {', '.join(lossy)}, as it declares; nothing was promised"
    return "VERDICT: lossless, as far as these tokens can tell"


def outcome(checks: Sequence[Check], settings: Settings, tie: float) -> dict:
    """Verdict, settings and checks as JSON takes them; an infinite gap is null."""
    plain = []
    for check in checks:
        row = dataclasses.asdict(check)
        for d in row["divergences"]:
            d["gap"] = d["gap"] if math.isfinite(d["gap"]) else None
        plain.append(row)
    return {
        "verdict": overall(checks), "passed": all(c.passed is not False for c in checks),
        "tie": tie, "settings": dataclasses.asdict(settings), "checks": plain,
    }  # fmt: skip


# ---- what rounding does to logits ----------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def _chunked_logits(params, config, rows: int, tokens_S):
    """SxV: logits of a sequence put through the cache `rows` rows at a time."""
    S = tokens_S.shape[0]
    cache = empty_cache(config, 1, S, params["embed"].dtype, stacked=transformer.is_stacked(params))

    def step(cache, chunk_R):
        at_R = cache.lengths_B[:, None] + jnp.arange(rows)
        mask = causal_cache_mask(cache.lengths_B, rows, S)
        out = transformer.forward(params, config, chunk_R[None], at_R, mask, cache)
        cache = out.cache.replace(lengths_B=cache.lengths_B + rows)
        return cache, transformer.logits_of(params, out.hidden_BxTxD)[0]

    _, logits = jax.lax.scan(step, cache, tokens_S.reshape(-1, rows))
    return logits.reshape(S, -1)


def row_noise(target: Target, sequences: Sequence[list[int]], rows: int) -> float:
    """How far rounding moves the target's top-two logit gap when row shapes change.

    The root mean square, over all places of the sequences, of the change between one forward and a
    cache filled one row at a time (plain decoding) or `rows` rows at a time (a draft tree's).
    """
    changes = []
    for ids in sequences:
        size = -(-len(ids) // rows) * rows
        tokens = np.zeros(size, np.int32)
        tokens[: len(ids)] = ids
        whole = np.asarray(target.logits(tokens[None])[0, : len(ids)])
        top = np.argsort(whole, axis=1)[:, -2:]

        def gap(logits, top=top):
            pair = np.take_along_axis(np.asarray(logits)[: len(top)], top, axis=1)
            return pair[:, 1] - pair[:, 0]

        for count in {1, rows}:
            chunked = _chunked_logits(target.params, target.config, count, jnp.asarray(tokens))
            changes.append(gap(chunked) - gap(whole))
    return math.sqrt(float(np.mean(np.square(np.concatenate(changes)))))


def rounding_tie(target: Target, drafter: TrainedDrafter | None, prompts) -> tuple[float, float]:
    """(gap that rounding may close, measured noise): 4 noises, at least what float32 needs."""
    if target.params["embed"].dtype == jnp.float32:
        return TIE, 0.0
    rows = 1 if drafter is None else drafter.definition.nodes
    size = min(min(map(len, prompts)), 128)
    noise = row_noise(target, [p[-size:] for p in prompts[:4]], max(rows, 2))
    return max(TIE, 4 * noise), noise
