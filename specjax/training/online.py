"""Online speculative decoding: a drafter that learns from its own rejections while it decodes.

Source: Liu et al. 2310.07177 (ICML 2024). Every answer leaves a record of the places at which a
round ended before its draft did; every `interval` requests the drafter is updated on those places
alone, and the records are dropped. Decoding stays lossless: the drafter changes only between
requests, and verification does not ask where a draft came from.

Ours: the target's distributions are recomputed in the update's own forward, so a record is a mask
over the answer, not logits. Nothing is recorded where a whole draft was accepted, and not in an
answer's last round, which a stop token or the length limit may have cut (the released code records
the extra token of every round, and trains the row after the corrected one).
"""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from specjax.drafters.base import join_buffers, split_buffers
from specjax.generation import Generation, encode_prompts, generate
from specjax.models.target import Target
from specjax.trained import TrainedDrafter
from specjax.training.drafter import compiled_step
from specjax.training.objective import make_objective
from specjax.training.state import create


def rejections(prompt: int, accept_lengths, depth: int, rows: int) -> np.ndarray:
    """bool rows x depth: where the rounds of one answer ended before their draft did.

    Args:
      prompt: tokens of the prompt.
      accept_lengths: prefill's 1, then tokens emitted by each round.
      depth: most tokens a draft adds.
      rows: of the padded sequence.

    Entry [t, i - 1] is the label x_{t+1+i}: what the target put in the place of depth i's draft.
    """
    recorded = np.zeros((rows, depth), bool)
    root = prompt  # index of the newest committed token, drafted from at row root - 1
    for emitted in accept_lengths[1:-1]:
        if emitted <= depth and root - 1 < rows:
            recorded[root - 1, emitted - 1] = True
        root += emitted
    return recorded


class OnlineTrainer:
    """Decodes with a drafter and keeps it in training.

    Attributes:
      drafter: as trained so far.
      updates: optimisation steps taken.
    """

    def __init__(
        self, target: Target, drafter: TrainedDrafter, optimizer: ConfigDict, loss: ConfigDict,
        interval: int = 8, length: int = 512, steps: int = 1_000_000,
    ):  # fmt: skip
        """Sets up.

        Args:
          target, drafter: a pair; the drafter must be of the trained kind.
          optimizer: as `config.train.optimizer`.
          loss: as `config.train.loss`; its gate is replaced by "recorded".
          interval: requests an update.
          length: tokens of a request, answer included, that an update looks at.
          steps: of the optimiser's schedule.

        Raises:
          ValueError: a drafter without training, or interval or length below 1.
        """
        if not drafter.definition.trained:
            raise ValueError(f"drafter: {drafter.name!r} is not trained")
        if interval < 1 or length < 1:
            raise ValueError(f"interval, length: {interval}, {length} must be at least 1")
        loss = loss.copy_and_resolve_references()
        with loss.unlocked():
            loss.gate, loss.gate_options = "recorded", ConfigDict()
        self.target, self.drafter, self.interval, self.length = target, drafter, interval, length
        objective = make_objective(loss, steps)
        self._step, tx = compiled_step(drafter.definition, objective, optimizer.to_json(), steps)
        params, buffers = split_buffers(drafter.params)
        self._state = create(params, tx)
        key = jax.random.key(0)
        self._frozen = {"key": key, "target": target.params, "buffers": buffers}
        self._records: list[tuple[list[int], np.ndarray]] = []
        self.updates = 0

    def generate(self, prompts, **settings) -> Generation:
        """`specjax.generate`, request by request, each with the drafter as it is by then."""
        parts = []
        for prompt in encode_prompts(self.target, prompts):
            part = generate(self.target, [prompt], self.drafter, **settings)
            parts.append(part)
            self.record(prompt, part.tokens[0], part.accept_lengths[0])
        each = {f: [getattr(p, f)[0] for p in parts] for f in ("tokens", "texts", "accept_lengths")}
        return Generation(**each, drafter=self.drafter)

    def record(self, prompt: list[int], tokens: list[int], accept_lengths: list[int]) -> bool:
        """Takes in one answer; updates the drafter at every `interval`-th, and says whether."""
        depth = self.drafter.definition.depth
        recorded = rejections(len(prompt), accept_lengths, depth, self.length)
        self._records.append(([*prompt, *tokens][: self.length], recorded))
        if len(self._records) < self.interval:
            return False
        self._update()
        return True

    def _update(self):
        trained = self.drafter.definition.unrolled
        tokens = np.zeros((self.interval, self.length), np.int32)
        supervised = np.zeros((self.interval, self.length), bool)
        recorded = np.zeros((self.interval, self.length, trained), bool)
        for b, (ids, mask) in enumerate(self._records):
            tokens[b, : len(ids)], supervised[b, : len(ids)] = ids, True
            recorded[b, :, : mask.shape[1]] = mask[:, :trained]
        batch = {"tokens": tokens, "supervised": supervised, "recorded": recorded}
        self._state, _ = self._step(self._state, self._frozen, batch)
        self._records = []
        self.updates += 1
        # The state is donated to the next step: decode with a copy.
        params = jax.tree.map(lambda w: w.copy(), self._state.params)
        params = join_buffers(params, self._frozen["buffers"])
        self.drafter = dataclasses.replace(self.drafter, params=params)
