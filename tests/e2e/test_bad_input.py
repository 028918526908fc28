"""What cannot work ends in one sentence before work starts: exit code 2, nothing written."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

SOURCE = "--config.data.source="


def jpeg(seed=0, size=40):
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder to put files in."""
    path = tmp_path / "images"
    path.mkdir()
    return path


def refused(ended, workdir, *words):
    """One sentence holding all the words, exit code 2, no work directory."""
    sentence = ended.sentence()
    assert ended.code == 2, (ended.code, ended.err)
    for word in words:
        assert word in sentence, sentence
    assert "\n" not in sentence and not workdir.exists()


def test_empty_folder(launch, tools, tmp_path, folder):
    ended = launch(tools.command(tmp_path / "run", f"{SOURCE}folder:{folder}"))
    refused(ended, tmp_path / "run", str(folder), "no file")


def test_folder_without_images(launch, tools, tmp_path, folder):
    (folder / "notes.txt").write_text("no image")
    ended = launch(tools.command(tmp_path / "run", f"{SOURCE}folder:{folder}"))
    refused(ended, tmp_path / "run", str(folder), "no image")


def test_missing_folder(launch, tools, tmp_path):
    ended = launch(tools.command(tmp_path / "run", f"{SOURCE}folder:{tmp_path}/nowhere"))
    refused(ended, tmp_path / "run", "nowhere", "does not exist")


def test_path_without_a_kind(launch, tools, tmp_path, folder):
    ended = launch(tools.command(tmp_path / "run", f"{SOURCE}{folder}"))
    refused(ended, tmp_path / "run", f"'folder:{folder}'")


def test_unknown_kind(launch, tools, tmp_path):
    ended = launch(tools.command(tmp_path / "run", f"{SOURCE}foldr:{tmp_path}"))
    refused(ended, tmp_path / "run", "did you mean 'folder'?")


def test_parquet_without_images(launch, tools, tmp_path):
    pq.write_table(pa.table({"img": [jpeg()]}), tmp_path / "a.parquet")
    ended = launch(tools.command(tmp_path / "run", f"{SOURCE}parquet:{tmp_path}/a.parquet"))
    refused(ended, tmp_path / "run", "no column 'image'")


def test_truncated_images(launch, tools, tmp_path, folder):
    for number in range(16):
        (folder / f"{number}.jpg").write_bytes(jpeg(number)[:300])
    ended = launch(tools.command(tmp_path / "run", f"{SOURCE}folder:{folder}"))
    refused(ended, tmp_path / "run", "cannot be read", str(folder))


