"""Checkpoints: a thin, strict layer over orbax.

orbax writes to a temporary directory and renames it when whole, so a killed run leaves either a
whole checkpoint or a directory that is ignored. What is damaged later is stepped over: `restore`
falls back to the newest checkpoint that loads and says so. Where none loads, none is touched.
"""

import pathlib
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from absl import logging

from specjax.processes import everyones


class Checkpoints:
    """The checkpoints of one training stage, newest `keep` of them."""

    def __init__(self, folder: str | pathlib.Path, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state):
        """Writes one checkpoint; returns when it is whole on disk."""
        self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def restore(self, like, say: Callable[[str], None] = logging.warning):
        """The newest checkpoint that loads, in the shapes and shardings of `like`.

        Newer ones are then deleted: they would be in the way of the next save. None where there
        are no checkpoints.

        Args:
          like: a state (arrays or ShapeDtypeStructs with shardings) of the same structure.
          say: told about every checkpoint that was deleted.

        Raises:
          ValueError: there are checkpoints and none loads (why, one by one); all are kept.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        reasons: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, reason = None, "another process could not load it"
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            except Exception as error:  # orbax raises many kinds; each means: not this one
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if all(everyones(state is not None)):
                for newer, why in reasons.items():
                    say(
                        f"checkpoint {self.folder / str(newer)} is damaged and deleted, going on "
                        f"from step {step}: {why}"
                    )
                    self._manager.delete(newer)
                return state
            reasons[step] = reason
        if reasons:
            each = "; ".join(f"step {step}: {why}" for step, why in reasons.items())
            raise ValueError(f"{self.folder}: no checkpoint loads, all are kept: {each}")
        return None

    def close(self):
        """Releases orbax's threads."""
        self._manager.close()
