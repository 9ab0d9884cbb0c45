"""metrics.jsonl: one JSON object a line, appended as the run goes."""

import json
import pathlib
import time

from specjax.files import write_text
from specjax.processes import is_first


class MetricsLog:
    """Appends rows; a resumed stage first drops the rows that it will write again."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)

    def rows(self) -> list[dict]:
        """All whole rows; a last line that a killed run left unfinished is ignored."""
        rows = []
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
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
        """Forgets rows of `stage` past `step` (and unfinished lines)."""
        keep = [r for r in self.rows() if r.get("stage") != stage or r.get("step", 0) <= step]
        if is_first() and self.path.is_file():
            write_text(self.path, "".join(json.dumps(r) + "\n" for r in keep))

    def write(self, stage: str, step: int, **values):
        """One row; values are plain numbers, strings or lists of them."""
        if not is_first():
            return
        row = {"step": step, "stage": stage, "time": round(time.time(), 3)} | values
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
