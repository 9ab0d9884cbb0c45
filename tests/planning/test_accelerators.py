"""Devices by the names that jax gives them."""

import types

import jax
import jax.numpy as jnp
import pytest

from specjax.planning.accelerators import ACCELERATORS, of_device, peak_of


def devices(*kinds):
    return [types.SimpleNamespace(device_kind=kind) for kind in kinds]


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"),
    ],
)  # fmt: skip
def test_a_device_is_its_chip(kind, name):
    assert of_device(kind) is ACCELERATORS[name]


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v4 lite", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", ""]
)
def test_what_is_not_in_the_table_is_not_taken_for_a_neighbour(kind):
    assert of_device(kind) is None
    assert peak_of(devices("TPU v4", kind), jnp.bfloat16) == 0.0


def test_the_peak_is_of_all_devices_at_the_dtype():
    four = devices(*["TPU v5p"] * 4)
    assert peak_of(four, jnp.bfloat16) == 4 * ACCELERATORS["v5p"].bfloat16
    assert peak_of(four, jnp.dtype("float32")) == 4 * ACCELERATORS["v5p"].float32
    assert peak_of(jax.devices("cpu"), jnp.float32) == 0.0
