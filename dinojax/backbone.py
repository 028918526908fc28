"""What users import: a trained backbone and its features.

    b = dinojax.load("runs/a")          # a run directory, RUN@STEP, or a weights file or its folder
    f = b.features(images)              # f.cls [n, d], f.patches [n, p, d], f.storage [n, r, d]

All of them lie on a disk or in a bucket (`gs://bucket/runs/a`).

The file format is one safetensors file of float32 arrays named by parameter path
(`backbone/blocks/attn/qkv/kernel`), with the model's settings as metadata. `train.py` writes it
(`save_weights`) and starts phases from it (`load_params`).
"""

import contextlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dinojax import __version__
from dinojax.sharding import path_name
from dinojax.training.checkpoint import CheckpointError, Checkpoints

Params = dict[str, Any]

_FORMAT = "dinojax-1"
_DTYPES = ("float32", "bfloat16")
_SECTIONS = ("model", "dino_head", "ibot_head")
_CONVNEXT_STRIDE = 32
_SCHEMES = ("gs", "s3")  # buckets that weights are read from; those of runs: `training.rundir`
_REQUEST = 1 << 26  # bytes asked of a bucket at a time


class Features(NamedTuple):
    """Features of n images after the final norm, float32; `grid` = rows, columns of patches."""

    cls: Float[np.ndarray, "n d"]
    patches: Float[np.ndarray, "n p d"]
    storage: Float[np.ndarray, "n r d"]
    grid: tuple[int, int]


class Settings(NamedTuple):
    """What is needed beside the parameters: the config's sections and the pixel normalisation."""

    sections: dict[str, dict[str, Any]]  # model, and the heads where they were saved
    mean: list[float]
    std: list[float]
    step: int


class Backbone:
    """A frozen backbone in evaluation mode. Made by `load`."""

    def __init__(self, params: Params, settings: Settings, dtype: str | None = None):
        self.params, self.settings = jax.device_put(params), settings
        self.model = dict(settings.sections["model"])
        if dtype is not None:
            self.model["dtype"] = _checked_dtype(dtype)
        network = build(self.model)
        mean, std = (
            np.asarray(value, np.float32).reshape(1, 1, 1, -1)
            for value in (settings.mean, settings.std)
        )

        def forward(params: Params, images: jax.Array) -> tuple[jax.Array, ...]:
            pixels = images.astype(np.float32)
            pixels = pixels / 255 if images.dtype == np.uint8 else pixels
            seen = network.apply(params, ((pixels - mean) / std,))[0]
            return tuple(x.astype(np.float32) for x in (seen.cls, seen.patches, seen.storage))

        self.forward = forward  # for `features.py`, which pools before anything is fetched
        self._forward = jax.jit(forward)  # one compile for each shape of a chunk

    def features(self, images: Any, batch: int = 32) -> Features:
        """Features of images, `batch` at a time.

        Args:
            images: [n, i, j, c], one image [i, j, c], or a list of Pillow images or arrays of one
                size; uint8, or floats from 0 to 1. Normalised here, as in training.
        """
        images = self._checked(_stack(images))
        n = len(images)
        rows = min(batch, 1 << (n - 1).bit_length())  # few shapes, whatever n: powers of two
        parts = []
        for start in range(0, n, rows):
            chunk = images[start : start + rows]
            padded = np.pad(chunk, ((0, rows - len(chunk)), (0, 0), (0, 0), (0, 0)))
            out = self._forward(self.params, padded)
            parts.append([x[: len(chunk)] for x in jax.device_get(out)])
        cls, patches, storage = (np.concatenate(column) for column in zip(*parts))
        return Features(cls, patches, storage, self.grid(*images.shape[1:3]))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that an image of this many pixels has."""
        stride = _CONVNEXT_STRIDE
        if self.model["name"] == "vit":
            stride = self.model["patch_size"]
        count = {
            "floor": lambda side: side // stride,
            "resize": lambda side: max(1, round(side / stride)),
            "pad": lambda side: -(-side // stride),
        }[self.model.get("size_policy", "floor")]
        return count(height), count(width)

    def _checked(self, images: np.ndarray) -> np.ndarray:
        channels = len(self.settings.mean)
        if images.ndim == 3:
            images = images[None]
        if images.ndim != 4 or images.shape[-1] != channels or 0 in images.shape:
            raise ValueError(
                f"images have the shape {images.shape}; expected [n, rows, columns, {channels}]."
            )
        if images.dtype == np.uint8:
            return images
        if not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"images are {images.dtype}; expected uint8, or floats from 0 to 1.")
        if images.min() < 0 or images.max() > 1:
            raise ValueError(
                f"float images reach from {images.min():.3g} to {images.max():.3g}; expected 0 to "
                "1 before any normalisation (or uint8)."
            )
        return images.astype(np.float32)


def build(model: Mapping[str, Any]) -> Any:
    """The network of a config's `model` section."""
    section = {key: value for key, value in model.items() if key != "name"}
    return importlib.import_module(f"dinojax.models.{model['name']}").build(section)


