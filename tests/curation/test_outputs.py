"""Every kind of stage on planted data: leaked and repeated rows go, seed sets find their like."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_curation import __main__ as cli
from data_curation.files import read_json
from data_curation.points import RINGS, draw_rings, write_points
from dinojax.data.mixture import open_mixture
from tests.curation.sets import write_set

ROWS, GROUPS = 400, 16
TWICE, LEAKED = (30, 390), (50, 51)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pool of groups with a pair of equal rows, evaluation rows in it, seed sets, a run."""
    folder, rng = tmp_path_factory.mktemp("outputs"), np.random.default_rng(0)
    centres = rng.standard_normal((GROUPS, 8))
    group = rng.integers(0, GROUPS, ROWS)
    x = (centres[group] + 0.2 * rng.standard_normal((ROWS, 8))).astype(np.float32)
    x[TWICE[1]] = x[TWICE[0]]
    columns = {"id": np.arange(ROWS) + 1000, "license": np.where(group == 3, "no", "yes")}
    write_set(folder / "pool", x, columns, shard_rows=150, source=f"scenes:{ROWS}?size=16")
    np.save(folder / "eval.npy", x[list(LEAKED)] + 1e-5)
    np.save(folder / "seeds.npy", np.repeat(x[group == 5][:1], 6, axis=0))
    config = folder / "config.py"
    config.write_text(f"""
from data_curation import config as c

def get_config():
    config = c.base()
    config.embeddings = "{folder}/pool"
    config.workdir = "{folder}/run"
    config.index.license_deny = ("no",)
    config.dedup.update(
        threshold=0.99999, reference_threshold=0.99999, references=("{folder}/eval.npy",)
    )
    config.cluster.levels = (c.level({GROUPS}), c.level(4))
    config.sample = (c.sample("even", 60),)
    config.retrieve = (
        c.seed_set("near", "{folder}/seeds.npy", n=5),
        c.seed_set("level", "{folder}/seeds.npy", mode="cluster", level=1, per_cluster=8),
        c.seed_set("own", "{folder}/seeds.npy", mode="cluster", clusters={GROUPS}, min_queries=3),
    )
    config.mix.components = (
        c.component("even", weight=3.0),
        c.component("near", weight=7.0),
        c.component("level", weight=2.0, homogeneous=0.1),
    )
    config.report.by = "license"
    config.export.format = "npy"
    return config
""")
    assert cli.main(["run", "--config", str(config)]) == 0
    return SimpleNamespace(folder=folder, run=folder / "run", config=config, group=group, x=x)


def test_what_may_not_be_used_is_gone(made):
    usable, kept = (np.load(made.run / name) for name in ("subset.npy", "dedup/relative/kept.npy"))
    np.testing.assert_array_equal(usable, np.flatnonzero(made.group != 3))
    gone = set(usable) - set(kept)
    assert gone == {row for row in (TWICE[1], *LEAKED) if made.group[row] != 3} and len(gone) >= 2
    rows = np.load(made.run / "samples" / "even" / "rows.npy")
    assert len(rows) == 60 and set(rows) <= set(kept)
    facts = read_json(made.run / "run.json")["stages"]["dedup"]["facts"]
    assert facts["rows"] == len(kept)


def test_seed_sets_find_their_like(made):
    near = pq.read_table(made.run / "retrieval" / "near" / "retrieved.parquet")
    assert near["count"].to_pylist() == [6] * 5  # six equal queries, five neighbours
    assert set(made.group[near["row"].to_numpy()]) == {5} and near["sim"].to_numpy().max() > 0.999
    assert {*near["mode"].to_pylist()} == {"sample"} and near["id"][0].as_py() >= 1000
    for name, most in (("level", 8), ("own", ROWS)):
        table = pq.read_table(made.run / "retrieval" / name / "retrieved.parquet")
        assert 0 < len(table) <= most and len({*table["cluster"].to_pylist()}) == 1
        assert np.mean(made.group[table["row"].to_numpy()] == 5) > 0.5
    shared = read_json(made.run / "retrieval" / "overlap.json")
    assert shared["near"]["near"] == 5 and shared["near"]["level"] == shared["level"]["near"]
    assert not (made.run / "retrieval" / ".kmeans" / "own").exists()


def test_training_reads_the_mixture(made):
    mixture = open_mixture(f"curated:{made.run / 'mixture.json'}")
    names = {part.name: part for part in mixture.components}
    assert [*names] == ["even", "near", "level"] and names["near"].weight == 7
    assert names["level"].homogeneous == 0.1 and len(names["even"].source) == 60
    assert names["even"].source.image(0).shape == (16, 16, 3)


def test_exports_and_reports_are_there(made):
    for name in ("even", "near", "level", "own"):
        assert (made.run / "export" / name / "rows.npy").exists()
    report = json.loads((made.run / "samples" / "even" / "report.json").read_text())
    assert report["by"]["sample"] == {"yes": 60}
    told = read_json(made.run / "retrieval" / "near" / "provenance.json")
    assert [one["name"] for one in told["stages"]] == ["index", "dedup", "cluster", "retrieve/near"]


def test_a_mixture_of_other_weights_is_made_again_at_once(made, capsys):
    words = ["run", "--config", str(made.config), "mix.components[1].weight=3"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "mix: even" in out and "cluster: done before" in out and "report: done before" in out


def test_a_seed_set_that_finds_nothing(made, capsys):
    words = ["retrieve", "--config", str(made.config), "retrieve[1].name=none"]
    words += ["retrieve[1].min_queries=6", "mix.components=()"]
    assert cli.main(words) == 1
    assert "no cluster holds more than 6 of its 6 rows" in capsys.readouterr().err


def test_rings(tmp_path):
    points, ring = draw_rings(0)
    np.testing.assert_array_equal(np.bincount(ring), [20_000, 200, 1000, 500, 8000])
    for number, (x, y, _) in enumerate(RINGS):
        radius = np.hypot(*(points[ring == number] - (x, y)).T)
        assert radius.min() >= 0.699 and radius.max() <= 1.001
    assert write_points("normal:70000x3", tmp_path, "float16", 1, lambda: False) == 70_000
    assert len([*tmp_path.glob("emb-*.parquet")]) == 2
