"""Spec strings: which source they open, what they inherit, the sentence they end with otherwise."""

from urllib.parse import parse_qsl

import numpy as np
import pytest

from dinojax.data import sources
from dinojax.data.decode import UnreadableImage
from dinojax.data.sources import open_source


def test_scenes_come_with_count_and_options():
    source = open_source("scenes:7?size=32&split=val")
    assert len(source) == 7 and source.image(6).shape == (32, 32, 3)
    assert 0 <= source.label(6) < len(source.classes)
    assert len(open_source("scenes")) == sources.SCENES == len(open_source("scenes?size=32"))


def test_every_source_is_one(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.uint8))
    (tmp_path / "list.txt").write_text("a.npy")
    for spec in ("scenes:3", f"folder:{tmp_path}", f"list:{tmp_path}/list.txt"):
        source = open_source(spec)
        assert isinstance(source, sources.Source)
        assert len(source.encoded(0)) > 0 and source.image(0).dtype == np.uint8


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("foldr:/x", "unknown source kind 'foldr' .* did you mean 'folder'"),
        ("video:/x", "unknown source kind 'video' .* there are .*, folder, list, parquet, scenes,"),
        ("{dir}", "names no kind; nearest: 'folder:/.*'"),
        ("folder:{dir}?split", "not of the form name=value"),
        ("scenes:many", "count 'many' is not a positive integer"),
        ("scenes?range=0:9", "unknown option 'range'"),
    ],
)
def test_one_sentence_says_what_is_wrong(tmp_path, spec, words):
    with pytest.raises(ValueError, match=words) as caught:
        open_source(spec.format(dir=tmp_path))
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_related_sources_share_their_place():
    base = "parquet:a.parquet?split=train&image=pixels"
    assert sources.related("split=val", base) == "parquet:a.parquet?split=val&image=pixels"
    assert sources.related("?split=val", "scenes:100") == "scenes:100?split=val"
    assert sources.related("folder:/x", base) == "folder:/x"
    assert sources.related("folder:/x?bands=0", base) == "folder:/x?bands=0"
    assert sources.related("scenes", base) == "scenes"
    ranged = "folder:/x?range=0:4095,0:9&bands=1,0"
    assert sources.related("draft=64", ranged) == f"{ranged}&draft=64"
    assert sources.related("range=0:1", ranged) == "folder:/x?range=0:1&bands=1,0"


def test_options_of_options_stay_quoted():
    base = "curated:a.parquet?source=parquet%3Ab%3Fsplit%3Dtrain%26image%3Dx"
    where, _, query = sources.related("split=val", base).partition("?")
    options = dict(parse_qsl(query, strict_parsing=True))
    assert where == "curated:a.parquet"
    assert options == {"source": "parquet:b?split=train&image=x", "split": "val"}


class Few:
    """Three images: two that cannot be read and one of `bands` bands."""

    def __init__(self, bands):
        self.bands = bands

    def __len__(self):
        return 3 if self.bands else 2

    def image(self, i):
        if i < 2:
            raise UnreadableImage(f"{i}.jpg: broken")
        return np.zeros((4, 4, self.bands), np.uint8)

    classes = None
    encoded = label = labels = name = lambda *_: None


def test_images_of_other_channels_are_refused_before_a_run():
    sources.check_readable(Few(3), 3)
    words = (
        "have 5 channels, the model expects 3; nearest: config.model.in_channels=5 with 5 values "
        "in config.data.mean and config.data.std"
    )
    with pytest.raises(ValueError, match=words):
        sources.check_readable(Few(5), 3)
    with pytest.raises(ValueError, match="first 2 images cannot be read, the last: 1.jpg: broken"):
        sources.check_readable(Few(0), 3)
