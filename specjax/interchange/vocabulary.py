"""The draft vocabulary as files hold it: d2t, an offset for each draft id, and t2d, a mask.

The target id of draft id j is j + d2t[j]; t2d is true at the target ids that have a draft id.
"""

import numpy as np

from specjax.interchange.folder import Tensors, refuse


def split_vocabulary(ids_W, vocab_size: int) -> dict[str, np.ndarray]:
    """Target ids of the draft vocabulary -> d2t int64[W] and t2d bool[V]."""
    ids_W = np.asarray(ids_W, np.int64)
    mask_V = np.zeros(vocab_size, bool)
    mask_V[ids_W] = True
    return {"d2t": ids_W - np.arange(len(ids_W)), "t2d": mask_V}


def read_vocabulary(tensors: Tensors, source, size, vocab_size: int) -> np.ndarray | None:
    """int32[W] target ids, or None where the draft vocabulary is the target's.

    Args:
      tensors: the head's.
      source: the config, for messages.
      size: what the config says of draft_vocab_size; None is the whole vocabulary.
      vocab_size: the target's.

    Raises:
      ValueError: sizes, offsets or mask that contradict each other.
    """
    key = "draft_vocab_size"
    size = vocab_size if size is None else size
    if type(size) is not int or not 1 <= size <= vocab_size:
        refuse(source, key, f"{size!r} must be in [1, {vocab_size}], the target's vocabulary")
    if "d2t" not in tensors.names:
        if size < vocab_size:
            refuse(source, key, f"{size} of {vocab_size} tokens, but there is no tensor d2t")
        if "t2d" in tensors.names and not tensors.read("t2d", (vocab_size,), ("bool",)).all():
            raise ValueError(f"{tensors.folder}: t2d leaves tokens out, but there is no tensor d2t")
        return None
    offsets_W = tensors.read("d2t", (size,), ("int64", "int32"))
    ids_W = offsets_W.astype(np.int64) + np.arange(size)
    if ids_W.min() < 0 or ids_W.max() >= vocab_size or len(np.unique(ids_W)) < size:
        raise ValueError(
            f"{tensors.folder}: d2t does not hold offsets: j + d2t[j] must be distinct ids in "
            f"[0, {vocab_size}), and spans [{ids_W.min()}, {ids_W.max()}]"
        )
    if "t2d" in tensors.names:
        mask_V = tensors.read("t2d", (vocab_size,), ("bool",))
        if mask_V.sum() != size or not mask_V[ids_W].all():
            raise ValueError(f"{tensors.folder}: d2t and t2d name different tokens")
    return ids_W.astype(np.int32)
