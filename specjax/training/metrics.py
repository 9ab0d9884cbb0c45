"""metrics.jsonl: one JSON object a line, appended as the run goes; TensorBoard on request."""

import atexit
import json
import math
import pathlib
import time

from specjax.files import write_text
from specjax.processes import is_first
from specjax.progress import say


def finite(value):
    """`value` with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line(row: dict) -> str:
    """One line of the file."""
    return json.dumps(finite(row), allow_nan=False) + "\n"


class MetricsLog:
    """Appends rows; a resumed stage first drops the rows that it will write again."""

    def __init__(self, path: str | pathlib.Path, tensorboard: bool = False):
        """Rows go to `path` and, with `tensorboard`, to the folder of that name beside it.

        Raises:
          ModuleNotFoundError: tensorboardX is wanted and not installed (on any process).
        """
        self.path = pathlib.Path(path)
        self.mirror = Mirror(self.path.parent / "tensorboard") if tensorboard else None

    def rows(self) -> list[dict]:
        """All rows; a last line that a killed run left unfinished is ignored.

        Raises:
          ValueError: any other line that is not JSON (names file and line).
        """
        rows = []
        text = self.path.read_text() if self.path.is_file() else ""
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if line.endswith("\n"):
                    raise ValueError(f"{self.path}:{number}: not JSON: {error}") from error
        return rows

    def seconds(self, stage: str, tokens_per_step: int) -> float:
        """What the steps of a stage took, those before it was resumed included, by their rates."""
        total, before = 0.0, 0
        for row in self.rows():
            if row.get("stage") == stage and row.get("tokens_per_s"):
                total += (row["step"] - before) * tokens_per_step / row["tokens_per_s"]
                before = row["step"]
        return total

    def rewind(self, stage: str, step: int):
        """Forgets rows of `stage` past `step` (and an unfinished line). Raises as `rows`."""
        keep = [r for r in self.rows() if r.get("stage") != stage or r.get("step", 0) <= step]
        if is_first() and self.path.is_file():
            write_text(self.path, "".join(map(line, keep)))
        if is_first() and self.mirror is not None:
            self.mirror.restart(stage, [r for r in keep if r.get("stage") == stage])

    def write(self, stage: str, step: int, **values):
        """One row; values are plain numbers, strings, None or lists of them.

        A number that is not finite is written as null, and said.
        """
        if not is_first():
            return
        row = finite({"step": step, "stage": stage, "time": round(time.time(), 3)} | values)
        if lost := [k for k, v in values.items() if json.dumps(v) != json.dumps(row[k])]:
            say(f"{stage}: step {step}: not finite, written as null: {', '.join(lost)}")
        with self.path.open("a") as file:
            file.write(line(row))
        if self.mirror is not None:
            self.mirror.write(row)


class Mirror:
    """The numbers of the rows as TensorBoard reads them: a run a stage, so that stages overlay."""

    def __init__(self, folder: pathlib.Path):
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "tensorboard: config.tensorboard needs tensorboardX: pip install "
                "'specjax[tensorboard]'"
            ) from error
        self._make, self.folder, self._writers = SummaryWriter, folder, {}
        atexit.register(self.close)

    def restart(self, stage: str, rows: list[dict]) -> None:
        """Hides all that was written of a stage and shows `rows` instead."""
        if stage in self._writers:
            self._writers.pop(stage).close()
        self._open(stage, purge_step=0)
        for row in rows:
            self.write(row)

    def write(self, row: dict) -> None:
        """The numbers of one row; on disk about a second later."""
        stage = row["stage"]
        if stage not in self._writers:
            self._open(stage)
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                self._writers[stage].add_scalar(name, value, row["step"], row["time"])

    def close(self) -> None:
        """Everything on disk."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _open(self, stage: str, purge_step: int | None = None) -> None:
        # File names hold whole seconds: without the suffix two of one second would be one file.
        self._writers[stage] = self._make(
            str(self.folder / stage), purge_step=purge_step, flush_secs=1,
            filename_suffix=f".{time.time_ns()}",
        )  # fmt: skip
