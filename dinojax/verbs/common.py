"""What verbs share: arguments, stopping, progress, writing. Imports little: help is quick."""

import argparse
import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

TRY_AGAIN = 75  # exit code after a save on SIGTERM (EX_TEMPFAIL)
LINE_SECONDS = 30  # between lines of progress where there is no terminal
SOURCES = """\
SPEC says where images are:
  folder:PATH                 image files at any depth; sub-folders are classes
  list:FILE                   a path or URL a line (then a tab and a label), or a parquet file
  parquet:GLOB                encoded images in a column      ?image=image&label=label&split=train
  tar:'GLOB'                  webdataset shards               ?image=jpg&label=json.class
  array_record:'GLOB'         records, as --shard writes them
  tfds:NAME[:SPLIT]           a prepared TensorFlow data set, read without TensorFlow
  curated:MANIFEST            rows that data curation chose (samples.parquet)
  scenes[:COUNT]              rendered, needs no data         ?size=64&split=val&seed=1
Paths may be URLs (gs://, s3://, https://). Of multi-band images, ?bands=3,2,1 chooses and orders
the bands and ?range=0:4095 says which stored values become black and white."""


def whole(text: str) -> int:
    """An argument that is 0, 1, 2, ..."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def positive(text: str) -> int:
    """An argument that is 1, 2, ..."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


class Stopped(Exception):  # noqa: N818  (nobody's error)
    """Ends work that asks nobody whether to go on."""


class Stop:
    """SIGTERM and Ctrl-C as a request that long work looks at; a second Ctrl-C interrupts it."""

    def __enter__(self) -> "Stop":
        self.requested = False
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self.request) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.requested

    def request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def progress(what: str, total: int, before: int = 0) -> Iterator[Callable[[int], None]]:
    """A function to call with how many are done: a bar on a terminal, elsewhere a line at times."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(what, total, before)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}, left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=before)
        yield lambda done: bar.update(task, completed=done)


class Lines:
    """Progress where there is no terminal: a line on stderr every LINE_SECONDS."""

    def __init__(self, what: str, total: int, before: int) -> None:
        self.what, self.total, self.before = what, total, before
        self.began = self.told = time.monotonic()
        tell(f"{total - before:,} {what} to go")

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self.told < LINE_SECONDS:
            return
        self.told = now
        rate = (done - self.before) / (now - self.began)
        left = (self.total - done) / max(rate, 1e-9)
        tell(f"{done:,} of {self.total:,} {self.what}, {rate:,.0f}/s, {left / 60:.0f} minutes left")


def tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def threads(spec: str) -> int:
    """For reading: one a core; more where the time goes into waiting for a network."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(32, cores or 1) if "://" in spec else cores or 1


def folder(path: Path) -> Path:
    """Make a directory to write into; ValueError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"cannot write into {str(path)!r}: {error.strerror}.") from None
    return path


def write(path: Path, text: str) -> None:
    """A text file; a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
