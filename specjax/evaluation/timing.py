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


def _median_ms(prepare: Callable, call: Callable, repeats: int) -> float:
    """Median milliseconds of call(prepare()); preparing is not timed."""
    times = []
    for _ in range(repeats):
        argument = prepare()
        started = time.perf_counter()
        jax.block_until_ready(call(argument))
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))


def time_fused(engine, params, state, repeats: int) -> float:
    """Median milliseconds of the fused round on copies of one state."""
    return time_in_turns([(engine, params, state)], repeats)[0]


def time_in_turns(contenders, repeats: int) -> list[float]:
    """`time_fused` of several (engine, params, state), taking turns: slow spells hit all alike."""
    for engine, params, state in contenders:
        _copy(decoding.jit_round(engine, params, _copy(state)))
    times = [
        [
            _median_ms(lambda s=s: _copy(s), lambda s, e=e, p=p: decoding.jit_round(e, p, s), 1)
            for e, p, s in contenders
        ]
        for _ in range(repeats)
    ]
    return np.median(times, axis=0).tolist()


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


def time_round(engine, params, state, repeats: int = 15) -> RoundTimes:
    """Times the parts and the whole of one round, after one call of each to warm up.

    `state`, in the middle of decoding, is copied, not consumed.
    """
    plain, rest = _unruled(engine), state.replace(drafter=())
    draft = lambda own: _draft(_drafting(engine), params, own, rest)  # noqa: E731
    tree, _ = jax.block_until_ready(draft(_copy(state.drafter)))
    verify = lambda cache: _score(plain, params, cache, tree)  # noqa: E731
    jax.block_until_ready(verify(_copy(state.cache)))
    return RoundTimes(
        draft=_median_ms(lambda: _copy(state.drafter), draft, repeats),
        verify=_median_ms(lambda: _copy(state.cache), verify, repeats),
        round=time_fused(engine, params, state, repeats),
    )
