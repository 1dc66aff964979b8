"""The folder of an evaluation: a line for every sample, however many processes and calls made them."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console.files import write_json, write_text
from ..sampling.saving import OFF

SAMPLES, RUN, SUMMARY, TABLE = "samples.jsonl", "run.json", "summary.json", "table.md"
# the values of settings that a folder does not name
DEFAULTS: dict[str, Any] = {**OFF, "refresh": 1}
MEASURE = "measure"  # the setting that says what the lines are (None: answers); it never changes within a folder

Record = dict[str, Any]


class OtherRun(ValueError):
    """The folder holds results of other settings."""


@dataclass(frozen=True)
class Folder:
    """The folder of one evaluation, which several processes may write to.

    Each process appends its finished samples to a file of its own. In the end these become one file in the order of the
    plan, so the result does not depend on their number.

    Args:
        identify: a line's key. For a line that is not ours it gives None, or raises what a missing value raises.
        process: this process's number; None if it writes nothing.
    """

    path: Path
    identify: Callable[[Record], tuple | None]
    process: int | None = 0

    def claim(self, settings: Record, call: Record) -> None:
        """Make the folder this run's, or continue the run that it holds.

        Args:
            settings: what decides the results.
            call: about this call: command, date, environment.

        Raises:
            OtherRun: it holds results of other settings, or files that are not an evaluation's.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / RUN
        if not file.is_file() and any(self.path.iterdir()):
            raise OtherRun(f"{self.path} is not empty and holds no evaluation: choose another folder")
        known: Record = about(file) if file.is_file() else {"settings": settings, "calls": []}
        before = known["settings"]
        meant, meant_before = DEFAULTS | settings, DEFAULTS | before
        changed = [name for name in meant | meant_before if meant.get(name) != meant_before.get(name)]
        if changed and (self.finished() or MEASURE in changed):
            difference = f"{changed[0]} {_said(meant_before.get(changed[0]))}, now {_said(meant.get(changed[0]))}"
            raise OtherRun(f"{self.path} holds results of another configuration ({difference}): choose another folder")
        if self.process == 0:
            calls = [] if changed else known["calls"]
            write_json(file, {"settings": settings, "calls": [*calls, call]})

    def finished(self) -> dict[tuple, Record]:
        """The finished samples, by key; lines that a crash cut off, or that are not ours, do not count."""
        found = {}
        for file in (self.path / SAMPLES, *self._parts()):
            for line in file.read_bytes().split(b"\n")[:-1] if file.is_file() else ():
                try:
                    record = json.loads(line)
                    if (name := self.identify(record)) is not None:
                        found[name] = record
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    continue
        return found

    def append(self, records: Iterable[Record]) -> None:
        """Add finished samples to this process's own file."""
        if self.process is not None:
            with open(self._part(self.process), "ab") as file:
                file.write(_lines(records).encode())

    def mend(self) -> None:
        """End a line that a crash has cut off, so that the next sample starts a new line."""
        if self.process is None:
            return
        file = self._part(self.process)
        if file.is_file() and (text := file.read_bytes()) and not text.endswith(b"\n"):
            with open(file, "ab") as end:
                end.write(b"\n")

    def close(self, records: list[Record]) -> None:
        """Put all samples into one file, in the order given, and remove the processes' own."""
        write_text(self.path / SAMPLES, _lines(records))
        for file in self._parts():
            file.unlink()

    def _part(self, process: int) -> Path:
        return self.path / f"{SAMPLES}.{process}"

    def _parts(self) -> list[Path]:
        """The processes' own files, however many there were."""
        return sorted(file for file in self.path.glob(f"{SAMPLES}.*") if file.suffix[1:].isdigit())


def _said(value: Any) -> str:
    """A setting's value in a message."""
    return "not given" if value is None else repr(value)


def about(file: Path) -> Record:
    """The settings in run.json, and the calls that made the results.

    Raises:
        OtherRun: it is not an evaluation's.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"settings": dict(found["settings"]), "calls": list(found["calls"])}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise OtherRun(f"{file} is not an evaluation's: choose another folder") from None


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