def load(
    source: str | os.PathLike[str], *, dtype: str | None = None, step: int | None = None
) -> Backbone:
    """The backbone of a run directory (its EMA teacher) or of a weights file.

    Args:
        source: RUN, RUN@STEP, a `.safetensors` file, or a folder that holds one; a path or a URL.
        dtype: "float32" or "bfloat16" for the computation; None: as in training.
        step: of the checkpoint of a run (None: the newest good one).
    """
    if dtype is not None:
        _checked_dtype(dtype)
    flat, settings = read(source, step, "backbone")
    return Backbone(_nested(flat)["backbone"], settings, dtype)


def load_params(source: str | os.PathLike[str], like: Params, step: int | None = None) -> Params:
    """Parameters shaped, typed and placed like the arrays of `like`.

    `like` holds any of `backbone`, `dino_head`, `ibot_head`; every array of it must be in `source`.
    """
    flat, _ = read(source, step)

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        if name not in flat:
            raise ValueError(f"{source} has no {name}, which this model needs.")
        value = flat[name]
        if value.shape != leaf.shape:
            raise ValueError(
                f"{source}: {name} has the shape {value.shape}; this model needs {leaf.shape}."
            )
        value = value.astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(one, like)


def read(
    source: str | os.PathLike[str], step: int | None = None, part: str = ""
) -> tuple[dict[str, np.ndarray], Settings]:
    """Arrays by parameter path (of one `part`, such as "backbone"), and what else is needed.

    Raises:
      ValueError, CheckpointError: one sentence.
    """
    text = os.fspath(source)
    scheme, url, _ = text.partition("://")
    if not url:
        return _read(text, step, part)
    if scheme not in _SCHEMES:
        raise ValueError(
            f"{text}: weights are read from a disk or a bucket of gs:// or s3://, not {scheme}://"
        )
    try:
        return _read(text, step, part)
    except (ValueError, CheckpointError):
        raise
    except ImportError:
        raise ValueError(f"{text} needs more packages: pip install 'dinojax[cloud]'") from None
    except Exception as error:  # the libraries of the clouds raise every kind
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{text} cannot be read: {reason}") from error


def _read(source: str, step: int | None, part: str) -> tuple[dict[str, np.ndarray], Settings]:
    text = source
    path = epath.Path(text)
    if not path.exists() and "@" in text:
        text, _, number = text.rpartition("@")
        path = epath.Path(text)
        if not number.isdigit() or step is not None:
            raise ValueError(f"{source}: after the @ a step is expected, as in {text}@1000.")
        step = int(number)
    if not path.exists():
        raise ValueError(f"{source} does not exist; expected a run directory or a weights file.")
    if path.is_dir() and (path / "config.json").is_file():
        return _read_run(path, step, part)
    if step is not None:
        raise ValueError(f"step {step} was asked for, but {path} is not a run directory.")
    found = _weights_in(path)
    with _on_disk(found) as file:
        return _read_file(file, part, found)


