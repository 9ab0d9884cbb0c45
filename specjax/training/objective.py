"""The drafter's training loss: target forward on the fly, supervision at every depth."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from specjax.distillation import losses
from specjax.drafters.features import FeatureDrafter
from specjax.models import transformer
from specjax.models.linear import readout
from specjax.sampling import argmax

NEGATIVE = jnp.finfo(jnp.float32).min


def drafter_loss(definition: FeatureDrafter, cfg: ConfigDict, params, frozen, batch):
    """Mean loss of one batch.

    Args:
      definition: the drafter; its `unroll` gives N hidden states per row.
      cfg: ce (weight of the cross-entropy against the target's distribution), feature (weight of
        Smooth-L1 against the target's LM-head input), decay (per-depth weight decay^(i-1)), chunk.
      params: trainable parameters.
      frozen: {"target": its parameters, "buffers": the drafter's constants}; no gradient.
      batch: {"tokens": BxT int32, "supervised": BxT bool, tokens whose prediction is trained}.

    Returns:
      (loss, metrics): per-depth cross-entropy `ce_i` and top-1 agreement with the target `agree_i`.
    """
    tokens_BxT, config = batch["tokens"], definition.target
    target = frozen["target"]
    out = transformer.forward(target, config, tokens_BxT, taps=definition.taps)
    teacher_BxTxD = jax.lax.stop_gradient(out.hidden_BxTxD)
    taps = jax.lax.stop_gradient(out.taps_BxTxM)
    params = params | ({"buffers": frozen["buffers"]} if frozen["buffers"] else {})
    hidden = definition.unroll(params, target, taps, losses.shift(tokens_BxT, 1))
    N, T = len(hidden), tokens_BxT.shape[1]
    weight_BxTxN = losses.label_weights(batch["supervised"], N)
    vocab_ids = definition.vocab_ids(params)
    head_WxD = definition.head(params, target)
    normed = [definition.normed(params, h) for h in hidden]
    # Teacher rows run N past the student's; the padding is masked out by the weights.
    teacher_rows = jnp.pad(teacher_BxTxD, ((0, 0), (0, N), (0, 0)))

    def rows(start, size):
        cut = lambda x, n: jax.lax.dynamic_slice_in_dim(x, start, n, axis=1)  # noqa: E731
        features = cut(teacher_rows, size + N)
        teacher_logits = transformer.logits_of(target, features)
        teacher_best = argmax(teacher_logits)
        covered = jnp.ones_like(teacher_best, bool)
        if vocab_ids is not None:
            # Renormalised inside the draft vocabulary; rows whose best token is outside are out.
            places_V = jnp.full(config.vocab_size, -1).at[vocab_ids].set(jnp.arange(vocab_ids.size))
            teacher_best = places_V[teacher_best]
            covered = teacher_best >= 0
            teacher_logits = teacher_logits[..., vocab_ids]
        teacher = jax.nn.softmax(teacher_logits)  # once; every depth reads a shifted slice of it
        sums = []
        for i in range(1, N + 1):
            weight = cut(weight_BxTxN, size)[..., i - 1]
            total = jnp.sum(weight)
            student = readout(cut(normed[i - 1], size), head_WxD)
            weight = weight * covered[:, i : i + size]
            # Agreement without an argmax: is the teacher's best token the student's maximum?
            best = teacher_best[:, i : i + size, None]
            chosen = jnp.take_along_axis(student, best, axis=-1)[..., 0]
            agree = jnp.sum(weight * (chosen >= jnp.max(student, axis=-1)))
            ce = losses.cross_entropy(teacher[:, i : i + size], student)
            ce = jnp.sum(jnp.where(weight > 0, weight * ce, 0.0))
            feature = jnp.zeros(())
            if cfg.feature:
                gap = losses.smooth_l1(cut(normed[i - 1], size), features[:, i : i + size])
                feature = jnp.sum(weight * gap)
            sums.append(jnp.stack([ce, feature, agree, total, jnp.sum(weight)]))
        return jnp.stack(sums)

    with jax.named_scope("loss"):
        ce, feature, agree, total, trained = losses.chunked(rows, T, cfg.chunk).T
        per_depth = (cfg.ce * ce + cfg.feature * feature) / jnp.maximum(trained, 1.0)
        loss = jnp.sum(losses.depth_weights(N, cfg.decay) * per_depth)
        rate = agree / jnp.maximum(total, 1.0)
    metrics = {f"ce_{i + 1}": ce[i] / jnp.maximum(trained[i], 1.0) for i in range(N)}
    return loss, metrics | {f"agree_{i + 1}": rate[i] for i in range(N)}
