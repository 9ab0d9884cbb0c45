"""The Drafter protocol: pure methods over explicit parameters and state.

A drafter is a frozen dataclass: its fields are its configuration, so it is hashable and can be a
static argument of a jitted round. To add one, write a file with a subclass and list it in
`drafters/__init__.py`; nothing else changes.
"""

import dataclasses
import numbers
from typing import Any, ClassVar

import flax.struct
import jax

from specjax.drafters.proposals import KINDS, Proposal
from specjax.models.config import ModelConfig
from specjax.sampling import Sampling
from specjax.trees import DraftTree, Topology


@flax.struct.dataclass
class Committed:
    """Rows that the target has just committed, oldest first, and the token that follows each."""

    tokens_BxA: jax.Array  # int32: row j's next token (the last valid one is the new root)
    taps_BxAxM: jax.Array | None  # the target's tapped features at the row, if asked for
    counts_B: jax.Array  # int32 valid rows; the rest is padding


@flax.struct.dataclass
class Context:
    """What every drafter may look at: all committed tokens, the root being the last."""

    tokens_BxS: jax.Array  # int32
    lengths_B: jax.Array  # int32 committed tokens, root included

    def begin_B(self, committed: Committed):
        """Where in the text the rows begin that have just been committed."""
        return self.lengths_B - 1 - committed.counts_B

    def rows_BxA(self, begin_B, A: int):
        """A tokens of each text from `begin_B` on."""
        cut = jax.vmap(lambda tokens, n: jax.lax.dynamic_slice(tokens, (n,), (A,)))
        return cut(self.tokens_BxS, begin_B)

    def root_B(self):
        """The newest committed token of each row."""
        return jax.vmap(lambda tokens, n: tokens[n - 1])(self.tokens_BxS, self.lengths_B)


@flax.struct.dataclass
class Scored:
    """The target's view of a draft, row by row of its tree."""

    logits_BxTxV: jax.Array
    hidden_BxTxD: jax.Array  # the LM head's input
    taps_BxTxM: jax.Array | None


_SET_BY_OTHERS = ("target", "proposal", "expected")


def split_buffers(params) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable parameters, constants such as a draft vocabulary's ids) of a drafter."""
    return {k: v for k, v in params.items() if k != "buffers"}, params.get("buffers", {})


