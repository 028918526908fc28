"""Reports of a curation: figures counted by hand, pages that hold everything, pictures that fit."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_curation import gallery, plots, report
from data_curation.chosen import write_chosen
from data_curation.files import write_json, write_npy, write_table
from data_curation.plots import LevelCounts
from dinojax.data.sources import open_source

from .sets import small_tree, write_set

SPEC = "scenes:30?size=32"
SIZES = (8, 6, 4, 2)  # rows of the four clusters of level 1; level 2: the first two, the others
N = 24  # of which the last four are not in the tree


@pytest.fixture(scope="module")
def x(tmp_path_factory):
    vectors = np.random.default_rng(0).normal(size=(N, 3))
    labels = [0] * 8 + [1] * 12 + [2] * 4
    columns = {"id": np.arange(N), "row": np.arange(N) + 5, "label": labels}
    columns["maker"] = pa.array(["<b>a&b</b>", None] * 12)
    classes = ["cat", "dog", "owl"]
    return write_set(tmp_path_factory.mktemp("set"), vectors, columns, source=SPEC, classes=classes)


@pytest.fixture(scope="module")
def tree(x):
    low = np.r_[np.repeat(np.arange(4), SIZES), [-1] * 4]
    return small_tree(x.array(), low, [0, 0, 1, 1])


@pytest.fixture
def folder(x, tree, tmp_path):
    """A sample: 2, 2, 2, 2 of the clusters, one row of the last twice instead of once."""
    rows = np.array([0, 1, 8, 9, 14, 15, 18, 18])
    write_chosen(tmp_path / "s", x, rows, part="s", tree=tree)
    return tmp_path / "s"


class Page(HTMLParser):
    """Texts and pictures of a page; every tag that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.pictures = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# ---- figures -------------------------------------------------------------------------------------


def test_figures_by_hand(x, tree, folder):
    figures, levels = report.measure(x, tree, folder / "samples.parquet", by="label")
    assert (figures["set"], figures["pool"]) == (24, 20)
    assert (figures["images"], figures["distinct"], figures["repeats"]) == (8, 7, 1)
    assert [level.pool.tolist() for level in levels] == [[8, 6, 4, 2], [14, 6]]
    assert [level.chosen.tolist() for level in levels] == [[2, 2, 2, 2], [4, 4]]
    low, high = figures["levels"]
    assert low["pool"]["imbalance"] == pytest.approx(4 * 120 / 400)
    assert low["sample"]["imbalance"] == 1 and low["pool"]["gini"] == pytest.approx(0.25)
    assert (low["touched"], low["exhausted"]) == (4, 1)  # the last gives as much as it has
    assert low["cut"] == {"min": 2, "median": 2, "max": 2}
    assert high["cut"] == {"min": 4, "median": 4, "max": 4} and high["exhausted"] == 0
    by = figures["by"]
    assert by["set"] == {"dog": 12, "cat": 8, "owl": 4}
    assert by["pool"] == {"dog": 12, "cat": 8} and by["sample"] == {"dog": 6, "cat": 2}
    entropy = lambda *p: -sum(q * np.log(q) for q in p)  # noqa: E731
    before, after = entropy(0.6, 0.4), entropy(0.75, 0.25)
    assert by["balance"]["pool"]["entropy"] == pytest.approx(before / np.log(3))
    assert by["balance"]["sample"]["effective"] == pytest.approx(np.exp(after))
    assert by["entropy_ratio"] == pytest.approx(after / before)
    assert "kl_from_uniform" not in figures
    assert figures["warnings"] == ["level 2: one cluster holds 70% of the rows"]


def test_the_cut_is_of_those_that_could_give_more(x, tree, tmp_path):
    rows = np.r_[0:5, 8:12, 14:18, 18:20]  # 5 and 4 of the first two, all of the others
    write_chosen(tmp_path, x, rows, part="s", tree=tree)
    figures, _ = report.measure(x, tree, tmp_path / "samples.parquet")
    low, high = figures["levels"]
    assert low["cut"] == {"min": 4, "median": 4, "max": 4} and low["exhausted"] == 2
    assert high["exhausted"] == 1
    figures, _ = report.measure(x, tree, tmp_path / "samples.parquet", multiplier=2)
    assert figures["levels"][0]["cut"] == {"min": 2, "median": 3, "max": 4}


def test_everything_taken_has_no_cut(x, tree, tmp_path):
    write_chosen(tmp_path, x, np.arange(20), part="s", tree=tree)
    figures, _ = report.measure(x, tree, tmp_path / "samples.parquet")
    assert [level["cut"] for level in figures["levels"]] == [None, None]


def test_one_cluster_with_most_rows_is_warned_of(x, tmp_path):
    tree = small_tree(x.array(), np.r_[[0] * 20, 1, 2, 3, 4], [0, 0, 0, 1, 1])
    write_chosen(tmp_path, x, np.arange(6), part="s", tree=tree)
    figures, _ = report.measure(x, tree, tmp_path / "samples.parquet", warn_imbalance=3.0)
    assert any("level 1: one cluster holds 83%" in one for one in figures["warnings"])
    assert any("level 1: imbalance factor 3.5" in one for one in figures["warnings"])


def test_unknown_column(x, tree, folder):
    with pytest.raises(ValueError, match="no column 'labels'; did you mean 'label'"):
        report.measure(x, tree, folder / "samples.parquet", by="labels")


# ---- the page ------------------------------------------------------------------------------------


