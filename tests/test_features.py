"""Features to disk: the right vectors at the right rows, safe to stop, refused when they differ."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dinojax
from dinojax import backbone, features
from dinojax.cli import main
from dinojax.data import feature_shards
from dinojax.data.sources import open_source
from dinojax.eval.common import fit
from dinojax.features import Recipe, write_features

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
CONFIG = {"model": MODEL, "data": {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}}
SMALL = Recipe(size=16, dtype="float32")
KEPT = {"batch": 8, "shard_rows": 10, "threads": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(backbone.build(MODEL).init, jax.random.key(0))
    draw = lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32)  # noqa: E731
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    backbone.save_weights(path, {"backbone": jax.tree.map(draw, shapes)}, CONFIG, step=7)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return dinojax.load(weights)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """22 images in two classes, two of which cannot be read; their SPEC."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(1)
    for k in range(22):
        path = root / "ab"[k // 11] / f"{k:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + k, 24, 3), np.uint8)).save(path)
    for name in ("a/03.png", "b/21.png"):
        (root / name).write_bytes(b"nothing")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def whole(network, images, tmp_path_factory):
    """The embedding set of these images: three shards."""
    out = tmp_path_factory.mktemp("whole")
    summary = write_features(network, open_source(images), out, SMALL, spec=images, **KEPT)
    assert (summary.computed, summary.rows, summary.left_out) == (22, 20, 2)
    return out


def shards(folder):
    return [pq.read_table(file) for file in sorted(folder.glob("emb-*.parquet"))]


def vectors(tables):
    flat = [table["embedding"].combine_chunks().flatten().to_numpy() for table in tables]
    return np.concatenate(flat).reshape(sum(map(len, tables)), -1)


def contents(folder):
    """Every file's bytes by name; the notes of finished shards too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- what is written -----------------------------------------------------------------------------


def test_vectors_are_those_of_the_backbone_at_their_rows(whole, network, images):
    source, tables = open_source(images), shards(whole)
    assert [len(table) for table in tables] == [9, 10, 1]
    table = pa.concat_tables(tables)
    rows = [row for row in range(22) if row not in (3, 21)]
    assert table["row"].to_pylist() == rows
    assert table["id"].to_pylist() == [source.name(row) for row in rows]
    assert table["label"].to_pylist() == [row // 11 for row in rows]
    pixels = np.stack([fit(source.image(row), 16) for row in rows])
    np.testing.assert_allclose(vectors(tables), network.features(pixels).cls, atol=1e-5)
    assert table.schema.metadata == {b"source": images.encode(), b"classes": b'["a", "b"]'}


def test_the_manifest_says_what_is_there(whole, network, images):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["n_total"] == 20 and manifest["dim"] == 32 and manifest["left_out"] == 2
    assert (manifest["version"], manifest["format"], manifest["normalized"]) == (
        1,
        "parquet",
        False,
    )
    assert manifest["dtype"] == "float32" and manifest["source"] == images
    assert manifest["classes"] == ["a", "b"]
    for shard, table in zip(manifest["shards"], shards(whole), strict=True):
        file = whole / shard["path"]
        assert (shard["n"], shard["bytes"]) == (len(table), file.stat().st_size)
        digest = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True)
        assert shard["sha256"] == digest.stdout.split()[0]
    embedder = manifest["embedder"]
    assert embedder["name"] == "vit/tiny" and embedder["step"] == 7
    assert embedder["token"] == "cls after the final norm" and embedder["image_size"] == 16
    assert embedder["digest"] == features.digest(network.params)
    names = [line.split("\t")[0] for line in (whole / "unreadable.txt").read_text().splitlines()]
    assert names == ["a/03.png", "b/21.png"]


def test_a_shard_is_a_curated_source(whole, images):
    source, base = open_source(f"curated:{whole}/emb-00001.parquet"), open_source(images)
    assert len(source) == 10 and source.classes == ("a", "b")
    np.testing.assert_array_equal(source.image(2), base.image(12))
    assert source.label(0) == 0 and source.label(1) == 1


def test_the_digest_is_of_names_and_values(network):
    params = {"a": np.zeros(3, np.float32), "b": np.ones(3, np.float32)}
    assert features.digest(params) == features.digest(dict(reversed(params.items())))
    assert features.digest(params) != features.digest({"a": params["b"], "b": params["a"]})
    assert features.digest(params) != features.digest({"a": params["a"], "c": params["b"]})


def test_tokens_limit_and_float16(network, tmp_path):
    spec, recipe = "scenes:40?size=16", Recipe("cls+mean", 16)
    write_features(network, open_source(spec), tmp_path, recipe, spec=spec, limit=12, batch=8)
    (table,) = shards(tmp_path)
    rows = table["row"].to_pylist()
    assert rows == [k * 40 // 12 for k in range(12)]
    found = network.features(np.stack([open_source(spec).image(row) for row in rows]))
    expected = np.concatenate([found.cls, found.patches.mean(1)], axis=1)
    stored = vectors([table])
    assert stored.dtype == np.float16 and table["embedding"].type.list_size == 64
    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "unreadable.txt").exists()


def test_images_of_one_name_get_ids_of_their_own(network, whole, images, tmp_path):
    table = pa.table({"row": [5, 7], "count": [2, 1]}).replace_schema_metadata({"source": images})
    pq.write_table(table, tmp_path / "samples.parquet")
    spec = f"curated:{tmp_path}/samples.parquet"
    write_features(network, open_source(spec), tmp_path / "out", SMALL, spec=spec, **KEPT)
    (table,) = shards(tmp_path / "out")
    assert table["id"].to_pylist() == ["a/05.png#0", "a/05.png#1", "a/07.png#2"]
    np.testing.assert_allclose(vectors([table])[[0, 2]], vectors(shards(whole))[[4, 6]], atol=1e-5)


def test_one_program_whatever_the_batches_hold(network, images, tmp_path, monkeypatch):
    traced, forward = [], network.forward

    def counted(params, pixels):
        traced.append(pixels.shape)
        return forward(params, pixels)

    monkeypatch.setattr(network, "forward", counted)
    write_features(network, open_source(images), tmp_path, SMALL, spec=images, batch=5)
    assert traced == [(8, 16, 16, 3)]  # shared out over eight devices


def test_large_weights_are_split_over_the_devices(whole, network, images, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SPLIT_ABOVE", 64)
    write_features(network, open_source(images), tmp_path, SMALL, spec=images, **KEPT)
    np.testing.assert_allclose(vectors(shards(tmp_path)), vectors(shards(whole)), atol=1e-5)


# ---- stopping and going on -----------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 11, 21])
def test_a_stopped_run_goes_on_and_ends_the_same(whole, network, images, tmp_path, at):
    def stop(done, total):
        if done >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(
            network, open_source(images), tmp_path, SMALL, spec=images, progress=stop, **KEPT
        )
    kept = {path: path.stat().st_ino for path in tmp_path.glob("emb-*.parquet")}
    assert len(kept) == at // 10 and not (tmp_path / "manifest.json").exists()
    seen = []
    write_features(
        *(network, open_source(images), tmp_path, SMALL),
        **KEPT | {"spec": images, "progress": lambda done, total: seen.append((done, total))},
    )
    assert seen[0] == (10 * len(kept), 22) and seen[-1] == (22, 22)
    assert {path: path.stat().st_ino for path in kept} == kept
    assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.rglob(".*"))


def test_a_lost_or_cut_shard_is_made_again(whole, network, images, tmp_path):
    for name, data in contents(whole).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "emb-00000.parquet").unlink()
    (tmp_path / "emb-00002.parquet").write_bytes(b"PAR1")
    summary = write_features(network, open_source(images), tmp_path, SMALL, spec=images, **KEPT)
    assert summary.computed == 12
    assert contents(tmp_path) == contents(whole)


def test_parts_make_the_same_set(whole, network, images, tmp_path):
    source, found = open_source(images), []
    for part in ((1, 2), (0, 2)):
        found.append(
            write_features(network, source, tmp_path, SMALL, spec=images, part=part, **KEPT)
        )
    assert [(one.computed, one.rows) for one in found] == [(10, None), (12, 20)]
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
def test_killed_at_any_moment(weights, tmp_path):
    """kill -9 in the middle of reading, computing and writing: the same files in the end."""
    command = [sys.executable, "-m", "dinojax", "features", "--weights", weights]
    command += ["--data", "scenes:400?size=32", "--size", "32", "--shard-rows", "20", "--out"]
    command = [str(word) for word in command]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    rng, killed = np.random.default_rng(0), 0
    while killed < 5:
        process = subprocess.Popen([*command, str(tmp_path / "cut")], stderr=subprocess.DEVNULL)
        time.sleep(0.05)
        while process.poll() is None and not list(tmp_path.glob(f"cut/emb-{2 * killed:05d}*")):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += 1
    assert not (tmp_path / "cut/manifest.json").exists()
    subprocess.run([*command, str(tmp_path / "cut")], check=True, capture_output=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


# ---- refusals ------------------------------------------------------------------------------------


def refused(network, spec, out, recipe=SMALL, **options):
    options = KEPT | {"spec": spec} | options
    with pytest.raises(ValueError) as error:
        write_features(network, open_source(spec), out, recipe, **options)
    return str(error.value)


def test_another_task_is_refused(whole, network, images):
    before = contents(whole)
    said = refused(network, images, whole, Recipe(size=24, dtype="float32"))
    assert "embedder.image_size was 16, now it is 24" in said
    said = refused(network, images, whole, Recipe(size=16))
    assert "dtype was 'float32', now it is 'float16'" in said
    assert "shard_rows was 10, now it is 5" in refused(network, images, whole, shard_rows=5)
    other = dinojax.backbone.Backbone(
        jax.tree.map(lambda x: x + 1, network.params), network.settings
    )
    assert "embedder.digest was" in refused(other, images, whole)
    assert contents(whole) == before


def test_files_of_something_else_are_refused(network, tmp_path):
    (tmp_path / "emb-00000.npy").write_bytes(b"")
    assert "holds emb-00000.npy" in refused(network, "scenes:4?size=16", tmp_path)


def test_what_cannot_be_is_said_at_once(network, images, tmp_path):
    spec = "scenes:4?size=16"
    with pytest.raises(ValueError, match="tokens 'patch'; expected cls, mean, cls\\+mean"):
        Recipe("patch")
    with pytest.raises(ValueError, match="dtype 'int8'; expected float16, float32"):
        Recipe(dtype="int8")
    assert "7 pixels has no patch" in refused(network, spec, tmp_path, Recipe(size=7))
    assert "batch is 0" in refused(network, spec, tmp_path, batch=0)
    assert "limit is 0" in refused(network, spec, tmp_path, limit=0)
    assert "part 2 of 2" in refused(network, spec, tmp_path, part=(2, 2))
    assert "is a URL" in refused(network, spec, "gs://bucket/out")
    assert "have 5 channels" in refused(network, "scenes:4?size=16&bands=5", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_feature_too_large_for_float16(network, tmp_path):
    norm = {"scale": 1e6 * np.ones(32, np.float32)}
    params = network.params | {"norm": network.params["norm"] | norm}
    loud = dinojax.backbone.Backbone(params, network.settings)
    spec = "scenes:4?size=16"
    said = refused(loud, spec, tmp_path, Recipe(size=16))
    assert "too large for float16" in said and not list(tmp_path.glob("emb-*"))


def test_a_full_disk_leaves_nothing_half_written(network, images, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) == 4:  # the task, a shard, its note; then the second shard
            raise OSError(28, "No space left on device")
        return fsync(descriptor)

    monkeypatch.setattr(feature_shards.os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*finished shards are kept"):
        write_features(network, open_source(images), tmp_path, SMALL, spec=images, **KEPT)
    found = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["emb-00000.json", "emb-00000.parquet", "task.json"]


# ---- the command ---------------------------------------------------------------------------------


def test_the_command(weights, images, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["features", "--weights", str(weights), "--data", images, "--out", str(out)]
    command += ["--size", "16", "--dtype", "float32", "--shard-rows", "10", "--batch", "8"]
    write, written = feature_shards.write_shard, []

    def then_terminated(*arguments):
        write(*arguments)
        written.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(feature_shards, "write_shard", then_terminated)
    assert main(command) == 75
    assert "run the same command to go on" in capsys.readouterr().err and len(written) == 1
    monkeypatch.setattr(feature_shards, "write_shard", write)
    assert main(command) == 0
    said = capsys.readouterr()
    assert "12 images to go" in said.err
    assert "12 images in" in said.out and "left out: 2 that cannot be read" in said.out
    assert "20 rows" in said.out
    assert main([*command, "--tokens", "mean"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: features:") and "embedder.token" in said


def test_the_command_refuses_in_a_sentence(weights, tmp_path, capsys):
    command = ["features", "--data", "scenes:4", "--out", str(tmp_path), "--weights"]
    assert main([*command, "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, str(weights), "--part", "2/2"])
    assert "'2/2' is not I/N" in capsys.readouterr().err
