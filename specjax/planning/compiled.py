"""The same programs compiled for the devices there are, and what XLA says they take.

Only shapes go in, so nothing is allocated, but compiling a large model takes what compiling takes.
What a CPU's analysis cannot tell of an accelerator: docs/planning.md.
"""

import jax
import jax.numpy as jnp

from specjax import decoding, sharding
from specjax.planning import shards
from specjax.planning.estimate import Estimate
from specjax.planning.programs import (
    Model,
    Request,
    batch_shapes,
    decode_state,
    engine_of,
    key_shape,
    state_shapes,
)
from specjax.sampling import GREEDY, Sampling
from specjax.training.drafter import compiled_step
from specjax.training.objective import make_objective

# Reductions as library calls read whole arrays that no accelerator would make.
OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


def total(lowered) -> int:
    """Bytes of arguments, results and temporaries, those in place of one another once."""
    try:
        compiled = lowered.compile(compiler_options=OPTIONS)
    except Exception:  # an XLA without that option
        compiled = lowered.compile()
    m = compiled.memory_analysis()
    new = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes + new + m.temp_size_in_bytes


def placed(tree, places):
    """Shapes with shardings."""
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(put, tree, places)


def everywhere(mesh, tree, place):
    """Shapes that all have one sharding."""
    return placed(tree, jax.tree.map(lambda _: place, tree))


def lower_step(model: Model, definition, cfg, length: int):
    """The real training step over the mesh, lowered."""
    mesh = model.mesh
    whole, buffers = shards.drafter_shapes(definition, model.params)
    objective = make_objective(cfg.loss, cfg.steps)
    step, optimizer = compiled_step(definition, objective, cfg.optimizer.to_json(), cfg.steps)
    state = state_shapes(whole, optimizer)
    replicated = sharding.replicated(mesh)
    frozen = {
        "key": everywhere(mesh, key_shape(), replicated),
        "target": placed(model.params, sharding.shardings(mesh, model.params)),
        "buffers": everywhere(mesh, buffers, replicated),
    }
    batch = batch_shapes(cfg.batch_size, length)
    return step.lower(
        placed(state, sharding.shardings(mesh, state, shards.rules_of(definition))),
        frozen,
        everywhere(mesh, batch, sharding.batch_sharding(mesh)),
    )


def lower_round(model: Model, definition, request: Request, slots: int, sampling, rule):
    """The real round over the mesh, lowered; key/value heads split as prefill leaves them."""
    mesh, replicated = model.mesh, sharding.replicated(model.mesh)
    params = {
        "target": placed(model.params, sharding.shardings(mesh, model.params)),
        "drafter": {},
    }
    if definition is not None:
        whole, buffers = shards.drafter_shapes(definition, model.params)
        drafter = placed(whole, sharding.shardings(mesh, whole, shards.rules_of(definition)))
        held = {"buffers": everywhere(mesh, buffers, replicated)} if buffers else {}
        params["drafter"] = drafter | held
    engine = engine_of(model.config, definition, sampling, rule)
    state = decode_state(engine, params, request, slots)
    G, G_here = model.config.num_kv_heads, model.here.num_kv_heads

    def place(leaf):
        heads = leaf.ndim - 3  # ...xGxSxK
        split = leaf.ndim >= 4 and leaf.shape[heads] == G != G_here and leaf.dtype != jnp.int32
        spec = [None] * leaf.ndim
        if split:
            spec[heads] = "tensor"
        partition = jax.sharding.PartitionSpec(*spec)
        return jax.sharding.NamedSharding(mesh, partition)

    return decoding.jit_round.lower(engine, params, placed(state, jax.tree.map(place, state)))


def compile_all(config, target, contenders, found: Estimate):
    """[(program, estimated bytes, compiled bytes)] of every training step and round."""
    mesh = sharding.make_mesh(config.mesh)
    model = Model(target, config.target.dtype, config.target.scan_layers, mesh)
    temperature = max(config.eval.temperatures)
    sampling = Sampling(temperature, config.eval.top_k, config.eval.top_p)
    sampling = sampling if temperature else GREEDY
    request = Request(config.eval.batch, found.prompt, config.eval.max_new_tokens)
    rows, by_name = [], {m.name: m for m in found.methods}
    for c in contenders:
        m = by_name[c.name]
        if m.training:
            compiled = total(lower_step(model, c.definition, c.train, config.data.length))
            rows.append((f"train {c.name}", found.target + m.training.bytes, compiled))
        rule = config.eval.rule
        compiled = total(lower_round(model, c.trees[0], request, found.slots, sampling, rule))
        weights = found.target + m.weights
        d = m.decoding
        rows.append((f"round {c.name}", weights + d.cache + d.state + d.round.peak, compiled))
    return rows
