"""The least time that a program can take on a chip: its operations or its bytes, whichever is more.

No program reaches it. Traffic counts an array once for every time it is written or read by an
operation that exists (planning/program.py), so caches make it too high and small transfers too low.
"""

import dataclasses

from specjax.planning.accelerators import Accelerator
from specjax.planning.program import Needs


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds, and what bounds them."""

    compute: float
    memory: float
    links: float = 0.0

    @property
    def seconds(self) -> float:
        """Computing overlaps with memory; links are counted on top, as if nothing hid them."""
        return max(self.compute, self.memory) + self.links

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(parts, key=lambda name: parts[name])


def roofline(chip: Accelerator, *programs: Needs, link_bytes: float = 0.0) -> Time:
    """The least time for the programs one after another, and for what they send."""
    compute = sum(n / chip.peak(dtype) for p in programs for dtype, n in p.flops.items())
    memory = sum(p.traffic for p in programs) / chip.bandwidth
    return Time(compute, memory, link_bytes / chip.links)


def all_reduce(size: float, ways: int) -> float:
    """Bytes that each of `ways` devices sends to sum arrays of `size` bytes on a ring."""
    return 2.0 * size * (ways - 1) / ways