def test_the_whole_report(x, tree, folder, tmp_path):
    dedup = tmp_path / "dedup"
    edges = pa.table(
        {"i": [0, 1, 4], "j": [1, 2, 9], "sim": pa.array([0.7, 1.0, 0.62], pa.float32())}
    )
    write_table(dedup / "edges/00000.parquet", edges)
    write_npy(dedup / "components.npy", np.r_[0, 0, 0, -1, 4:9, 4, 10:N])
    write_json(
        dedup / "report.json", {"threshold": 0.6, "removed": 3, "warnings": ["too long a chain"]}
    )
    found = report.write_report(
        *(folder, x, tree), name="a <tiny> one", dedup=dedup, by="maker", groups=2
    )
    files = {path.name for path in folder.iterdir()}
    pictures = {"sizes.png", "lorenz.png", "scatter.png", "values.png"}
    pictures |= {"components.png", "similarities.png"}
    assert files == pictures | {
        *("samples.parquet", "rows.npy", "ids.txt", "report.json", "report.html")
    }
    assert json.loads((folder / "report.json").read_text())["by"] == found["by"]
    page = Page((folder / "report.html").read_text())
    shown = [base64.b64decode(source.partition("base64,")[2]) for source in page.pictures]
    assert all(source.startswith("data:image/") for source in page.pictures)
    for name in pictures:
        assert (folder / name).read_bytes() in shown
    assert "Curated sample: a <tiny> one" in page.texts and "<b>a&b</b>" in page.texts
    assert "(unknown)" in page.texts and "removed" in page.texts
    assert "too long a chain" in page.texts and "too long a chain" in found["warnings"]
    assert "largest: cluster 0, 8 rows" in page.texts
    assert "largest: component of row 0, 3 rows" in page.texts
    assert not re.search(r"(src|href)=\"(?!data:)", (folder / "report.html").read_text())


def test_pictures_need_images(x, tree, folder):
    from dataclasses import replace

    with pytest.raises(ValueError, match="does not say which images its rows are; set images=SPEC"):
        report.write_report(folder, replace(x, manifest={}), tree, name="s", groups=1)


# ---- the gallery ---------------------------------------------------------------------------------


def test_groups_of_clusters(tree):
    groups = gallery.cluster_groups(tree, 1)
    assert [group.title for group in groups] == [
        "largest: cluster 0, 8 rows",
        f"at random: {groups[1].title.split(': ')[1]}",
        "smallest: cluster 3, 2 rows",
    ]
    assert groups[1].title.endswith(("cluster 1, 6 rows", "cluster 2, 4 rows"))
    lowest = tree.levels[0]
    assert groups[0].rows.tolist() == sorted(range(8), key=lambda row: lowest.dist[row])
    titles = [group.title.split(": ")[1] for group in gallery.cluster_groups(tree, 3)]
    assert len(titles) == len(set(titles)) == 4


def test_groups_of_components():
    rows = np.array([3, 5, 8, 9, 12, 20])
    groups = gallery.component_groups(rows, np.array([3, 5, 3, 3, 5, 20]), 1)
    assert [group.rows.tolist() for group in groups] == [[3, 8, 9], [5, 12]]
    assert groups[0].title == "largest: component of row 3, 3 rows"


def test_a_sheet_shows_its_images_and_frames_the_chosen():
    source = open_source(SPEC)
    framed = np.arange(10) == 1
    sheet = pixels(gallery.sheet(source, list(range(10)), framed))
    side = gallery.TILE + 2 * gallery.FRAME + gallery.GAP
    assert sheet.shape == (2 * side - gallery.GAP, 8 * side - gallery.GAP, 3)
    middle = slice(gallery.FRAME, gallery.FRAME + gallery.TILE)
    large = Image.fromarray(source.image(9)).resize((gallery.TILE,) * 2, Image.Resampling.BICUBIC)
    tile = sheet[side:, side : 2 * side][middle, middle]
    assert np.abs(tile - np.asarray(large)).mean() < 8  # JPEG
    assert np.abs(sheet[40, side + 1] - gallery.CHOSEN).max() < 40
    assert sheet[40, 1].min() > 225  # not framed


# ---- plots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [[5], [3, 3, 3], [1] * 20 + [10_000], [0, 0, 7]])
def test_figures_of_odd_counts(pool):
    level = LevelCounts(1, np.array(pool), np.minimum(pool, 2))
    for draw in (plots.sizes, plots.lorenz):
        picture = pixels(draw([level] * 2))
        assert picture.shape[0] > 300 and (picture.min(axis=2) < 120).any()


def test_figures_of_many_clusters_and_levels():
    counts = (1e6 / np.arange(1, 200_001)).astype(np.int64)
    level = LevelCounts(1, counts, np.minimum(counts, 9))
    assert pixels(plots.sizes([level] * 4)).shape[0] > 600  # two rows of axes
    assert len(plots._thinned(200_000)) <= plots.POINTS
    assert plots.gini(counts) > 0.7 and plots.gini(np.array([2, 2])) == 0


def test_figures_of_constant_and_one_dimensional_data(x, tree):
    flat = np.zeros((20, 2), np.float32)
    assert pixels(plots.scatter(flat, flat[:3], "")).shape[1] > 600
    assert plots.values("c", {"a": 3}, {}) and plots.components(np.array([2, 1]))
    many = {f"value {k}": 1000 // (k + 1) for k in range(100)}
    assert pixels(plots.values("c", many, many)).shape[1] > 1000


def test_the_same_figure_is_the_same_file():
    level = LevelCounts(1, np.array([4, 2]), np.array([1, 1]))
    assert plots.sizes([level]) == plots.sizes([level])
