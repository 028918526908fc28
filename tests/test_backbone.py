"""Loading weights of every kind and computing features with them."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import dinojax
from dinojax import backbone
from dinojax.training.checkpoint import Checkpoints

MODEL = {
    "name": "vit",
    "variant": "tiny",
    "width": 32,
    "depth": 2,
    "heads": 2,
    "patch_size": 8,
    "storage_tokens": 2,
    "layerscale": 1.0,
    "dtype": "float32",
}
CONFIG = {
    "model": MODEL,
    "data": {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)},
    "dino_head": {"prototypes": 16},
    "batch_size": 64,
}


@functools.cache
def shapes():
    return jax.eval_shape(backbone.build(MODEL).init, jax.random.key(0))


def fresh(seed):
    """Parameters of the test network, none of them trivial."""
    rng = np.random.default_rng(seed)
    draw = lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32)  # noqa: E731
    return {"backbone": jax.tree.map(draw, shapes())}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    backbone.save_weights(path, fresh(0), CONFIG, step=7)
    return path


@pytest.fixture(scope="module")
def loaded(weights):
    return dinojax.load(weights)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).integers(0, 256, (5, 16, 24, 3)).astype(np.uint8)


def assert_same(one, other, atol=1e-5):
    for name in ("cls", "patches", "storage"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=atol)


def test_features_equal_the_network_on_normalised_pixels(loaded, images):
    normalised = (images / 255.0 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.25, 0.3])
    network = backbone.build(MODEL)
    pixels = jax.numpy.asarray(normalised, np.float32)
    expected = jax.jit(network.apply)(fresh(0)["backbone"], (pixels,))[0]
    found = loaded.features(images)
    assert_same(found, expected, atol=2e-5)
    assert found.cls.shape == (5, 32) and found.storage.shape == (5, 2, 32)
    assert found.patches.shape == (5, 6, 32) and found.grid == (2, 3)
    assert found.cls.dtype == np.float32 and isinstance(found.cls, np.ndarray)


def test_every_form_of_images_gives_the_same(loaded, images):
    expected = loaded.features(images)
    assert_same(loaded.features(images, batch=2), expected)
    assert_same(loaded.features(images.astype(np.float32) / 255), expected)
    assert_same(loaded.features(images.astype(np.float64) / 255), expected)
    assert_same(loaded.features([Image.fromarray(x) for x in images]), expected)
    assert_same(loaded.features(list(images)), expected)
    one = loaded.features(images[0])
    np.testing.assert_allclose(one.cls[0], expected.cls[0], atol=1e-5)
    np.testing.assert_array_equal(loaded.features(Image.fromarray(images[0])).cls, one.cls)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (
            np.zeros((2, 16, 16), np.uint8),
            r"shape \(1, 2, 16, 16\); expected \[n, rows, columns, 3\]",
        ),
        (np.zeros((0, 16, 16, 3), np.uint8), "expected"),
        ([], "expected"),
        (np.zeros((1, 16, 16, 3), np.int32), "int32; expected uint8"),
        (255 * np.ones((1, 16, 16, 3), np.float32), "from 255 to 255; expected 0 to 1"),
        (-np.ones((1, 16, 16, 3), np.float32), "from -1 to -1; expected 0 to 1"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((16, 8, 3), np.uint8)], "one size"),
        (np.zeros((1, 4, 16, 3), np.uint8), "smaller than one patch"),
    ],
)
def test_wrong_images_end_in_a_sentence(loaded, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        loaded.features(wrong)


@pytest.mark.parametrize("policy, grid", [("floor", (2, 3)), ("resize", (2, 4)), ("pad", (3, 4))])
def test_grid_of_a_size_that_does_not_fit(tmp_path, policy, grid):
    config = {**CONFIG, "model": {**MODEL, "size_policy": policy}}
    backbone.save_weights(tmp_path / "w.safetensors", fresh(0), config, step=0)
    found = dinojax.load(tmp_path).features(np.zeros((1, 19, 29, 3), np.uint8))
    assert found.grid == grid and found.patches.shape == (1, grid[0] * grid[1], 32)


def test_dtype_of_the_computation(loaded, weights, images):
    expected, found = (
        loaded.features(images),
        dinojax.load(weights, dtype="bfloat16").features(images),
    )
    assert found.cls.dtype == np.float32
    error = np.linalg.norm(found.cls - expected.cls) / np.linalg.norm(expected.cls)
    assert 1e-5 < error < 2e-2
    with pytest.raises(ValueError, match=r"dtype 'float16'; expected one of"):
        dinojax.load(weights, dtype="float16")


def test_wrong_sources_end_in_a_sentence(weights, tmp_path):
    with pytest.raises(ValueError, match="does not exist; expected a run directory or a weights"):
        dinojax.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no run directory .* holds 0 .safetensors files"):
        dinojax.load(tmp_path)
    with pytest.raises(ValueError, match="is not a run directory"):
        dinojax.load(weights, step=3)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        dinojax.load(damaged)
    (tmp_path / "model.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match="model.pth is not a readable safetensors file"):
        dinojax.load(tmp_path / "model.pth")


def test_a_failed_write_leaves_the_old_file(weights, tmp_path, monkeypatch):
    target = tmp_path / "teacher.safetensors"
    backbone.save_weights(target, fresh(0), CONFIG, step=1)
    before = target.read_bytes()

    def full_disk(flat, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(backbone, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        backbone.save_weights(target, fresh(1), CONFIG, step=2)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of steps 4 and 8 and a weights file of step 6, all different."""
    run = tmp_path_factory.mktemp("run")
    (run / "config.json").write_text(json.dumps({"config": CONFIG, "flat": {}}))
    saves = Checkpoints(run / "checkpoints")
    for step in (4, 8):
        saves.save(step, {"teacher": jax.tree.map(jax.numpy.asarray, fresh(step))}, {})
    saves.close()
    backbone.save_weights(run / "weights" / "teacher.safetensors", fresh(6), CONFIG, step=6)
    return run


