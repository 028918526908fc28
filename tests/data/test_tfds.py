"""TFDS data sets, prepared in the test and read without TensorFlow.

Needs the extra `tfds`; the sentence that says so is tested in test_records.py.
"""

import io
import multiprocessing
import operator
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import open_source

tfds = pytest.importorskip(
    "tensorflow_datasets", reason="needs tensorflow-datasets: pip install -e '.[tfds]'"
)


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


# Not registered: a prepared folder must be enough.
class TinySet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = "tiny_set"
    url_infos = {}  # nothing to download; tfds would look for a list in the package of this file
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog", "owl"]),
            "number": tfds.features.Scalar(np.int64),
            "name": tfds.features.Text(),
            "mask": tfds.features.Image(shape=(None, None, 1)),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        splits = {"train": range(20), "test": range(20, 26)}
        return {split: self._generate_examples(numbers) for split, numbers in splits.items()}

    def _generate_examples(self, numbers):
        for k in numbers:
            example = {"image": io.BytesIO(png(k)), "label": k % 3, "number": k, "name": f"n{k}"}
            # Encoded: tfds needs TensorFlow to encode pixels.
            mask = io.BytesIO()
            Image.fromarray(np.full((2, 2), k, np.uint8)).save(mask, "PNG")
            yield k, example | {"mask": io.BytesIO(mask.getvalue())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data_dir with `tiny_set` as ArrayRecord."""
    folder = tmp_path_factory.mktemp("tfds")
    TinySet(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize(
    ("place", "split"),
    [
        ("tiny_set:train", "train"),
        ("tiny_set", "train"),
        ("tiny_set/1.2.0:test", "test"),
        ("tiny_set:train[20%:60%]", "train[20%:60%]"),
        ("tiny_set:test+train[:3]", "test+train[:3]"),
    ],
)
def test_the_same_examples_as_tfds(folder, place, split):
    source = open_source(f"tfds:{place}?dir={folder}")
    expected = tfds.data_source("tiny_set", split=split, data_dir=folder, download=False)
    assert "tensorflow" not in sys.modules
    assert len(source) == len(expected) and source.classes == ("cat", "dog", "owl")
    for i in np.random.default_rng(0).permutation(len(source)).tolist():
        example = expected[i]
        assert source.encoded(i) == png(example["number"])
        np.testing.assert_array_equal(source.image(i), example["image"])
        assert source.label(i) == example["label"] == example["number"] % 3
    assert source.labels().tolist() == [example["label"] for example in expected]
    assert "tiny_set-" in source.name(0) and "#" in source.name(0)


def test_features_and_split_by_option(folder):
    source = open_source(f"tfds:tiny_set:train?dir={folder}&split=test&label=number&image=mask")
    assert len(source) == 6 and source.classes is None
    assert sorted(source.labels().tolist()) == list(range(20, 26))
    assert (source.image(2) == source.label(2)).all()


def test_tfds_s_own_environment_names_the_folder(folder, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder))
    assert len(open_source("tfds:tiny_set")) == 20


def test_a_worker_process_reads_the_same(folder):
    source = open_source(f"tfds:tiny_set?dir={folder}")
    assert len(pickle.dumps(source)) < 4000
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        encoded = pool.submit(operator.methodcaller("encoded", 9), source).result()
    assert encoded == source.encoded(9)


def test_a_shard_that_vanishes(tmp_path):
    TinySet(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = open_source(f"tfds:tiny_set?dir={tmp_path}")
    next(tmp_path.glob("**/*train.array_record*")).unlink()
    with pytest.raises(UnreadableImage, match="tiny_set-train.*#3: .*No such file"):
        source.image(3)
    with pytest.raises(ValueError, match="a shard of 'tiny_set' is missing"):
        open_source(f"tfds:tiny_set?dir={tmp_path}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tfds:tiny_set:trian?dir={dir}", "'tiny_set' has no split 'trian'; did you mean 'train'"),
        ("tfds:tiny_set:train[:3x]?dir={dir}", r"has no split 'train\[:3x\]'"),
        ("tfds:tiny_set:train[:0%]?dir={dir}", r"split 'train\[:0%\]' of 'tiny_set' is empty"),
        ("tfds:tiny_sett?dir={dir}", "is not in '.*' and cannot be made out .*`tfds build tiny_se"),
        (
            "tfds:mnist?dir={dir}",
            "'mnist' is not prepared in .*`tfds build mnist --file_format",
        ),
        ("tfds:tiny_set?dir={dir}&image=imag", "no feature 'imag'; did you mean 'image'"),
        ("tfds:tiny_set?dir={dir}&image=name", "'name' of 'tiny_set' is Text.*, not an Image"),
        ("tfds:tiny_set?dir={dir}&label=name", "'name' of 'tiny_set' is Text.*, not a ClassLabel"),
        ("tfds:tiny_set?dirr={dir}", "unknown option 'dirr'; did you mean 'dir'"),
    ],
)
def test_one_sentence_says_what_is_wrong(folder, spec, words):
    with pytest.raises(ValueError, match=words) as caught:
        open_source(spec.format(dir=folder))
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_another_format_is_refused(folder, tmp_path):
    """Of the info alone: to write another format needs TensorFlow."""
    for path in folder.glob("tiny_set/*/*"):
        (tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes().replace(b'"array_record"', b'"tfrecord"')
        (tmp_path / path.relative_to(folder)).write_bytes(text)
    with pytest.raises(ValueError, match="prepared as tfrecord, .*without TensorFlow; prepare it"):
        open_source(f"tfds:tiny_set?dir={tmp_path}")
