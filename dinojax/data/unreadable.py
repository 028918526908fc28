"""The list of images that could not be read: `unreadable.txt` of a run. Written by `train.py`."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from dinojax.data.pipeline import Failure


class UnreadableList:
    """A file of lines `name TAB reason`: every image once, also when a run goes on with the file.

    Lines are on disk when `add` returns, each whole: a killed process leaves none cut.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[str] = set()
        with contextlib.suppress(FileNotFoundError):
            text = path.read_bytes()
            lines = text[: text.rfind(b"\n") + 1]
            if len(lines) < len(text):  # a full disk cut the last one
                os.truncate(path, len(lines))
            self._known = {os.fsdecode(line.split(b"\t")[0]) for line in lines.splitlines()}

    def add(self, failures: Iterable[Failure]) -> int:
        """Appends those whose names are new and returns their number."""
        new = {}
        for failure in failures:
            name = _plain(failure.name)
            if name not in self._known:
                new.setdefault(name, f"{name}\t{_plain(failure.reason)}\n")
        if new:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(file, os.fsencode("".join(new.values())))  # one call: all or nothing
            finally:
                os.close(file)
            self._known |= new.keys()
        return len(new)


def _plain(text: str) -> str:
    """Without what would end a line or a field."""
    return " ".join(text.split()) if any(mark in text for mark in "\t\n\r") else text
