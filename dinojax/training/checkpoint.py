"""Checkpoints of a run: one orbax item per sub-state, written in the background, sealed and
verified.

`train.py` saves and restores through `Checkpoints`; `dinojax.load` and the command line read with
`read_only=True`. On disk:

    DIRECTORY/<step>/<item>/...      student, teacher, optimizer, gram, step, ... (empty ones left
    out) DIRECTORY/<step>/manifest/       JSON: step, versions, and what the caller adds
    DIRECTORY/<step>/seal.json       size and fingerprint of every file above
    DIRECTORY/broken-<step>/         a damaged checkpoint that was set aside

The seal is written before the directory gets its final name, so a killed process leaves either a
sealed checkpoint or a temporary directory that nobody reads and the next save clears. A shortened
or missing file shows against the seal; a checkpoint whose seal was lost has to prove itself by
being read.
"""

import contextlib
import json
import logging
import os
import platform
import sys
import zlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

State = dict[str, Any]

_NONE, _FAILED = -1, -2  # what process 0 tells the others instead of a step
_SEAL, _MANIFEST, _BROKEN = "seal.json", "manifest", "broken-"
# orbax writes these two after the seal; nothing here reads them.
_UNSEALED = (_SEAL, "_CHECKPOINT_METADATA", "commit_success.txt")
# A fingerprint covers the ends of a file: enough for what crashes do (cuts, tails never written),
# and the same few milliseconds for a file of any size.
_ENDS = 1 << 20
_PACKAGES = ("dinojax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
_log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint that could not be written or read, in one sentence."""


class Checkpoints:
    """The checkpoints below one directory, numbered by step.

    Args:
        keep_newest: how many of the newest survive.
        keep_every: checkpoints whose step is a multiple of it survive too; 0: none.
        read_only: touches nothing, so that a run in flight can be read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep_newest: int = 2,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        self.directory = epath.Path(directory)
        if "://" not in os.fspath(directory):  # absolute() would make gs:// a local directory
            self.directory = self.directory.expanduser().absolute()
        self.read_only = read_only
        self._keep = {"max_to_keep": keep_newest, "keep_period": keep_every or None}
        self._manager: ocp.CheckpointManager | None = None  # made by the first save
        self._writing: int | None = None  # step being written in the background
        # orbax reports each phase of each save, and errors with their stacks; ours are sentences.
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def save(self, step: int, state: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
        """Starts writing; returns once the arrays may be donated. Waits for an earlier save.

        A step that is there already is left as it is.
        """
        self.wait()
        if (self.directory / str(step)).exists():
            return
        items = {name: ocp.args.PyTreeSave(_as_dict(name, part)) for name, part in state.items()}
        items = {name: item for name, item in items.items() if item.item}
        described = {"step": step, "versions": versions(), **manifest}
        args = ocp.args.Composite(**items, **{_MANIFEST: ocp.args.JsonSave(described)})
        self._writing = step
        try:
            self._open().save(step, args=args, force=True)
        except Exception as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Returns when the save in flight is on disk; raises CheckpointError if it failed."""
        if self._manager is None or self._writing is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error
        self._writing = None

    def check(self) -> None:
        """Raises as `wait` does if the save in flight has failed by now; does not wait for it."""
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Waits, then ends the background threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                try:
                    manager.close()
                except Exception:  # the failure that `wait` has put in words
                    _log.debug("closing after a failed save", exc_info=True)

    def steps(self) -> list[int]:
        """Steps that have a directory, whole or not, oldest first."""
        if not self.directory.exists():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit())

    def latest(self) -> int | None:
        """The newest whole checkpoint; None where there is none at all.

        Damaged newer ones are set aside (as `broken-<step>`, unless `read_only`) and reported in a
        sentence; raises CheckpointError if every checkpoint is damaged.
        """
        if jax.process_count() == 1:
            return self._latest()
        found, failure = _FAILED, None  # one process looks, so that all agree
        if jax.process_index() == 0:
            try:
                step = self._latest()
                found = _NONE if step is None else step
            except CheckpointError as error:
                failure = error
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if found == _FAILED:
            raise failure or CheckpointError(f"no usable checkpoint in {self.directory}")
        return None if found == _NONE else found

    def _latest(self) -> int | None:
        faults: dict[int, str] = {}
        steps = self.steps()
        for step in reversed(steps):
            fault = self.fault(step)
            if fault is None:
                break
            faults[step] = fault
        if not faults:
            return steps[-1] if steps else None
        described = "; ".join(f"step {s} is damaged ({fault})" for s, fault in faults.items())
        if len(faults) == len(steps):
            raise CheckpointError(
                f"no usable checkpoint in {self.directory}: {described}; remove the directory to "
                "start from scratch"
            )
        _log.warning("checkpoint of %s; using the one before it, step %d.", described, step)
        if not self.read_only:
            for broken in faults:
                self._set_aside(broken)
        return step

    def fault(self, step: int) -> str | None:
        """What is wrong with a checkpoint, in a few words; None if it is whole."""
        path = self.directory / str(step)
        try:
            sealed = json.loads((path / _SEAL).read_text())
            files = {name: tuple(entry) for name, entry in sealed["files"].items()}
        except FileNotFoundError:
            return self._fault_by_reading(step)
        except (ValueError, KeyError, AttributeError, TypeError, OSError):
            return f"{_SEAL} is unreadable"
        for name, (size, fingerprint) in files.items():
            try:
                found = _fingerprint(path / name)
            except OSError:
                return f"{name} is missing"
            if found[0] != size:
                return f"{name} has {found[0]} of {size} bytes"
            if found[1] != fingerprint:
                return f"{name} has other content than was written"
        return None

    def restore(self, step: int, abstract: Mapping[str, Any]) -> tuple[State, dict[str, Any]]:
        """State and manifest of a step, in the shapes and shardings of `abstract`.

        The mesh may be another than at the save. Items that `abstract` has empty are not read.
        """
        state = {name: self.restore_item(step, name, part) for name, part in abstract.items()}
        return state, self.manifest(step)

    def restore_item(self, step: int, item: str, abstract: Any = None) -> Any:
        """One item ("teacher") or a part of one ("teacher/backbone").

        `abstract`: ShapeDtypeStructs with shardings; without it, shapes come from the checkpoint
        and everything goes to this process's first device.
        """
        if isinstance(abstract, Mapping) and not abstract:
            return {}
        name, *keys = item.split("/")
        saved = _descend(self._saved(step, name), keys, item, step)
        if abstract is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), saved
            )
        else:
            wanted = _as_dict(name, abstract) if not keys else abstract
            _check_fit(item, step, saved, wanted)
        tree = wanted
        for key in reversed(keys):
            tree = {key: tree}
        tree = self._read(step, name, tree, partial=bool(keys))
        for key in keys:
            tree = tree[key]
        bare = not keys and set(tree) == {name} and not isinstance(abstract, Mapping)
        return tree[name] if bare else tree

    def manifest(self, step: int) -> dict[str, Any]:
        """The JSON saved beside the state: step, versions, and the caller's entries."""
        path = self.directory / str(step) / _MANIFEST
        try:
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                return reader.restore(path, args=ocp.args.JsonRestore())
        except Exception as error:
            raise self._not_read(step, _MANIFEST, error) from error

    def _saved(self, step: int, name: str) -> Any:
        """Shapes and dtypes of an item from its own metadata."""
        path = self.directory / str(step) / name
        if not path.exists():
            known = sorted(p.name for p in path.parent.glob("*") if p.is_dir())
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} has no {name!r}; it has {known}"
            )
        try:
            with ocp.PyTreeCheckpointer() as reader:
                return dict(reader.metadata(path).item_metadata.tree)
        except Exception as error:
            raise self._not_read(step, name, error) from error

    def _read(self, step: int, name: str, abstract: Any, partial: bool) -> Any:
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        try:
            with ocp.PyTreeCheckpointer() as reader:
                return reader.restore(self.directory / str(step) / name, args=args)
        except Exception as error:
            raise self._not_read(step, name, error) from error

    def _fault_by_reading(self, step: int) -> str | None:
        """A checkpoint without a seal is whole if everything in it can be read."""
        items = [p.name for p in (self.directory / str(step)).iterdir() if p.is_dir()]
        if _MANIFEST not in items or len(items) < 2:
            return "items are missing"
        try:
            self.manifest(step)
            for name in items:
                if name != _MANIFEST:
                    self.restore_item(step, name)
        except CheckpointError as error:
            return f"its seal is missing and {error}"
        return None

    def _open(self) -> ocp.CheckpointManager:
        if self.read_only:
            raise CheckpointError(f"{self.directory} was opened for reading only")
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                **self._keep,
                create=True,
                cleanup_tmp_directories=True,  # what a killed process left
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._seal,
                    barrier_sync_fn=_meet if jax.process_count() > 1 else None,
                ),
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _seal(self) -> None:
        """Called by orbax when all files are written and the directory is about to be renamed."""
        if jax.process_index() != 0:
            return
        (path,) = self._directories_of(self._writing)
        names = [name for name in sorted(_files(path)) if name not in _UNSEALED]
        files = {name: _fingerprint(path / name) for name in names}
        with (path / _SEAL).open("w") as f:
            f.write(json.dumps({"files": files}))
            if "://" not in str(path):  # a local disk, where a power cut could lose it
                f.flush()
                os.fsync(f.fileno())

    def _directories_of(self, step: int | None) -> list[epath.Path]:
        """`<step>` (buckets) and `<step>.orbax-checkpoint-tmp` (disks, where it is renamed)."""
        if not self.directory.exists():
            return []
        return [p for p in self.directory.iterdir() if p.name.split(".")[0] == str(step)]

    def _set_aside(self, step: int) -> None:
        aside = self.directory / f"{_BROKEN}{step}"
        if aside.exists():
            aside.rmtree()
        (self.directory / str(step)).rename(aside)

    def _not_written(self, error: Exception) -> CheckpointError:
        step, self._writing = self._writing, None
        for path in self._directories_of(step):
            if "tmp" in path.name:
                with contextlib.suppress(OSError):
                    path.rmtree()  # on a full disk, room for the logs
        older = [s for s in self.steps() if s != step]
        kept = f"the one of step {older[-1]} is kept" if older else "there is no earlier one"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.directory}: "
            f"{_reason(error)}; {kept}"
        )

    def _not_read(self, step: int, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{name!r} of the checkpoint of step {step} in {self.directory} could not be read: "
            f"{_reason(error)}"
        )


