"""Judge Decoding: also accept drafted tokens that a linear head finds good enough. Lossy.

Source: Bachmann et al. 2501.19309. The head reads the target's last hidden state *at* the drafted
token (the row that has consumed it, not the row that predicted it), and what it accepts is
OR-ed into an exact base rule as a force mask; gates to come produce the same mask. How heads are
trained: `training/judge.py`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from specjax.files import write_safetensors
from specjax.verification.base import Rule, Tree, VerifyOut
from specjax.verification.match import Match
from specjax.verification.token import Token

BASES = {"match": Match(), "token": Token()}


class JudgeHead:
    """sigmoid(w . h + b): the probability that a drafted token is acceptable.

    Compared by identity, so that a rule that carries one stays hashable.
    """

    def __init__(self, weight_D, bias: float = 0.0):
        self.weight_D = np.asarray(weight_D, np.float32)
        if self.weight_D.ndim != 1 or not np.isfinite(self.weight_D).all():
            raise ValueError(f"judge head: finite weights of one axis expected, not {weight_D}")
        self.bias = float(bias)

    def save(self, path) -> None:
        """Writes one safetensors file, whole or not at all."""
        write_safetensors(path, {"weight": self.weight_D, "bias": np.float32([self.bias])})

    @classmethod
    def load(cls, path) -> "JudgeHead":
        """Reads what `save` wrote; raises ValueError, naming the file, for anything else."""
        try:
            tensors = load_file(path)
            return cls(tensors["weight"], tensors["bias"][0])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: not a judge head: {error}") from error

    def logit(self, hidden_TxD):
        """w . h + b of each row."""
        return hidden_TxD.astype(jnp.float32) @ self.weight_D + self.bias


@dataclasses.dataclass(frozen=True)
class Judge(Rule):
    """Accepts a node if the base rule does or sigmoid(head) > threshold.

    Over "match", a token that no child carries gives way to the first forced child; over "token",
    a forced child is accepted whatever its ratio. Without a head nothing is forced.
    """

    name: ClassVar[str] = "judge"
    exact: ClassVar[bool] = False
    forces: ClassVar[bool] = True

    head: JudgeHead | None = None
    threshold: float = 0.5
    base: str = "match"

    def __post_init__(self):
        if self.base not in BASES:
            raise ValueError(f"rule 'judge': base {self.base!r} is not one of {tuple(BASES)}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"rule 'judge': threshold {self.threshold} must be in [0, 1]")

    @property
    def draws(self) -> str:
        return BASES[self.base].draws

    @property
    def chain_only(self) -> bool:
        return BASES[self.base].chain_only

    @property
    def orderless(self) -> bool:
        return BASES[self.base].orderless

    @property
    def reads_hidden(self) -> bool:
        return self.head is not None

    def check(self, sampling, drafter) -> None:
        super().check(sampling, drafter)
        D = drafter.target.hidden_size
        if self.head is not None and self.head.weight_D.shape != (D,):
            raise ValueError(
                f"rule 'judge': the head reads {self.head.weight_D.shape[0]} features, the "
                f"target has {D}"
            )

    def force(self, hidden_TxD):
        with np.errstate(divide="ignore"):
            limit = np.log(self.threshold) - np.log1p(-self.threshold)  # -inf and inf at the ends
        return self.head.logit(hidden_TxD) > limit

    def verify(self, noise, draft, rows, force_T=None) -> VerifyOut:
        return BASES[self.base].verify(noise, draft, rows, force_T)

    def law(self, tree: Tree):
        return BASES[self.base].law(tree)
