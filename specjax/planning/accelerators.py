"""Published limits of single chips; a roofline is drawn against them.

Sources: NVIDIA's H100 and H200 data sheets (SXM; dense figures, half of those given "with
sparsity"), Google's Cloud TPU pages of v4, v5e, v5p and v6e. Capacities are the sheets' decimal
gigabytes.

Matrix products of float32 weights run at precision "highest" (models/transformer.py): plain float32
on a GPU, six bfloat16 passes on a TPU. Link bandwidth is one way, out of one chip, all links
together: half of what the pages call bidirectional.
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
    float32: float
    links: float
    source: str

    def peak(self, dtype: str) -> float:
        """Operations per second of matrix products over `dtype`."""
        return self.bfloat16 if dtype in ("bfloat16", "float16") else self.float32


def _tpu(name, memory, bandwidth, tflops, links, page) -> Accelerator:
    return Accelerator(
        name, memory * GB, bandwidth * GB, tflops * TERA, tflops * TERA / 6, links * GB / 2,
        f"docs.cloud.google.com/tpu/docs/{page}",
    )  # fmt: skip


_ALL = (
    Accelerator(
        "h100", 80 * GB, 3350 * GB, 989 * TERA, 67 * TERA, 450 * GB, "nvidia.com/data-center/h100"
    ),
    Accelerator(
        "h200", 141 * GB, 4800 * GB, 989 * TERA, 67 * TERA, 450 * GB, "nvidia.com/data-center/h200"
    ),
    _tpu("v4", 32, 1200, 275, 600, "v4"),
    _tpu("v5e", 16, 819, 197, 400, "v5e"),
    _tpu("v5p", 95, 2765, 459, 1200, "v5p"),
    _tpu("v6e", 32, 1638, 918, 800, "v6e"),
)
ACCELERATORS: dict[str, Accelerator] = {chip.name: chip for chip in _ALL}


def get_accelerator(name: str) -> Accelerator:
    """The chip of this name. Raises ValueError for one that is not in the table."""
    if name not in ACCELERATORS:
        raise ValueError(f"accelerator: {name!r} is unknown; one of {tuple(ACCELERATORS)}")
    return ACCELERATORS[name]
