"""Host memory that a piece of code takes at its peak."""

import pathlib
import threading
import time

STATUS = pathlib.Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Bytes of this process that no file backs.

    Pages of a mapped checkpoint are left out: the kernel drops them whenever it likes.

    Raises:
      OSError: an operating system without /proc.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS}: no RssAnon")


class PeakMemory:
    """Within its `with` block, watches `anonymous_bytes` from a thread.

    Attributes:
      growth: bytes of the highest sample above the one at the start.
    """

    def __init__(self, interval: float = 0.002):
        self.interval, self.growth = interval, 0

    def __enter__(self):
        self._start, self._done = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.is_set():
            self._sample()
            time.sleep(self.interval)

    def _sample(self):
        self.growth = max(self.growth, anonymous_bytes() - self._start)

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self._sample()
