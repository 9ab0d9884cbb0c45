"""The drafter's training loss: target forward on the fly, supervision at every depth.

Index convention, everywhere: row t holds (features g_t, embedding of x_{t+1}); depth i = 1..N
drafts x_{t+1+i}; its teacher is the target's distribution at position t+i.

Every (row, depth) gets numbers of its own, a divergence above all; a gate turns what it has seen of
all of them into weights; the loss is the weighted sum over the count of supervised positions.
"""

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from specjax.distillation import losses
from specjax.distillation.deepkd import STREAMS, DeepKD, stream_losses
from specjax.distillation.divergences import get_divergence
from specjax.distillation.gates import Gate, get_gate
from specjax.drafters.base import join_buffers
from specjax.drafters.learned import LearnedDrafter
from specjax.models import transformer
from specjax.models.layers import recomputed_layers
from specjax.models.linear import readout
from specjax.sampling import argmax

PLAIN = "cross_entropy"
"""Forward KL plus the teacher's entropy: the same gradient for one softmax less a depth."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """What training minimises; static: equal objectives share their compiled steps.

    Attributes:
      divergence: `PLAIN` or a name in `distillation.divergences`.
      divergence_options: its parameters, temperature among them, as (name, value) pairs.
      gate: weighs positions.
      deepkd: if given, three losses in place of the divergence, each with a gradient of its own.
      ce, hard, feature: weights of the divergence, of the hard cross-entropy of the text's own
        token, and of Smooth-L1 against the target's LM-head input.
      decay: depth i weighs decay^(i-1).
      chunk: rows of full-vocabulary logits held at once, 0 = all.
      remat: recompute the drafter's layers in the backward pass.
    """

    divergence: str
    divergence_options: tuple[tuple[str, float], ...]
    gate: Gate
    deepkd: DeepKD | None
    ce: float
    hard: float
    feature: float
    decay: float
    chunk: int
    remat: bool = False

    @property
    def streams(self) -> int:
        """Losses with a gradient of their own."""
        return len(STREAMS) if self.deepkd else 1


def make_objective(cfg: ConfigDict, steps: int, remat: bool = False) -> Objective:
    """Builds what `config.train.loss` describes, for a run of `steps` steps.

    Raises:
      ValueError: an unknown divergence or gate, or a parameter out of range (names the field).
    """
    name, options = cfg.divergence, cfg.divergence_options.to_dict()
    if name == PLAIN and cfg.temperature != 1.0:
        name = "forward_kl"
    if name != PLAIN:
        options |= {"temperature": cfg.temperature}
        get_divergence(name, **options)  # refused here, not at the first step
    deepkd = DeepKD(**({"steps": steps} | cfg.deepkd_options.to_dict())) if cfg.deepkd else None
    gate = get_gate(cfg.gate, **cfg.gate_options.to_dict())
    if cfg.chunk < 0:
        raise ValueError(f"chunk: {cfg.chunk} must be at least 0, all rows at once")
    return Objective(
        name, tuple(sorted(options.items())), gate, deepkd,
        cfg.ce, cfg.hard, cfg.feature, cfg.decay, cfg.chunk, remat,
    )  # fmt: skip


def drafter_loss(
    definition: LearnedDrafter, objective: Objective, params, frozen, batch, step=0, key=None
):
    """Loss of one batch.

    Args:
      definition: the drafter; its `teach` gives N hidden states per row.
      params: trainable parameters.
      frozen: {"target": its parameters, "buffers": the drafter's constants, "reference": trained
        parameters of a reference drafter, where the gate compares with one}; no gradient.
      batch: {"tokens": BxT int32, "supervised": BxT bool, tokens whose prediction is trained;
        "segments": BxT int32, where a row holds several texts (`transformer.text_layout`);
        "features": {"hidden": BxTxD, "taps": BxTxM}, the target's forward if it was run before;
        "recorded": BxTxN bool, where the gate asks for it}.
      step: steps done, traced; for schedules.
      key: for gates that sample.

    Returns:
      (loss, metrics); with `objective.streams` > 1 the losses as a vector. Metrics are per depth:
      cross-entropy or divergence `ce_i`, top-1 agreement with the target `agree_i`; with a gate the
      mean weight `kept_i` and what it reports itself (SpecKD: acceptance, `accepted_i`).
    """
    tokens_BxT, segments_BxT = batch["tokens"], batch.get("segments")
    config = definition.target
    target = frozen["target"]
    key = jax.random.key(0) if key is None else key
    features = batch.get("features") or transformer.text_features(
        target, config, definition.taps, tokens_BxT, segments_BxT
    )
    features = jax.lax.stop_gradient(features)
    teacher_BxTxD, taps = features["hidden"], features.get("taps")
    params = join_buffers(params, frozen["buffers"])
    with recomputed_layers() if objective.remat else nullcontext():
        hidden, aligned = definition.teach(params, target, taps, tokens_BxT, segments_BxT)
    N, T = len(hidden), tokens_BxT.shape[1]
    labelled_BxTxN = losses.label_mask(batch["supervised"], N, segments_BxT)
    vocab_ids = definition.vocab_ids(params)
    head_WxD = definition.head(params, target)
    read = [definition.normed(params, h) for h in hidden]
    aligned = [definition.normed(params, f) for f in aligned] if objective.feature else read
    reference = None
    if "reference" in frozen:
        other = join_buffers(jax.lax.stop_gradient(frozen["reference"]), frozen["buffers"])
        states, _ = definition.teach(other, target, taps, tokens_BxT, segments_BxT)
        reference = [definition.normed(other, h) for h in states]
        reference_head_WxD = definition.head(other, target)
    # Teacher rows run N past the student's; the padding is masked out by the weights.
    teacher_rows = jnp.pad(teacher_BxTxD, ((0, 0), (0, N), (0, 0)))
    token_rows = jnp.pad(tokens_BxT, ((0, 0), (0, N + 1)))
    if vocab_ids is not None:
        places_V = jnp.full(config.vocab_size, -1).at[vocab_ids].set(jnp.arange(vocab_ids.size))

    def rows(start, size):
        """What each position of `size` rows contributes, a dict of BxCxN[xS]."""
        cut = lambda x, n: jax.lax.dynamic_slice_in_dim(x, start, n, axis=1)  # noqa: E731
        inputs = cut(teacher_rows, size + N)
        teacher_logits = transformer.logits_of(target, inputs)
        teacher_best = argmax(teacher_logits)
        tokens = cut(token_rows, size + N + 1)
        covered = jnp.ones_like(teacher_best, bool)
        if vocab_ids is not None:
            # Renormalised inside the draft vocabulary; rows whose best token is outside are out.
            teacher_best, tokens = places_V[teacher_best], places_V[tokens]
            covered = teacher_best >= 0
            teacher_logits = teacher_logits[..., vocab_ids]
        teacher_probs = jax.nn.softmax(teacher_logits)  # once; every depth reads a shifted slice
        depths = []
        for i in range(1, N + 1):
            labelled = cut(labelled_BxTxN, size)[..., i - 1]
            state = {"step": step, "key": jax.random.fold_in(jax.random.fold_in(key, start), i)}
            if reference is not None:
                state["reference"] = readout(cut(reference[i - 1], size), reference_head_WxD)
            seen = {
                "teacher": teacher_logits[:, i : i + size],
                "probs": teacher_probs[:, i : i + size],
                "student": readout(cut(read[i - 1], size), head_WxD),
                "labels": jnp.where(labelled, tokens[:, 1 + i : 1 + i + size], -1),
            }
            values, divergence = _values(objective, seen, step)
            gap = jnp.zeros(labelled.shape)
            if objective.feature:
                gap = losses.smooth_l1(cut(aligned[i - 1], size), inputs[:, i : i + size])
            # Agreement without an argmax: is the teacher's best token the student's maximum?
            best = teacher_best[:, i : i + size, None]
            chosen = jnp.take_along_axis(seen["student"], best, axis=-1)[..., 0]
            depths.append(
                {
                    "values": values,
                    "divergence": divergence,
                    "feature": gap,
                    "covered": covered[:, i : i + size],
                    "agree": chosen >= jnp.max(seen["student"], axis=-1),
                    "seen": objective.gate.observe(
                        seen["teacher"], seen["student"], seen["labels"], state
                    ),
                }
            )
        return jax.tree.map(lambda *x: jnp.stack(x, axis=2), *depths)

    with jax.named_scope("loss"):
        each = losses.by_chunks(rows, T, objective.chunk)
        state = batch | {"step": step, "key": key}
        loss_S, by_depth = _weighed(objective, each, labelled_BxTxN, state)
    metrics = {f"{name}_{i + 1}": x_N[i] for name, x_N in by_depth.items() for i in range(N)}
    return (loss_S if objective.streams > 1 else loss_S[0]), metrics


def _weighed(objective: Objective, each: dict, labelled_BxTxN, state: dict):
    """(losses by stream S, metrics N by name) of what the positions contribute."""
    N = labelled_BxTxN.shape[2]
    valid = labelled_BxTxN & each["covered"]
    weight_BxTxN = objective.gate.weigh(each["seen"], valid, state)
    count_N = jnp.maximum(jnp.sum(valid, axis=(0, 1)), 1)

    def mean(x, weight):  # over valid positions, per depth
        weight = jnp.reshape(weight, weight.shape + (1,) * (x.ndim - 3))
        total = jnp.sum(jnp.where(weight > 0, weight * x, 0.0), axis=(0, 1))
        return total / count_N.reshape((-1,) + (1,) * (x.ndim - 3))

    decay_N = losses.depth_weights(N, objective.decay)
    loss_S = decay_N @ mean(each["values"], weight_BxTxN)
    if objective.feature:  # never gated: it keeps the states themselves in place
        gap_N = mean(each["feature"], valid.astype(jnp.float32))
        loss_S = loss_S.at[0].add(objective.feature * (decay_N @ gap_N))
    labelled_N = jnp.maximum(jnp.sum(labelled_BxTxN, axis=(0, 1)), 1)
    by_depth = {
        "ce": mean(each["divergence"], valid.astype(jnp.float32)),
        "agree": jnp.sum(valid & each["agree"], axis=(0, 1)) / labelled_N,
    }
    if objective.gate.name != "everything":
        by_depth["kept"] = jnp.sum(weight_BxTxN, axis=(0, 1)) / count_N
        by_depth |= objective.gate.rates(each["seen"], valid)
    return loss_S, by_depth


def _values(objective: Objective, seen: dict, step):
    """(losses by stream BxCxS, the divergence that is logged BxC) of one depth's rows."""
    teacher, student, labels = seen["teacher"], seen["student"], seen["labels"]
    if objective.deepkd:
        values = stream_losses(teacher, student, labels, objective.deepkd, step)
        return values, losses.cross_entropy(seen["probs"], student)
    if objective.divergence == PLAIN:
        divergence = losses.cross_entropy(seen["probs"], student)
    else:
        distance = get_divergence(objective.divergence, **dict(objective.divergence_options))
        divergence = distance(teacher, student)
    value = objective.ce * divergence
    if objective.hard:
        value = value + objective.hard * losses.hard_cross_entropy(labels, student)
    return value[..., None], divergence