def seed_of(params):
    """Which of the parameters of `run` these are."""
    (seed,) = (
        seed
        for seed in (4, 6, 8)
        if np.array_equal(
            params["backbone"]["norm"]["scale"], fresh(seed)["backbone"]["norm"]["scale"]
        )
    )
    return seed


@pytest.mark.parametrize("suffix, step, seed", [("", None, 8), ("@4", None, 4), ("", 6, 6)])
def test_which_teacher_of_a_run(run, suffix, step, seed):
    found = dinojax.load(f"{run}{suffix}", step=step)
    assert found.settings.step == seed
    assert seed_of({"backbone": found.params}) == seed
    assert_same_tree(found.params, fresh(seed)["backbone"])


def assert_same_tree(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_weights_file_of_a_finished_run(run, tmp_path):
    """The file is preferred where no checkpoint is newer."""
    (tmp_path / "config.json").write_text("{}")  # not read: everything stands in the file
    backbone.save_weights(tmp_path / "weights" / "teacher.safetensors", fresh(6), CONFIG, step=6)
    assert dinojax.load(tmp_path).settings.step == 6


def test_missing_steps_end_in_a_sentence(run, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint of step 5; it has \[4, 8\]"):
        dinojax.load(run, step=5)
    with pytest.raises(ValueError, match="after the @ a step is expected"):
        dinojax.load(f"{run}@last")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no checkpoint and no weights yet"):
        dinojax.load(tmp_path)


class Bucket(MemoryFileSystem):
    """Files of gs:// in memory."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gs://", "memory://", 1))


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: files)
    files = Bucket()
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("path", ["a/teacher.safetensors", "a", "runs/x", "runs/x@6"])
def test_weights_in_a_bucket(bucket, run, path):
    """A file, its folder, a run (whose checkpoints orbax reads, and not from this bucket)."""
    written = (run / "weights" / "teacher.safetensors").read_bytes()
    bucket.pipe_file("/b/a/teacher.safetensors", written)
    bucket.pipe_file("/b/runs/x/weights/teacher.safetensors", written)
    bucket.pipe_file("/b/runs/x/config.json", b"{}")
    found, settings = backbone.read(f"gs://b/{path}", part="backbone")
    assert settings.step == 6
    assert_same_tree(backbone._nested(found), fresh(6))


def test_a_bucket_that_cannot_be_read(bucket, weights, monkeypatch):
    with pytest.raises(ValueError, match="gs://b/x does not exist; expected a run directory"):
        backbone.read("gs://b/x")
    with pytest.raises(ValueError, match="a bucket of gs:// or s3://, not https://"):
        backbone.read("https://host/teacher.safetensors")
    bucket.pipe_file("/b/cut.safetensors", weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="^gs://b/cut.safetensors is not a readable safetensors"):
        backbone.read("gs://b/cut.safetensors")
    bucket.pipe_file("/b/run/config.json", b"{}")
    bucket.pipe_file("/b/run/checkpoints/4/seal.json", b"{}")
    with pytest.raises(ValueError, match=r"no checkpoint of step 5; it has \[4\]"):
        backbone.read("gs://b/run@5")

    def fail(error):
        def fs(self, path):
            raise error

        monkeypatch.setattr(type(backend.fsspec_backend), "fs", fs)

    fail(PermissionError("403: no storage.objects.get\nand more"))
    with pytest.raises(ValueError, match="^gs://b/x cannot be read: 403: no storage.objects.get$"):
        backbone.read("gs://b/x")
    fail(ImportError("gcsfs"))
    with pytest.raises(ValueError, match=r"needs more packages: pip install 'dinojax\[cloud\]'"):
        backbone.read("gs://b/x")


@pytest.mark.parametrize("kind", ["file", "checkpoint"])
def test_load_params_follows_the_places_of_like(run, weights, kind):
    source, seed = (weights, 0) if kind == "file" else (f"{run}@4", 4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    like = jax.device_put(fresh(1))
    like["backbone"]["cls_token"] = jax.device_put(like["backbone"]["cls_token"], split)
    found = backbone.load_params(source, like)
    assert found["backbone"]["cls_token"].sharding == split
    assert_same_tree(found, fresh(seed))


def test_load_params_of_another_model(weights):
    like = jax.device_put(fresh(1))
    like["backbone"]["norm"]["scale"] = jax.numpy.zeros(48)
    with pytest.raises(
        ValueError, match=r"backbone/norm/scale has the shape \(32,\).*needs \(48,\)"
    ):
        backbone.load_params(weights, like)
    with pytest.raises(ValueError, match="has no dino_head/fc1/bias, which this model needs"):
        backbone.load_params(weights, {"dino_head": {"fc1": {"bias": jax.numpy.zeros(3)}}})


def test_importing_dinojax_starts_nothing():
    code = "import sys, dinojax; sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'flax')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
