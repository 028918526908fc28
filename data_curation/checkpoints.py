"""What a long computation saves now and then: arrays and a JSON file that names them, twice.

`kmeans` keeps its iterations so, `seeding` its centres. The JSON file is written last and is what
counts; the two newest checkpoints stay. Shared files are written by process 0.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data_curation.files import read_json, write_json, write_npy

_KEEP = 2


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one computation in a folder.

    Attributes:
      name: of the computation; several may share the folder.
      setup: what it depends on; a checkpoint of anything else is refused.
    """

    folder: Path
    name: str
    setup: Mapping[str, Any]

    def save(
        self,
        number: int,
        tree: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        own: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Save as `number`, higher than those before; `own` arrays differ between processes."""
        first = jax.process_index() == 0
        for name, array in (arrays if first else {}).items():
            write_npy(self._array(number, name), array)
        for name, array in (own or {}).items():
            write_npy(self._array(number, f"{name}-of-{jax.process_index()}"), array)
        _barrier("written")
        if not first:
            return
        names = {"arrays": list(arrays), "own": list(own or {}), "processes": jax.process_count()}
        write_json(self._json(number), {**names, "setup": dict(self.setup), "tree": dict(tree)})
        for old in self._numbers()[:-_KEEP]:
            self._json(old).unlink()
            for path in self.folder.glob(f"{self.name}-{old:08d}-*.npy"):
                path.unlink()

    def load(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """(tree, arrays) of the newest one, this process's own arrays among them; None: none.

        Raises:
          ValueError: it is of another setup or number of processes, in one sentence.
        """
        numbers = self._numbers()
        _barrier("looked for")  # nobody writes the next one before all have seen this one
        if not numbers:
            return None
        found = read_json(self._json(numbers[-1]))
        setup = {**self.setup, "processes": jax.process_count()}
        begun = {**found["setup"], "processes": found["processes"]}
        for name, value in setup.items():
            if begun.get(name) != value:
                raise ValueError(
                    f"the checkpoints in {self.folder} were made with {name} {begun.get(name)}, "
                    f"not {value}; give another folder, or remove this one to start again"
                )
        files = {name: name for name in found["arrays"]}
        files |= {name: f"{name}-of-{jax.process_index()}" for name in found["own"]}
        paths = {name: self._array(numbers[-1], file) for name, file in files.items()}
        return found["tree"], {name: np.load(path) for name, path in paths.items()}

    def _json(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:08d}.json"

    def _array(self, number: int, name: str) -> Path:
        return self.folder / f"{self.name}-{number:08d}-{name}.npy"

    def _numbers(self) -> list[int]:
        pattern = re.compile(re.escape(self.name) + r"-(\d{8})\.json")
        names = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(found[1]) for p in names if (found := pattern.fullmatch(p.name)))


def stopping(stop: Callable[[], bool] | None, mesh: Mesh | None = None) -> bool:
    """Whether any process of the mesh (None: of all) is asked to stop; the same answer on all.

    All must call it together, all with a `stop` or none; a process whose mesh is its own devices
    asks nobody.
    """
    if stop is None:
        return False
    asked = stop()
    devices = jax.devices() if mesh is None else mesh.devices.flat
    if len({device.process_index for device in devices}) == 1:
        return asked
    return bool(multihost_utils.process_allgather(np.asarray(asked)).any())


def _barrier(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"checkpoint {what}")