def _meet(*, key: str, timeout_ms: int) -> None:
    """orbax's meeting of all hosts, to which one that has just failed does not go.

    It holds one before it raises what has failed, and the others never come: they wait for this
    host in an earlier one. Both would wait for 20 minutes (orbax 0.12.8). So the failure is raised
    at once, this host ends, and `hosts` ends the others.
    """
    if sys.exc_info()[1] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a checkpoint."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _files(path: epath.Path, prefix: str = "") -> Iterator[str]:
    """Names of all files below `path`, relative to it."""
    for child in path.iterdir():
        if child.is_dir():
            yield from _files(child, f"{prefix}{child.name}/")
        else:
            yield prefix + child.name


def _fingerprint(path: epath.Path) -> tuple[int, int]:
    """Size, and CRC-32 of the first and last MiB."""
    size = path.stat().length
    with path.open("rb") as f:
        code = zlib.crc32(f.read(_ENDS))
        if size > _ENDS:
            f.seek(max(size - _ENDS, _ENDS))
            code = zlib.crc32(f.read(_ENDS), code)
    return size, code


def _as_dict(name: str, part: Any) -> dict[str, Any]:
    """An item must be a tree; a bare array goes under its own name."""
    return dict(part) if isinstance(part, Mapping) else {name: part}


def _descend(tree: Any, keys: list[str], item: str, step: int) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            raise CheckpointError(f"the checkpoint of step {step} has no {item!r}")
        tree = tree[key]
    return tree


def _check_fit(item: str, step: int, saved: Any, wanted: Any) -> None:
    """One sentence where names, shapes or dtypes differ; orbax would pad, cut or cast."""
    have, want = _described(saved), _described(wanted)
    for path in sorted(have.keys() | want.keys()):
        if have.get(path) != want.get(path):
            raise CheckpointError(
                f"the checkpoint of step {step} does not fit: {item}{path} is "
                f"{have.get(path, 'absent')} there and {want.get(path, 'absent')} in this run"
            )


def _described(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "".join(f"/{key.key}" for key in keys): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for keys, leaf in leaves
    }


def _reason(error: BaseException) -> str:
    """The root of an orbax error in a few words."""
    for known in ("No space left on device", "Disk quota exceeded", "File too large"):
        if known in str(error):
            return known[0].lower() + known[1:]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
