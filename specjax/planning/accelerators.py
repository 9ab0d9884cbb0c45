"""Published limits of single chips; a roofline is drawn against them.

Sources: NVIDIA's H100 and H200 data sheets (SXM; dense figures, half of those given "with
sparsity"), Google's Cloud TPU pages of v4, v5e, v5p and v6e. Capacities are the sheets' decimal
gigabytes.

Matrix products of float32 weights run at precision "highest" (models/transformer.py): plain float32
on a GPU, six bfloat16 passes on a TPU. Link bandwidth is one way, out of one chip, all links
together: half of what the pages call bidirectional, which is also a pod's all-reduce bandwidth by
its chips (the v4's page gives only that). Names of devices are those that jax gives them (TPUs:
jax's own pallas/mosaic/tpu_info.py; a v4's or v5p's two cores are one device).
"""

import dataclasses

import numpy as np

GB, TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One chip: bytes, bytes per second, operations per second."""

    name: str
    memory: float
    bandwidth: float
    bfloat16: float
    rounded: float  # float32 whose inputs are rounded: TF32 on a GPU, one bfloat16 pass on a TPU
    float32: float
    links: float
    source: str

    def peak(self, precision: str) -> float:
        """Operations per second of matrix products at a precision of planning/program.py."""
        return {"bfloat16": self.bfloat16, "rounded": self.rounded, "float32": self.float32}[
            precision
        ]


def _tpu(name, memory, bandwidth, tflops, links) -> Accelerator:
    peak, page = tflops * TERA, f"docs.cloud.google.com/tpu/docs/{name}"
    sizes = memory * GB, bandwidth * GB
    return Accelerator(name, *sizes, peak, peak, peak / 6, links * GB / 2, page)


_ALL = (
    Accelerator(
        "h100",
        80 * GB,
        3350 * GB,
        989 * TERA,
        494 * TERA,
        67 * TERA,
        450 * GB,
        "nvidia.com/data-center/h100",
    ),
    Accelerator(
        "h200",
        141 * GB,
        4800 * GB,
        989 * TERA,
        494 * TERA,
        67 * TERA,
        450 * GB,
        "nvidia.com/data-center/h200",
    ),
    _tpu("v4", 32 * 1.073741824, 1200, 275, 2 * 1.1e6 / 4096),
    _tpu("v5e", 16, 819, 197, 400),
    _tpu("v5p", 95, 2765, 459, 1200),
    _tpu("v6e", 32, 1638, 918, 800),
)
ACCELERATORS: dict[str, Accelerator] = {chip.name: chip for chip in _ALL}


def get_accelerator(name: str) -> Accelerator:
    """The chip of this name. Raises ValueError for one that is not in the table."""
    if name not in ACCELERATORS:
        raise ValueError(f"accelerator: {name!r} is unknown; one of {tuple(ACCELERATORS)}")
    return ACCELERATORS[name]


_KINDS = {
    "NVIDIA H100 80GB HBM3": "h100",  # SXM; the PCIe and NVL boards are slower and named otherwise
    "NVIDIA H200": "h200",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def of_device(kind: str) -> Accelerator | None:
    """The chip that `jax.Device.device_kind` names; None for CPUs and what is not in the table."""
    name = _KINDS.get(kind)
    return None if name is None else ACCELERATORS[name]


def peak_of(devices, dtype) -> float:
    """Operations per second of all `devices` together on products of `dtype`; 0 where unknown."""
    chips = [of_device(device.device_kind) for device in devices]
    if None in chips:
        return 0.0
    precision = "float32" if dtype == np.float32 else "bfloat16"
    return sum(chip.peak(precision) for chip in chips)
