"""What a draft tree's nodes are worth: the drafter's probability of each and the target's."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax.drafters.learned import LearnedDrafter
from specjax.evaluation.pictures import TreeView, token_label
from specjax.generation import pad_to_bucket
from specjax.models.target import Target
from specjax.models.transformer import logits_of, precision_of, text_features
from specjax.trained import TrainedDrafter
from specjax.trees import DraftTree


def paths_to(parents: Sequence[int]) -> list[tuple[int, ...]]:
    """The rows from depth 1 down to each row; () for the root."""
    found: list[tuple[int, ...]] = []
    for row, parent in enumerate(parents):
        found.append((*found[parent], row) if row else ())
    return found


def node_probabilities(
    target: Target, drafter: TrainedDrafter, ids: Sequence[int], tree: DraftTree
) -> tuple[np.ndarray, np.ndarray]:
    """(q_T, p_T): the drafter's and the target's probability of each row's token after its path.

    Both are at temperature 1 and unfiltered, 1 for the root. They are recomputed from whole texts
    without a cache, the drafter's by the teacher-forced forward that trains it.

    Args:
      ids: the committed tokens, the root last; two at least.
      tree: batched; the first one is looked at.

    Raises:
      ValueError: a drafter that is not trained, a text too short, a root that is not the last
        token, or a tree deeper than the drafter was trained to draft.
    """
    tokens, parents = (np.asarray(x[0]).tolist() for x in (tree.tokens_T, tree.parent_T))
    definition, paths = drafter.definition, paths_to(parents)
    if not definition.trained:
        raise ValueError(f"drafter {drafter.name!r} has no distribution of its own")
    if len(ids) < 2 or ids[-1] != tokens[0]:
        raise ValueError("ids: two tokens at least are expected, the tree's root the last")
    if max(map(len, paths)) > definition.unrolled:
        raise ValueError(
            f"tree: depth {max(map(len, paths))}, but {drafter.name!r} is trained for "
            f"{definition.unrolled}"
        )
    texts = pad_to_bucket([[*ids, *(tokens[row] for row in path)] for path in paths])
    logp_RxNxV, logq_RxNxV = jax.device_get(
        _laws(definition, target.config, target.params, drafter.params, texts, len(ids))
    )
    q_T, p_T = np.ones(len(paths)), np.ones(len(paths))
    for row, path in enumerate(paths[1:], start=1):
        level = len(path) - 1
        q_T[row] = np.exp(logq_RxNxV[row, level, tokens[row]])
        p_T[row] = np.exp(logp_RxNxV[row, level, tokens[row]])
    return q_T, p_T


@functools.partial(jax.jit, static_argnums=(0, 1))
def _laws(definition: LearnedDrafter, config, target_params, params, tokens_RxP, length):
    """Log-laws of the N tokens after the root: the target's and the drafter's, each RxNxV."""
    N = definition.unrolled
    with precision_of(target_params):
        features = text_features(target_params, config, definition.taps, tokens_RxP)
        ahead = jnp.minimum(length - 1 + jnp.arange(N), tokens_RxP.shape[1] - 1)
        logits = logits_of(target_params, features["hidden"][:, ahead])
        hidden, _ = definition.teach(params, target_params, features.get("taps"), tokens_RxP)
        # Row t stands for the round whose root is token t + 1.
        rows_RxNxD = jnp.stack([h[:, length - 2] for h in hidden], axis=1)
        drafted = definition.logits(params, target_params, rows_RxNxD)
        logq = definition.to_target_laws(params, jax.nn.log_softmax(drafted))
        return jax.nn.log_softmax(logits.astype(jnp.float32)), logq


def tree_view(
    target: Target, title: str, tree: DraftTree, notes: Sequence[str] = (), out=None
) -> TreeView:
    """The first tree of a batch as it is drawn; `out` is what a rule made of it, if one has."""
    labels = token_labels(target, np.asarray(tree.tokens_T[0]))
    path, extra = [], ""
    if out is not None:
        count = int(out.count[0])
        path = [int(row) for row in out.path_D[0][: count - 1]]
        (extra,) = token_labels(target, [out.tokens_A[0, count - 1]])
    return TreeView(title, np.asarray(tree.parent_T[0]).tolist(), labels, notes, path, extra)


def token_labels(target: Target, tokens: Sequence[int]) -> list[str]:
    """Each token's text, as `token_label` shows it."""
    return [token_label(target.tokenizer.decode([int(token)])) for token in tokens]
