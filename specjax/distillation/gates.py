"""Token gates: how much each (row, depth) of a micro-batch counts in the distillation loss.

    loss = sum(weight * divergence) / sum(valid)

The weight multiplies the divergence before the sum, and the sum is divided by the count of all
valid positions, not of the selected ones: a gate that rejects half of the tokens halves the loss.

A gate works in two steps. `observe` turns logits into one number a position and looks at nothing
else, so it may run on chunks of rows or on one depth at a time, which keeps full-vocabulary logits
out of memory. `weigh` sees those numbers for the whole micro-batch. Weights are constants to the
gradient, and zero, whatever was observed, where there is no label.

The gates disagree on what to keep: SpecKD trains where the student already agrees with the teacher,
AdaSPEC where it lags furthest behind a reference, online distillation where it was rejected.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from specjax.distillation.divergences import forward_kl, total_variation
from specjax.sampling import argmax


class Gate:
    """What every gate shares.

    Labels are the tokens drafted for, aligned with depth (row t, depth i: x_{t+1+i}), -1 where
    there is none. `state` is a plain dict; each gate names the entries it reads:

      step: traced int, the training step.
      key: a jax random key, fresh every step.
      reference: the reference drafter's logits, shaped like the student's.
      recorded: bool BxTxN, positions recorded while serving.
    """

    name: ClassVar[str] = ""

    def observe(self, teacher_logits, student_logits, labels, state):
        """One float32 number a position, from that position alone: [..., V] twice -> [...]."""
        return jnp.ones(labels.shape, jnp.float32)

    def weigh(self, seen_BxTxN, valid_BxTxN, state):
        """weight_BxTxN, float32, from what was observed at all positions of the micro-batch."""
        raise NotImplementedError

    def rates(self, seen_BxTxN, valid_BxTxN) -> dict:
        """Name -> rate_N, what is worth logging of each depth."""
        return {}

    def __call__(self, teacher_BxTxNxV, student_BxTxNxV, labels_BxTxN, state):
        """weight_BxTxN from whole logits: `observe`, then `weigh`."""
        seen_BxTxN = self.observe(teacher_BxTxNxV, student_BxTxNxV, labels_BxTxN, state)
        return self.weigh(seen_BxTxN, labels_BxTxN >= 0, state)


@dataclasses.dataclass(frozen=True)
class Everything(Gate):
    """Plain distillation: every valid position counts fully."""

    name: ClassVar[str] = "everything"

    def weigh(self, seen_BxTxN, valid_BxTxN, state):
        return valid_BxTxN.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SpecKD(Gate):
    """beta + (1 - beta) [the teacher accepts the student's proposal] (2510.24021; v1 has beta 0).

    Fields:
      k: size of the teacher's top-k, or the number of proposals.
      beta: weight of a rejected token.
      accept: "greedy", the student's argmax lies in the teacher's top-k, a tie with the k-th being
        in; "sampled", one of k draws from the student passes min(1, p/q); "expected", the
        probability of that, 1 - TVD^k, which is deterministic.
      warmup_steps: beta falls linearly from 1 to its value over so many steps, since a cold drafter
        is rejected everywhere and would get next to no gradient.
      prefix: a depth is accepted only if all shallower ones are, as when decoding (ours). Shallower
        depths without a label do not count.

    State: key ("sampled"), step (warmup_steps > 0).

    Raises:
      ValueError: a field out of range.
    """

    name: ClassVar[str] = "speckd"

    k: int = 5
    beta: float = 0.01
    accept: str = "greedy"
    warmup_steps: int = 0
    prefix: bool = False

    def __post_init__(self):
        _require(self.k >= 1 and self.k % 1 == 0, "speckd", "k", self.k, "a whole number >= 1")
        _require(0 <= self.beta <= 1, "speckd", "beta", self.beta, "in [0, 1]")
        rules = ("greedy", "sampled", "expected")
        _require(self.accept in rules, "speckd", "accept", self.accept, f"one of {rules}")
        _require(self.warmup_steps >= 0, "speckd", "warmup_steps", self.warmup_steps, ">= 0")

    def observe(self, teacher_logits, student_logits, labels, state):
        """The probability that the proposal is accepted; 0 or 1 if greedy."""
        teacher, student = jax.lax.stop_gradient((teacher_logits, student_logits))
        if self.accept == "greedy":
            # At least the k-th largest means fewer than k larger: one pass, no top-k.
            proposal = argmax(student)[..., None]
            larger = teacher > jnp.take_along_axis(teacher, proposal, axis=-1)
            return (jnp.sum(larger, axis=-1) < self.k).astype(jnp.float32)
        return 1 - jnp.minimum(total_variation(teacher, student), 1.0) ** self.k

    def weigh(self, seen_BxTxN, valid_BxTxN, state):
        accepted = jax.lax.stop_gradient(seen_BxTxN)
        if self.accept == "sampled":
            # Of k independent draws, each passing with probability 1 - TVD, one passes with
            # probability 1 - TVD^k: one coin has the law of the k draws.
            accepted = (_uniform(state["key"], accepted.shape) < accepted).astype(jnp.float32)
        if self.prefix:
            accepted = jnp.cumprod(jnp.where(valid_BxTxN, accepted, 1.0), axis=-1)
        beta = self.beta
        if self.warmup_steps:
            done = jnp.clip(state["step"] / self.warmup_steps, 0.0, 1.0)
            beta = (1 - done) + done * beta
        # In this form accepted ones weigh exactly 1 and rejected ones exactly beta.
        return jnp.where(valid_BxTxN, accepted + beta * (1 - accepted), 0.0)

    def rates(self, seen_BxTxN, valid_BxTxN):
        return {"accepted": acceptance_rate(seen_BxTxN, valid_BxTxN)}


@dataclasses.dataclass(frozen=True)
class AdaSpec(Gate):
    """The tokens on which the student lags furthest behind a reference drafter (2510.19779).

    Excess is KL(p || q) - KL(p || r), r being the reference: a drafter of the same initialisation,
    distilled plainly, then frozen. Kept is what reaches the (1 - fraction)-quantile of the excess
    (linearly interpolated, ties in) over the valid positions of the micro-batch, within each depth:
    deeper ones have larger losses and would otherwise take the whole budget.

    Fields:
      fraction: share of tokens kept; 1 keeps all.
      normalise: kept tokens weigh 1/fraction, as in the paper's eq. 10; otherwise 1, as in the
        released code.

    State: reference.

    Raises:
      ValueError: fraction outside (0, 1].
    """

    name: ClassVar[str] = "adaspec"

    fraction: float = 0.4
    normalise: bool = True

    def __post_init__(self):
        _require(0 < self.fraction <= 1, "adaspec", "fraction", self.fraction, "in (0, 1]")

    def observe(self, teacher_logits, student_logits, labels, state):
        """The excess over the reference, in nats."""
        sides = teacher_logits, student_logits, state["reference"]
        teacher, student, reference = jax.lax.stop_gradient(sides)
        return forward_kl(teacher, student) - forward_kl(teacher, reference)

    def weigh(self, seen_BxTxN, valid_BxTxN, state):
        excess = jnp.where(valid_BxTxN, jax.lax.stop_gradient(seen_BxTxN), jnp.nan)
        # What reaches the interpolated quantile reaches the next value above it. That one is not
        # rounded, so that ties stay in; the nudge does as much for the rank itself.
        rank = max(1 - self.fraction - 1e-6, 0.0)
        bound_N = jnp.nanquantile(excess, rank, axis=(0, 1), method="higher")
        weight = 1 / self.fraction if self.normalise else 1.0
        return jnp.where(excess >= bound_N, weight, 0.0)  # nothing compares with NaN


@dataclasses.dataclass(frozen=True)
class Recorded(Gate):
    """The positions recorded while serving, where drafts were rejected (2310.07177).

    `recorded[b, t, i - 1]` marks the label x_{t+1+i}: the token the target put in the place of what
    depth i drafted. (The released trainer marks the token after it, one row late.)

    State: recorded.
    """

    name: ClassVar[str] = "recorded"

    def weigh(self, seen_BxTxN, valid_BxTxN, state):
        return (state["recorded"] & valid_BxTxN).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Rejected(Gate):
    """`Recorded` without serving: what greedy decoding of this very text would have rejected.

    Lossless decoding of the target's own greedy text emits that text, so each row can be walked
    here: a round starts at row t, the depths whose best token is the label are accepted up to the
    first that is not, which is recorded, and the next round starts past the token that replaced it.
    """

    name: ClassVar[str] = "rejected"

    def observe(self, teacher_logits, student_logits, labels, state):
        """1 where the student's best token is the label."""
        return (argmax(jax.lax.stop_gradient(student_logits)) == labels).astype(jnp.float32)

    def weigh(self, seen_BxTxN, valid_BxTxN, state):
        T, N = seen_BxTxN.shape[1:]
        right = jnp.cumprod((seen_BxTxN > 0) & valid_BxTxN, axis=-1)
        accepted_BxT = jnp.sum(right, axis=-1)

        def visit(start_B, t):
            here_B = start_B == t
            taken_B = accepted_BxT[:, t]
            recorded_BxN = here_B[:, None] & (jnp.arange(N) == taken_B[:, None])
            # Rows without a label (padding, an unsupervised prompt) are passed one by one.
            return jnp.where(here_B, t + taken_B + 1, start_B), recorded_BxN

        start_B = jnp.zeros(seen_BxTxN.shape[0], accepted_BxT.dtype)
        _, recorded_TxBxN = jax.lax.scan(visit, start_B, jnp.arange(T))
        return (recorded_TxBxN.swapaxes(0, 1) & valid_BxTxN).astype(jnp.float32)


def acceptance_rate(seen_BxTxN, valid_BxTxN):
    """rate_N: what `SpecKD.observe` saw, averaged over the valid positions of each depth (TAR).

    Zero at a depth without valid positions.
    """
    total_N = jnp.sum(jnp.where(valid_BxTxN, seen_BxTxN, 0.0), axis=(0, 1))
    return total_N / jnp.maximum(jnp.sum(valid_BxTxN, axis=(0, 1)), 1)


GATES: dict[str, type[Gate]] = {
    g.name: g for g in (Everything, SpecKD, AdaSpec, Recorded, Rejected)
}


def get_gate(name: str, **parameters) -> Gate:
    """A gate by name.

    Raises:
      ValueError: unknown name (lists the known ones), unknown parameter, value out of range.
    """
    if name not in GATES:
        raise ValueError(f"gate: {name!r} is unknown; one of {tuple(GATES)}")
    try:
        return GATES[name](**parameters)
    except TypeError as error:
        raise ValueError(f"gate {name!r}: {error}") from error


def _require(holds: bool, gate: str, field: str, value, wanted: str):
    if not holds:
        raise ValueError(f"gate {gate!r}: {field} {value!r} must be {wanted}")


def _uniform(key, shape):
    """Uniform numbers in [0, 1), BxTxN. Appending sequences or rows moves none of the others."""
    keys_B = jax.random.split(key, shape[0])
    return jax.vmap(lambda k: jax.random.uniform(k, shape[1:]))(keys_B)
