"""Counted operations against those worked out by hand, and what must not change them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_target

from configs import common
from specjax.drafters.base import split_buffers
from specjax.models.transformer import stack_layers
from specjax.trained import init_drafter
from specjax.training.model_flops import model_flops, products_of
from specjax.training.objective import make_objective

B, T = 2, 16
OBJECTIVE = make_objective(common.loss(), 10)


def count(target, drafter, objective=OBJECTIVE):
    params, buffers = split_buffers(drafter.params)
    frozen = {"target": target.params, "buffers": buffers, "key": jax.random.key(0)}
    batch = {"tokens": jnp.zeros((B, T), jnp.int32), "supervised": jnp.ones((B, T), bool)}
    return model_flops(drafter.definition, objective, params, frozen, batch)


def size(tree):
    return sum(w.size for w in jax.tree.leaves(tree) if w.ndim > 1)


@pytest.fixture(scope="module")
def pair():
    target = random_target()
    return target, init_drafter("fasteagle", target, num_layers=2)


def test_a_step_is_what_its_matrices_say(pair):
    target, drafter = pair
    c, N = target.config, 2
    rows, attention = B * T, 4 * B * c.num_heads * c.head_dim * T * T  # scores and values, a layer
    forward = 2 * rows * size(target.params["layers"]) + c.num_layers * attention
    teacher = 2 * B * (T + N) * c.vocab_size * c.hidden_size  # its rows run N past the student's
    kernels = size(drafter.params) - size(drafter.params.get("head", ()))
    draft = 3 * (2 * rows * kernels + N * attention)  # norms stand before every kernel, so 2 back
    student = N * 2 * (2 * rows * c.vocab_size * c.hidden_size)  # the head itself is frozen
    few = 8 * N  # depths are weighed by a product
    assert 0 <= count(target, drafter) - (forward + teacher + draft + student) <= few


def test_chunks_recomputing_and_scanning_change_nothing(pair):
    target, drafter = pair
    plain = count(target, drafter)
    for changes in (dict(chunk=4), dict(remat=True), dict(chunk=8, remat=True)):
        assert count(target, drafter, dataclasses.replace(OBJECTIVE, **changes)) == plain
    scanned = dataclasses.replace(target, params=stack_layers(target.params))
    assert count(scanned, drafter) == plain


def test_a_loop_counts_every_turn():
    w = np.zeros((8, 8), np.float32)
    loop = lambda x: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]  # noqa: E731
    assert sum(products_of(loop, w).values()) == 5 * 2 * 8**3