def test_too_few_images(launch, tools, tmp_path, folder):
    for number in range(7):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    ended = launch(tools.command(tmp_path / "run", f"{SOURCE}folder:{folder}"))
    refused(ended, tmp_path / "run", "7 images", "needs 16", "batch_size=7")


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--config.model.patchsize=8", ("'model.patchsize'", "did you mean 'model.patch_size'?")),
        ("--config.phases[1].stps=8", ("'phases[1].stps'", "did you mean 'phases[1].steps'?")),
        ("--config.model.depth=two", ("depth",)),
        ("--config.model.variant=hueg", ("hueg", "huge")),
        ("--config.phases[0].crops.sizes=((24,4,0),)", ("local crop of 4", "nearest: 8")),
        ("--config.model.patch_size=32", ("'pretrain'", "global crop of 24", "nearest: 32")),
        ("--config.phases[0].crops.sizes=((24,16,48),)", ("gram.teacher is 'none'",)),
        ("--config.batch_size=15", ("batch_size 15", "nearest: batch_size=16")),
        ("--config.microbatches=3", ("batch_size 16", "nearest: batch_size=")),
        ("--config.microbatches=2", ("8 groups of 2 images do not split", "nearest: group=1")),
        ("--config.mesh.tensor=3", ("tensor=3", "8 devices")),
        ("--config.phases[0].steps=0", ("steps is 0",)),
        ("--config.phases[1].gram.source=step:5", ("step:5", "checkpoint.keep_every=5")),
        ("--config.phases[0].start=/nowhere/run@5", ("'pretrain': start", "does not exist")),
        ("--config.phases[2].gram.source=/nowhere/a", ("gram.source", "does not exist")),
        ("--config.eval.knn_train=foldr:x", ("foldr",)),
        ("--workers=3", ("workers",)),
        ("surplus", ("unexpected argument 'surplus'",)),
    ],
)
def test_values_that_cannot_work(launch, tools, tmp_path, argument, words):
    refused(launch(tools.command(tmp_path / "run", argument)), tmp_path / "run", *words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["data.source=scenes:50"], ("'scenes:50' beside a mixture of 2", "mixture='()'")),
        (["data.mixture[0].homogeneous=.8"], ("sum to 1.1", "at most 1")),
        (["data.mixture[0].weight=-1."], ("'scenes' has the weight -1.0",)),
        (["data.mixture[0].weight=0", "data.mixture[1].weight=0"], ("no component has a weight",)),
        (["data.mixture[1].name=scenes"], ("2 components are called 'scenes'",)),
        (["data.mixture[1].wieght=2"], ("did you mean 'data.mixture[1].weight'?",)),
        (["data.mixture[2].weight=2"], ("no key 'data.mixture[2].weight'",)),
        (["data.mixture[1].source=scenes:9"], ("'others' has 9 images", "needs 16")),
        (["data.mixture[1].source=foldr:x"], ("component 'others'", "'folder'")),
        (["data.mixture=()"], ("config.data.mixture is empty", "data.source=scenes")),
    ],
)
def test_mixtures_that_cannot_work(launch, tools, tmp_path, arguments, words):
    given = [f"--config.{argument}" for argument in arguments]
    ended = launch(tools.command(tmp_path / "run", *given, config=f"{tools.TINY}:mixture"))
    refused(ended, tmp_path / "run", *words)


def test_experiment_files(launch, tools, tmp_path, monkeypatch):
    monkeypatch.chdir(tools.ROOT)
    workdir = tmp_path / "run"
    missing = launch(tools.command(workdir, config="experiments/gram_vitll.py"))
    refused(missing, workdir, "no experiment file", "gram_vitl.py")
    gram = str(tools.ROOT / "experiments" / "gram_vitl.py")
    refused(launch(tools.command(workdir, config=f"{gram}:tny")), workdir, "'tny'", "known: tiny")
    refused(launch(["--workdir", str(workdir)]), workdir, "--config is missing")
    refused(launch(["--config", str(tools.TINY)]), workdir, "--workdir is missing")


def test_knn_without_labels(launch, tools, tmp_path, folder):
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    unlabelled = [f"--config.eval.{key}=folder:{folder}" for key in ("knn_train", "knn_val")]
    refused(launch(tools.command(tmp_path / "run", *unlabelled)), tmp_path / "run", "label")


def test_workdir_is_a_file(launch, tools, tmp_path):
    (tmp_path / "run").write_text("mine")
    ended = launch(tools.command(tmp_path / "run"))
    assert ended.code == 2 and "is a file; give a directory" in ended.sentence()
    assert (tmp_path / "run").read_text() == "mine"


def test_workdir_cannot_be_written(launch, tools, tmp_path):
    (tmp_path / "file").write_text("")
    ended = launch(tools.command(tmp_path / "file" / "run"))
    assert ended.code == 2 and "cannot write into --workdir" in ended.sentence()


def test_workdir_of_another_config(launch, tools, tmp_path):
    """What is there stays; keys that only move where a run computes may differ."""
    from dinojax import config as configs

    workdir = tmp_path / "run"
    workdir.mkdir()
    flat = configs.flatten(configs.resolve(configs.load_file(str(tools.TINY))))
    text = json.dumps({"flat": flat | {"seed": 5, "log_every": 7}})
    (workdir / "config.json").write_text(text)
    ended = launch(tools.command(workdir))
    assert ended.code == 2 and "(1 keys differ; seed: 5 there, 0 here)" in ended.sentence()
    assert [p.name for p in workdir.iterdir()] == ["config.json"]
    assert (workdir / "config.json").read_text() == text
