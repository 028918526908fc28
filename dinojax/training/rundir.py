"""The directory of a run: on a disk, or a prefix of a bucket.

A bucket's objects cannot be appended to, and appear whole or not at all. So the files of a run
that is kept there are written below `~/.cache/dinojax` and uploaded whole: before every checkpoint,
hence a resumed run finds every row up to the step it goes on from, and every minute or so in
between. Checkpoints go to the bucket directly (orbax). Called by `train.py`.
"""

import os
import pathlib
import shutil
import time
import urllib.parse
from typing import Any

SCHEMES = ("gs",)  # what orbax writes checkpoints to, besides disks
_SELDOM = 60.0  # seconds between uploads that may wait
_PRIVATE = ("wandb",)  # folders that keep themselves


class RunDirectory:
    """Where a run's files are written (`local`) and what people call it (`where`).

    Args:
        where: a path, or a URL such as gs://bucket/runs/a.
        process: number of this process; 0 writes nearly everything, others their own lists.

    Raises:
      ValueError: a scheme that cannot be served.
    """

    def __init__(self, where: str | os.PathLike[str], process: int = 0) -> None:
        text = os.fspath(where)
        scheme, separator, _ = text.partition("://")
        self.remote = bool(separator)
        self.where, self._process = text.rstrip("/") if self.remote else text, process
        self.local = pathlib.Path(text)
        self._known: dict[str, tuple[int, int]] = {}  # what the bucket has: (time, size) here
        self._last = time.monotonic()
        if not self.remote:
            return
        if scheme not in SCHEMES:
            raise ValueError(
                f"--workdir {text}: a run is kept on a disk or in a bucket of gs://, not {scheme}://"
            )
        self._files = _open(scheme, text)
        cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        name = urllib.parse.quote(self.where, safe="")
        self.local = pathlib.Path(cache, "dinojax", "runs", name, str(process))

    @property
    def checkpoints(self) -> str:
        """Where orbax saves."""
        return f"{self.where}/checkpoints"

    def fetch(self) -> None:
        """Bring this process's files here as the bucket has them, in place of what was here."""
        if not self.remote:
            return
        shutil.rmtree(self.local, ignore_errors=True)
        self.local.mkdir(parents=True)
        own = ("config.json", f"unreadable.{self._process}.txt")
        try:
            self._files.invalidate_cache()
            there = self._files.ls(self.where, detail=True) if self._exists() else []
            for entry in there:
                name = entry["name"].rstrip("/").rpartition("/")[2]
                if entry["type"] == "file" and name and (self._process == 0 or name in own):
                    self._files.get_file(entry["name"], str(self.local / name))
                    self._known[name] = _stamp(self.local / name)
        except Exception as error:  # the libraries of the clouds raise every kind
            raise ValueError(f"--workdir {self.where} cannot be read: {_reason(error)}") from None

    def check_writable(self) -> None:
        """Write something and remove it; ValueError where that fails."""
        if self.local.exists() and not self.local.is_dir():
            raise ValueError(f"--workdir {self.where} is a file; give a directory")
        probe = f".writable.{self._process}"  # every process its own
        try:
            if self.remote:
                self._files.pipe_file(f"{self.where}/{probe}", b"")
                self._files.rm_file(f"{self.where}/{probe}")
            else:
                self.local.mkdir(parents=True, exist_ok=True)
                (self.local / probe).write_text("")
                (self.local / probe).unlink()
        except Exception as error:
            reason = _reason(error)
            raise ValueError(f"cannot write into --workdir {self.where}: {reason}") from None

    def upload(self, seldom: bool = False) -> None:
        """Bring the bucket up to date; `seldom`: only if that was a while ago.

        Raises:
          OSError: in one sentence.
        """
        if not self.remote or (seldom and time.monotonic() - self._last < _SELDOM):
            return
        for path in sorted(self.local.rglob("*")):
            name = path.relative_to(self.local).as_posix()
            hidden = path.name.startswith(".") or path.suffix == ".tmp"
            if not path.is_file() or hidden or name.split("/")[0] in _PRIVATE:
                continue
            stamp = _stamp(path)
            if self._known.get(name) == stamp:
                continue
            try:
                self._files.put_file(str(path), f"{self.where}/{name}")
            except Exception as error:
                target = f"{self.where}/{name}"
                raise OSError(f"{target} could not be written: {_reason(error)}") from error
            self._known[name] = stamp
        self._last = time.monotonic()

    def write_text(self, name: str, text: str) -> None:
        """A small file that all processes see."""
        if self.remote:
            self._files.pipe_file(f"{self.where}/{name}", text.encode())
        else:
            (self.local / name).write_text(text)

    def read_text(self, name: str) -> str | None:
        """What another process has written; None if it is not there."""
        try:
            if self.remote:
                self._files.invalidate_cache()
                return self._files.cat_file(f"{self.where}/{name}").decode()
            return (self.local / name).read_text()
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove such a file."""
        if self.remote:
            self._files.rm_file(f"{self.where}/{name}")
        else:
            (self.local / name).unlink()

    def _exists(self) -> bool:
        return self._files.exists(self.where)


def _open(scheme: str, text: str) -> Any:
    """The file system of a URL."""
    import fsspec  # imported late, as the library of the cloud behind it

    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        raise ValueError(
            f"--workdir {text} needs more packages: pip install 'dinojax[cloud]'"
        ) from None
    except Exception as error:
        raise ValueError(f"--workdir {text} cannot be opened: {_reason(error)}") from None


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0][:300]