def join_buffers(params, buffers) -> dict[str, Any]:
    """The parameters of a drafter, given its trainable ones and its constants, if any."""
    return params | ({"buffers": buffers} if buffers else {})


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Base class; `target` is the geometry that the drafter was made for."""

    name: ClassVar[str] = ""
    default_rule: ClassVar[str] = "match"
    trained: ClassVar[bool] = False  # whether it has parameters to train
    proposals: ClassVar[tuple[str, ...]] = ("top",)  # kinds of drawing it offers
    # How its own parameters are split over a mesh, ahead of the rules in specjax/sharding.py.
    partition: ClassVar[tuple[tuple[str, tuple], ...]] = (("buffers/.*", ()),)

    target: ModelConfig
    # How tokens are drawn; set by the rule that verifies them, not by the user.
    proposal: Proposal = dataclasses.field(default=Proposal(), kw_only=True)
    # Best first tokens to say beside the tree (`DraftTree.expected_K`), if it has a law of them;
    # set by who prunes by them, not by the user.
    expected: int = dataclasses.field(default=0, kw_only=True)

    @property
    def nodes(self) -> int:
        """T: rows the target verifies each round, root included."""
        return self.topology.nodes

    @property
    def depth(self) -> int:
        """Most draft tokens one round can accept."""
        raise NotImplementedError

    @property
    def topology(self) -> Topology | None:
        """The static tree, or None when the tree is built on the device each round."""
        return None

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose inputs it wants, low to high; `num_layers` is the LM head's input."""
        return ()

    @property
    def scratch(self) -> int:
        """Slots past the committed ones that a round may write in the drafter's own cache."""
        return self.depth + 1

    @classmethod
    def of(cls, target: ModelConfig, config: dict[str, Any]) -> "Drafter":
        """The drafter that plain values describe: a recipe's, or `plain`'s after JSON.

        Raises:
          ValueError: a field that it does not have, or a value out of range (names the field).
        """
        cls._check_fields(config)
        return cls(target, **{k: _field(v) for k, v in config.items()})

    @classmethod
    def _check_fields(cls, config) -> None:
        fields = {f.name: f.type for f in dataclasses.fields(cls)}
        fields = {k: v for k, v in fields.items() if k not in _SET_BY_OTHERS}
        unknown = sorted(set(config) - set(fields))
        if unknown:
            raise ValueError(
                f"drafter {cls.name!r} has no field {unknown[0]!r}; it has {sorted(fields)}"
            )
        for name, value in config.items():
            kind, said = _NUMBERS.get(fields[name], (object, ""))
            if not isinstance(value, kind):
                raise ValueError(f"{name}: {value!r} must be {said}")

    def plain(self) -> dict[str, Any]:
        """Its configuration as JSON can hold it; the target's is kept apart."""
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k not in _SET_BY_OTHERS}

    @classmethod
    def load(cls, target, folder) -> tuple[dict[str, Any], dict[str, Any]]:
        """(fields, parameters) of a model of its own in a folder, where the family has one.

        Raises:
          ValueError: it has none, or the model does not fit the target.
        """
        raise ValueError(f"folder: drafter {cls.name!r} has no model of its own to load")

    def init(self, key, target_params) -> dict[str, Any]:
        """Fresh parameters."""
        return {}

    def init_state(self, batch: int, slots: int, dtype) -> Any:
        """State before prefill."""
        return ()

    def prefill(self, params, target_params, state, committed: Committed, context: Context) -> Any:
        """Absorbs a prompt: A = its padded length, counts_B its true one.

        In a conversation's later turns the rows begin inside the text (`context.begin_B`) and
        replace all that the state holds from there on. The rows of the last round are always among
        them, so a state may take those in as late as it likes.
        """
        return state

    def draft(self, params, target_params, state, context: Context, key) -> tuple[DraftTree, Any]:
        """One batched draft and the state after it."""
        raise NotImplementedError

    def absorb(self, params, state, committed: Committed, tree: DraftTree, scored: Scored) -> Any:
        """Takes in what verification committed (A = depth + 1 rows; none where a row is done).

        `tree` and `scored` are all that was drafted and what the target made of it, rejected rows
        included; what is not read costs nothing.
        """
        return state

    def keep(self, params, state) -> Any:
        """Parameters for the next requests: what the drafter learns from use outlives a request."""
        return params

    def drawn(self, kind: str, sampling: Sampling) -> "Drafter":
        """The same drafter drawing its tokens as a rule needs them."""
        proposal = Proposal(kind, sampling) if kind != "top" else Proposal()
        return dataclasses.replace(self, proposal=proposal)

    def among_others(self, depth: int) -> "Drafter":
        """The same drafter where a round may commit up to `depth` tokens that others drafted."""
        return self

    def with_budget(self, **changes) -> "Drafter":
        """The same drafter (same parameters) with another tree.

        Raises:
          ValueError: a field that it does not have, or a value out of range (names the field).
        """
        self._check_fields(changes)
        return dataclasses.replace(self, **changes)


_NUMBERS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number")}


def _field(value):
    if isinstance(value, dict):
        return ModelConfig.of(value)
    return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Vanilla(Drafter):
    """No drafter: the tree is the root alone, so a round is one step of plain decoding."""

    name: ClassVar[str] = "vanilla"
    proposals: ClassVar[tuple[str, ...]] = KINDS  # it draws nothing

    @property
    def depth(self) -> int:
        return 0

    @property
    def topology(self) -> Topology:
        return Topology((-1,))

    def draft(self, params, target_params, state, context, key):
        return self.topology.draft(context.root_B()[:, None]), state
