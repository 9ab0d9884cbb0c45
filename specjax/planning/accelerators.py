"""Published limits of single chips; a roofline is drawn against them.

Sources: NVIDIA's H100 and H200 data sheets (SXM; dense figures, half of those given "with
sparsity"), Google's Cloud TPU pages of v4, v5e, v5p and v6e. Capacities are the sheets' decimal
gigabytes.

Matrix products of float32 weights run at precision "highest" (models/transformer.py): plain float32
on a GPU, six bfloat16 passes on a TPU. Link bandwidth is one way, out of one chip, all links
together: half of what the pages call bidirectional, which is also a pod's all-reduce bandwidth by
its chips (the v4's page gives only that).
"""

import dataclasses

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
