"""Where a round's time goes: draft, verify and the whole, as medians on the same states."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decoding
from specjax.sampling import GREEDY
from specjax.verification import get_rule


@dataclasses.dataclass(frozen=True)
class RoundTimes:
    """Milliseconds; `round` is the fused round, the others separate calls of its parts."""

    draft: float
    verify: float
    round: float


def _copy(tree):
    return jax.block_until_ready(jax.tree.map(jnp.copy, tree))


def _ms(call: Callable, consumed) -> float:
    """Milliseconds of one call on a copy of what it consumes; copying is not timed."""
    argument = _copy(consumed)
    started = time.perf_counter()
    jax.block_until_ready(call(argument))
    return 1e3 * (time.perf_counter() - started)


def _fused(engine, params) -> Callable:
    return lambda state: decoding.jit_round(engine, params, state)


def time_in_turns(contenders, repeats: int) -> list[float]:
    """Median milliseconds of the fused round of each (engine, params, state)."""
    return calls_in_turns([(_fused(e, params), state) for e, params, state in contenders], repeats)


def calls_in_turns(calls, repeats: int) -> list[float]:
    """Median milliseconds of each (call, what it consumes), compiled before any is timed.

    They take turns, so that a slow spell of the machine hits all alike. In a turn a call comes
    twice and the second counts: in use it follows one of its own kind, and finds caches so.
    """
    for call, state in calls:
        _ms(call, state)
    turns = [[[_ms(*c) for _ in range(2)][1] for c in calls] for _ in range(repeats)]
    return np.median(turns, axis=0).tolist()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _draft(engine, params, drafter_state, rest):
    return decoding.draft(engine, params, rest.replace(drafter=drafter_state))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score(engine, params, cache, tree):
    return decoding.score(engine, params, cache, tree)


def _unruled(engine):
    """Scoring knows nothing of rules or sampling: one program for all temperatures."""
    return dataclasses.replace(engine, rule=get_rule("greedy"), sampling=GREEDY)


def _drafting(engine):
    """Nor does drafting, unless tokens are sampled."""
    return engine if engine.drafter.proposal.sampled else _unruled(engine)


def count_flops(engine, params, state) -> tuple[float, float]:
    """Floating-point operations of one draft and of one target forward over its tree.

    XLA's own count of the traced programs, padding included; a loop's body counts once.
    """
    drafting = _draft.lower(_drafting(engine), params, state.drafter, state.replace(drafter=()))
    tree, _ = drafting.out_info
    scoring = _score.lower(_unruled(engine), params, state.cache, tree)
    # A backend without the analysis, or a program without arithmetic, has no such entry.
    draft_cost, score_cost = (low.cost_analysis() or {} for low in (drafting, scoring))
    return draft_cost.get("flops", 0.0), score_cost.get("flops", 0.0)


def time_rounds(contenders, repeats: int = 15) -> list[RoundTimes]:
    """Times the parts and the whole of a round of each (engine, params, state), all in turns.

    States, in the middle of decoding, are copied, not consumed.
    """
    calls = [call for contender in contenders for call in _calls(*contender)]
    times = np.reshape(calls_in_turns(calls, repeats), (-1, 3))
    return [RoundTimes(*row) for row in times.tolist()]


def _calls(engine, params, state):
    """(call, what it consumes) of draft, verify and the fused round."""
    plain, rest = _unruled(engine), state.replace(drafter=())
    draft = lambda own: _draft(_drafting(engine), params, own, rest)  # noqa: E731
    tree, _ = draft(_copy(state.drafter))
    verify = lambda cache: _score(plain, params, cache, tree)  # noqa: E731
    return (draft, state.drafter), (verify, state.cache), (_fused(engine, params), state)
