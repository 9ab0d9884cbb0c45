"""The same programs compiled for the devices there are, and what XLA says they take.

Only shapes go in, so nothing is allocated, but compiling a large model takes what compiling takes.
What a CPU's analysis cannot tell of an accelerator: docs/planning.md.
"""

import jax

from specjax import decoding, sharding
from specjax.planning import shards
from specjax.planning.estimate import Estimate, model_of
from specjax.planning.programs import (
    Model,
    Request,
    batch_shapes,
    decode_state,
    engine_of,
    key_shape,
    state_shapes,
)
from specjax.sampling import Sampling
from specjax.training.drafter import layout, needs_reference, step_of

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


def everywhere(tree, place):
    """Shapes that all have one sharding."""
    return placed(tree, jax.tree.map(lambda _: place, tree))


def lower_step(model: Model, definition, cfg, length: int, rules: sharding.Rules):
    """The real training step over the mesh, lowered."""
    mesh = model.mesh
    whole, buffers = shards.drafter_shapes(definition, model.params)
    step, optimizer = step_of(definition, cfg, mesh)
    state = state_shapes(whole, optimizer)
    frozen = {"key": key_shape(), "target": model.params, "buffers": buffers}
    if needs_reference(cfg):
        frozen["reference"] = whole
    batch = batch_shapes(cfg.batch_size, length)
    return step.lower(
        *placed((state, frozen), layout(mesh, state, frozen, rules, model.rules)),
        everywhere(batch, sharding.batch_sharding(mesh)),
    )


def lower_round(model: Model, definition, request: Request, slots: int, sampling, rule, rules):
    """The real round over the mesh, lowered."""
    mesh = model.mesh
    whole, buffers = shards.drafter_shapes(definition, model.params)
    drafter = placed(whole, sharding.shardings(mesh, whole, rules))
    if buffers:
        drafter["buffers"] = everywhere(buffers, sharding.replicated(mesh))
    split = any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(drafter))
    layout = sharding.DecodeLayout(mesh, split) if mesh.size > 1 else None
    target = placed(model.params, sharding.shardings(mesh, model.params, model.rules))
    params = {"target": target, "drafter": drafter}
    engine = engine_of(model.config, definition, sampling, rule, layout)
    state = decode_state(engine, params, request, slots)
    if layout is not None:
        state = placed(state, layout.shardings(state))
    return decoding.jit_round.lower(engine, params, state)


def compile_all(config, target, contenders, found: Estimate):
    """[(program, estimated bytes, compiled bytes)] of every training step and round."""
    mesh = sharding.make_mesh(config.mesh)
    model = model_of(config, target, mesh)
    temperature = max(config.eval.temperatures)
    sampling = Sampling(temperature, config.eval.top_k, config.eval.top_p)
    request = Request(config.eval.batch, found.prompt, config.eval.max_new_tokens)
    rows, by_name = [], {m.name: m for m in found.methods}
    for c in contenders:
        m = by_name[c.name]
        if m.training:
            lowered = lower_step(model, c.definition, c.train, config.data.length, c.rules)
            compiled = total(lowered)
            rows.append((f"train {c.name}", found.target + m.training.bytes, compiled))
        rule = config.eval.rule
        lowered = lower_round(model, c.trees[0], request, found.slots, sampling, rule, c.rules)
        compiled = total(lowered)
        weights = found.target + m.weights
        d = m.decoding
        rows.append((f"round {c.name}", weights + d.cache + d.state + d.round.peak, compiled))
    return rows