def save_weights(
    path: str | os.PathLike[str], params: Params, config: Mapping[str, Any], step: int
) -> None:
    """Writes parameters (`backbone`, with or without heads) for `load` and `load_params`.

    `config` = a run's whole config tree, of which the model's and heads' sections and
    data.mean/std are kept. Written under a temporary name first. On several hosts all of them
    call this; the first writes.
    """
    flat = {path_name(key): _whole(x) for key, x in jax.tree_util.tree_leaves_with_path(params)}
    if jax.process_index():
        return
    settings = json.dumps(_settings(config, step)._asdict(), sort_keys=True)
    metadata = {"format": _FORMAT, "written_by": f"dinojax {__version__}", "settings": settings}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(flat, temporary, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_run(
    run: epath.Path, step: int | None, part: str
) -> tuple[dict[str, np.ndarray], Settings]:
    """From weights/teacher.safetensors, unless a checkpoint of the run is newer."""
    saves = Checkpoints(run / "checkpoints", read_only=True)  # the run may be in flight
    written = run / "weights" / "teacher.safetensors"
    with _on_disk(written) as file:
        written_step = _settings_of(file, written).step if file.is_file() else None
        if step is None:
            steps = [saves.latest(), written_step]
            step = max((one for one in steps if one is not None), default=None)
        if step is None:
            raise ValueError(f"{run} holds no checkpoint and no weights yet.")
        if step == written_step:
            return _read_file(file, part, written)
    if step not in saves.steps():
        raise ValueError(f"{run} has no checkpoint of step {step}; it has {saves.steps()}.")
    teacher = saves.restore_item(step, f"teacher/{part}" if part else "teacher")
    teacher = {part: teacher} if part else teacher
    flat = {path_name(key): x for key, x in jax.tree_util.tree_leaves_with_path(teacher)}
    config = json.loads((run / "config.json").read_text())["config"]
    return {name: np.asarray(x, np.float32) for name, x in flat.items()}, _settings(config, step)


def _settings(config: Mapping[str, Any], step: int) -> Settings:
    """Of a run's whole config tree, what its weights need."""
    sections = {name: dict(config[name]) for name in _SECTIONS if name in config}
    return Settings(sections, list(config["data"]["mean"]), list(config["data"]["std"]), int(step))


def _weights_in(path: epath.Path) -> epath.Path:
    if path.is_file():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix == ".safetensors")
    if len(files) != 1:
        raise ValueError(
            f"{path} is no run directory (no config.json in it) and holds {len(files)} "
            ".safetensors files; expected one."
        )
    return files[0]


@contextlib.contextmanager
def _on_disk(path: epath.Path) -> Iterator[Path]:
    """The file; of a bucket's, a copy for as long as it is needed: safetensors maps files."""
    if "://" not in str(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="dinojax-") as folder:
        copy = Path(folder, path.name)
        if path.exists():
            with path.open("rb") as there, copy.open("wb") as here:
                shutil.copyfileobj(there, here, _REQUEST)
        yield copy


def _settings_of(file: Path, name: epath.Path) -> Settings:
    """`name` is what to call the file in errors: it may be a copy of another one."""
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} is not a readable safetensors file: {error}.") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{name} was not written by dinojax; expected format {_FORMAT!r}.")
    return Settings(**json.loads(metadata["settings"]))


def _read_file(file: Path, part: str, name: epath.Path) -> tuple[dict[str, np.ndarray], Settings]:
    settings = _settings_of(file, name)
    with safe_open(file, framework="numpy") as opened:
        names = [key for key in opened.keys() if not part or key.startswith(part + "/")]
        return {key: opened.get_tensor(key) for key in names}, settings


def _nested(flat: Mapping[str, np.ndarray]) -> Params:
    tree: Params = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree


def _whole(x: Any) -> np.ndarray:
    """An array on this host, gathered from the others where they hold parts of it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.ascontiguousarray(jax.device_get(x), np.float32)  # a teacher may be bfloat16


def _stack(images: Any) -> np.ndarray:
    """One numpy array of whatever images came in."""
    if hasattr(images, "convert"):  # a Pillow image
        images = [images]
    if not isinstance(images, Sequence):
        return np.asarray(images)
    arrays = [np.asarray(x.convert("RGB") if hasattr(x, "convert") else x) for x in images]
    shapes = sorted({x.shape for x in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"images of different shapes, such as {shapes[0]} and {shapes[1]}; "
            "resize them to one size, or ask for their features one by one."
        )
    return np.stack(arrays) if arrays else np.zeros((0, 0, 0, 0), np.uint8)


def _checked_dtype(dtype: Any) -> str:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r}; expected one of {_DTYPES}.")
    return name
