"""Optimisers by name: warm-up, cosine, clipping around AdamW or Muon."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from specjax.distillation.deepkd import (
    DeepKD,
    clip_streams_by_global_norm,
    deepkd_trace,
    scale_by_deepkd_adam,
)
from specjax.distillation.gsnr import probe_gsnr
from specjax.sharding import path_of


def schedule(cfg, steps: int) -> optax.Schedule:
    """Linear warm-up over `cfg.warmup_steps`, cosine decay to `cfg.final_lr_ratio` of the peak."""
    warmup = min(cfg.warmup_steps, max(steps - 1, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0,
        cfg.learning_rate,
        warmup,
        max(steps, warmup + 1),
        cfg.learning_rate * cfg.final_lr_ratio,
    )


# (reduction axes, output axes) of the kernels that Muon orthogonalises, counted from the end so
# that stacked and listed layers read alike.
_KERNELS = {
    "attn/qkv": ((-4,), (-3, -2, -1)),
    "attn/o": ((-2,), (-1,)),
    "mlp/gate_up": ((-3,), (-2, -1)),
    "mlp/down": ((-2,), (-1,)),
    "fc": ((-2,), (-1,)),  # drafters: feature fusion and cascade entry
    "entry": ((-2,), (-1,)),
    "sampling/gate": ((-2,), (-1,)),
    "sampling/up": ((-2,), (-1,)),
    "sampling/down": ((-2,), (-1,)),
    "shift_down": ((-2,), (-1,)),  # FastEagle X
    "shift_up": ((-2,), (-1,)),
}


def _muon_dimensions(params):
    def dimensions(keys, leaf):
        path = path_of(keys)
        for name, (reduction, output) in _KERNELS.items():
            if path.endswith(name):
                n = leaf.ndim
                return MuonDimensionNumbers(
                    tuple(n + a for a in reduction), tuple(n + a for a in output)
                )
        return None  # embeddings, heads, norms: AdamW

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(cfg, steps: int, deepkd: DeepKD | None = None) -> optax.GradientTransformation:
    """Builds the optimiser that `cfg` describes.

    Args:
      cfg: name ("adamw" or "muon"), learning_rate, warmup_steps, final_lr_ratio, b1, b2,
        eps (AdamW's), weight_decay, clip_norm; Muon reads muon_learning_rate for the layers'
        kernels.
      steps: length of the schedule.
      deepkd: if given, gradients come in its three streams, and the optimiser's own momentum gives
        way to one for each stream (AdamW: one first moment each and a shared second one).

    Raises:
      ValueError: unknown name.
    """
    rate = schedule(cfg, steps)
    if cfg.name == "adamw" and deepkd:
        core = optax.chain(
            scale_by_deepkd_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, deltas=deepkd.deltas),
            optax.add_decayed_weights(cfg.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
    elif cfg.name == "adamw":
        core = optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay)
    elif cfg.name == "muon":
        ratio = cfg.muon_learning_rate / cfg.learning_rate
        core = muon(
            lambda count: ratio * rate(count),
            weight_decay=cfg.weight_decay,
            adam_b1=0.0 if deepkd else cfg.b1,
            adam_b2=cfg.b2,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=_muon_dimensions,
            **(dict(beta=0.0, nesterov=False) if deepkd else {}),
        )
        if deepkd:
            core = optax.chain(
                deepkd_trace(deepkd.mu, *deepkd.deltas, normalised=deepkd.normalised), core
            )
    else:
        raise ValueError(f"optimizer.name: {cfg.name!r} is unknown; one of 'adamw', 'muon'")
    if deepkd:
        links = [probe_gsnr()] if deepkd.probe else []
        return optax.chain(*links, clip_streams_by_global_norm(cfg.clip_norm), core)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), core)
