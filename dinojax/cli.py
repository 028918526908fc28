"""The `dinojax` command: `dinojax VERB ...`, where a verb is a file in `verbs/`.

A verb imports what it needs when it runs, so help is there at once. It returns an exit code, and
raises ValueError, one sentence, for what cannot work:

    0 done; 1 ended early (a full disk); 2 cannot work, nothing was done; 75 stopped by SIGTERM or
    Ctrl-C after a save, the same command goes on; 130 interrupted.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dinojax.verbs.common import SOURCES

VERBS = ("data", "features")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files may be of any bytes
    arguments = parser().parse_args(argv)
    try:
        return arguments.verb(arguments)
    except ValueError as error:
        return refuse(str(error))
    except BrokenPipeError:  # `dinojax data ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """What is wrong with the arguments, in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        sys.exit(refuse(f"{message}; {self.prog} --help explains"))


def refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """Of all verbs."""
    top = Parser(
        prog="dinojax",
        description="Tools around a run. Training itself: python launch/run.py --help",
        epilog=SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        importlib.import_module(f"dinojax.verbs.{verb}").add_parser(verbs)
    return top
