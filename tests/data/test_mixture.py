"""The closed form of (seed, step): exact shares, every record once a visit, the same everywhere."""

import json
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grain.experimental import index_shuffle
from scipy import stats

from dinojax.data import mixture as mixtures
from dinojax.data.mixture import Component, Mixture, as_mixture, counts, draw, open_mixture


@dataclass(frozen=True)
class Sized:
    """A source of which only the size is asked."""

    count: int
    classes = None

    def __len__(self):
        return self.count

    def encoded(self, i):
        raise NotImplementedError

    def image(self, i):
        raise NotImplementedError

    def name(self, i):
        return str(i)

    def label(self, i):
        return None

    def labels(self):
        return None


def mix(*parts):
    """(size, weight, homogeneous) of each component; they are called a, b, c, ..."""
    return Mixture(
        tuple(
            Component(name, Sized(size), weight, alone)
            for name, (size, weight, alone) in zip("abcdef", parts)
        )
    )


RECIPE = mix((4_000, 0.0, 0.1), (40_000, None, 0.0), (9_000, None, 0.0), (1_000, None, 0.0))


def test_a_single_source_is_what_it_always_was():
    """Record and visit of position step * batch + row, by the formula from before mixtures."""

    def formula(n, seed, position):
        visit, place = divmod(position, n)
        words = np.random.SeedSequence([seed, visit, 0, 3])
        order = int(words.generate_state(1)[0])
        return index_shuffle(place, max_index=n - 1, seed=order, rounds=4), visit

    for n, batch, seed in ((23, 8, 5), (1000, 64, 0), (70_001, 128, 1_000_003)):
        single = as_mixture(Sized(n))
        for step in (0, 1, 7, 999, 1000, 54_321):
            rows = single.rows(seed, step, batch)
            expected = [formula(n, seed, step * batch + row) for row in range(batch)]
            assert list(zip(rows.record.tolist(), rows.visit.tolist())) == expected
            assert not rows.component.any() and not rows.stream.any()
            assert single.kind(seed, step) is None


def test_pinned():
    """Numbers that a run in flight depends on; a numpy or grain that changes them is seen here."""
    assert [step for step in range(1200, 1250) if RECIPE.kind(3, step) == 0] == [1209, 1223, 1239]
    rows = RECIPE.rows(seed=3, step=12_345, batch=6)
    assert [column.tolist() for column in rows] == [
        [2, 1, 1, 1, 1, 1],
        [1812, 3471, 24807, 8627, 25705, 33987],
        [1, 1, 1, 1, 1, 1],
        [4, 2, 2, 2, 2, 2],
    ]
    rows = RECIPE.rows(seed=3, step=12_339, batch=6)
    assert rows.record.tolist() == [220, 1396, 1708, 1329, 3710, 195]
    assert set(rows.component) == {0} and set(rows.stream) == {1}


@pytest.mark.parametrize("batch", [16, 100])
def test_ratios_after_2000_steps(batch):
    """Within 1% of what is configured (they are exact up to one or two rows)."""
    seen, homogeneous = Counter(), 0
    for step in range(2000):
        kind = RECIPE.kind(7, step)
        homogeneous += kind is not None
        component = chosen(RECIPE, 7, step, batch)
        assert kind is None or set(component) == {kind}
        seen.update(component.tolist())
    assert homogeneous == 200
    expected = RECIPE.expected()
    assert expected == pytest.approx({"a": 0.1, "b": 0.72, "c": 0.162, "d": 0.018})
    for index, share in enumerate(expected.values()):
        assert seen[index] / (2000 * batch) == pytest.approx(share, rel=0.01)


def chosen(mixture, seed, step, batch):
    """The components of a batch without their records, which take the time."""
    (kind,), (earlier,) = draw(mixture.kinds, seed, mixtures.KINDS, 1000, step, step + 1)
    if kind < len(mixture.components):
        return np.full(batch, kind)
    first = int(earlier) * batch
    return draw(mixture.weights, seed, mixtures.ROWS, 4096, first, first + batch)[0]


def test_every_record_once_per_visit_of_its_stream():
    small = mix((200, 1.0, 0.25), (500, 2.0, 0.0), (300, 0.0, 0.25))
    visits = {}
    for step in range(300):
        rows = small.rows(1, step, 64)
        np.testing.assert_array_equal(rows.component, rows.stream // 2)
        alone = small.kind(1, step)
        assert set(rows.stream % 2) == {alone is not None}
        for stream, visit, record in zip(*map(np.ndarray.tolist, rows[:0:-1])):
            visits.setdefault((stream, visit), []).append(record)
    assert {stream for stream, _ in visits} == {0, 1, 2, 5}
    for stream in (0, 1, 2, 5):
        n = len(small.components[stream // 2].source)
        of_stream = [found for (s, _), found in sorted(visits.items()) if s == stream]
        assert len(of_stream) > 5
        for records in of_stream[:-1]:
            assert sorted(records) == list(range(n))
        assert len(set(of_stream[-1])) == len(of_stream[-1])  # the one that is not through
        assert len({tuple(records) for records in of_stream}) == len(of_stream)  # other orders


def test_no_record_meets_itself_in_a_batch():
    """Unless one visit ends and the next begins there."""
    for step in range(300):
        rows = RECIPE.rows(2, step, 64)
        if len({(s, v) for s, v in zip(rows.stream, rows.visit)}) == len(set(rows.stream)):
            assert len({(c, r) for c, r in zip(rows.component, rows.record)}) == 64


@pytest.mark.parametrize("parts", [2, 4])
def test_hosts_share_out_the_same_rows(parts):
    for step in (0, 5, 1003):
        whole, size = RECIPE.rows(4, step, 32), 32 // parts
        pieces = [RECIPE.rows(4, step, 32, k * size, (k + 1) * size) for k in range(parts)]
        for column, pieced in zip(whole, zip(*pieces)):
            np.testing.assert_array_equal(column, np.concatenate(pieced), strict=True)


def test_starting_anywhere_continues():
    """Without what was asked before: blocks are looked up, not replayed."""
    small = mix((40, 1.0, 0.3), (90, 1.0, 0.0))
    straight = [small.rows(9, step, 12) for step in range(1990, 2010)]  # over the ends of blocks
    for step in (2003, 1999, 2000):
        mixtures._block.cache_clear()
        for column, expected in zip(small.rows(9, step, 12), straight[step - 1990]):
            np.testing.assert_array_equal(column, expected)


def test_counting_the_draws_gives_the_counts():
    """`draw` tells how often each was chosen before; by counting, it is so."""
    shares = tuple(Fraction(k, 10) for k in (3, 0, 5, 2))
    choice, before = draw(shares, 0, 4, 100, 0, 1000)
    seen = Counter()
    for chosen, told in zip(choice.tolist(), before.tolist()):
        assert seen[chosen] == told
        seen[chosen] += 1
    assert seen == {0: 300, 2: 500, 3: 200}
    part, rank = draw(shares, 0, 4, 100, 250, 620)
    np.testing.assert_array_equal(part, choice[250:620])
    np.testing.assert_array_equal(rank, before[250:620])


def test_counts_never_fall_and_stay_near_their_shares():
    dice = np.random.default_rng(0)
    for _ in range(50):
        weights = [int(w) for w in dice.integers(0, 1000, dice.integers(1, 7))]
        weights[int(dice.integers(len(weights)))] += 1
        shares = tuple(Fraction(w, sum(weights)) for w in weights)
        before = [0] * len(shares)
        for n in sorted({0, 10**15, *(int(k) for k in dice.integers(0, 5000, 200))}):
            found = counts(shares, n)
            assert sum(found) == n
            assert all(a <= b for a, b in zip(before, found))
            assert all(abs(k - n * share) < len(shares) for k, share in zip(found, shares))
            assert all(k == 0 for k, share in zip(found, shares) if not share)
            before = found


def test_shares_are_meant_as_they_are_written():
    """0.57 of 1000 is 570, although 1000 * 0.57 is a little less as a float."""
    assert counts(mix((9, 0.0, 0.57), (9, None, 0.0)).kinds, 1000) == [570, 0, 430]
    third = mix((9, 0.0, 0.1), (9, 0.0, 0.2), (9, 0.0, 0.7))
    assert third.kinds[-1] == 0 and third.expected() == {"a": 0.1, "b": 0.2, "c": 0.7}


def test_homogeneous_steps_fall_anywhere():
    """Uniform over the places of a block, and with the gaps of a random order."""
    steps = np.arange(400_000)
    kind, _ = draw(RECIPE.kinds, 11, mixtures.KINDS, 1000, 0, len(steps))
    found = steps[kind == 0]
    assert len(found) == 40_000
    # 40 of 400 blocks at each place; drawing without replacement narrows the spread by 1 - p.
    places = np.bincount(found % 1000, minlength=1000)
    statistic = ((places - 40) ** 2 / 40).sum() / 0.9
    assert 0.001 < stats.chi2.sf(statistic, 999) < 0.999
    gaps = np.bincount(np.minimum(np.diff(found), 40), minlength=41)[1:]
    chances = 0.1 * 0.9 ** np.arange(40)
    chances[-1] = 0.9**39
    assert stats.chisquare(gaps, chances * gaps.sum()).pvalue > 0.001
    other, _ = draw(RECIPE.kinds, 12, mixtures.KINDS, 1000, 0, len(steps))
    assert abs(np.mean(other[kind == 0] == 0) - 0.1) < 0.01  # another seed, other places


def test_whole_mixtures_of_homogeneous_batches():
    only = mix((30, None, 0.5), (30, None, 0.5))
    assert {only.kind(0, step) for step in range(1000)} == {0, 1}


@pytest.mark.parametrize(
    ("parts", "batch", "words"),
    [
        (((7, None, 0.0),), 8, "the source has 7 images, the batch needs 8; nearest: batch_size=7"),
        (((99, 3.0, 0.0), (9, 1.0, 0.0)), 40, "component 'b' has 9 .* the batch needs 10.*size=36"),
        (((9, 0.0, 0.1), (99, 1.0, 0.0)), 16, "'a' has 9 .* a homogeneous batch needs 16.*size=9"),
        (((99, 3.0, 0.0), (9, 1.0, 0.0)), 36, None),
        (((2, None, 0.0), (999, 0.0, 1.0)), 900, None),  # there are no heterogeneous batches
    ],
)
def test_components_must_fill_their_part_of_a_batch(parts, batch, words):
    if words is None:
        mix(*parts).validate(batch)
    else:
        with pytest.raises(ValueError, match=words):
            mix(*parts).validate(batch)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (((9, -1.0, 0.0), (9, 1.0, 0.0)), "'a' has the weight -1.0; expected a number from 0 on"),
        (((9, float("nan"), 0.0),), "weight nan"),
        (((9, None, 1.5),), "'a' has the homogeneous probability 1.5; expected 0 to 1"),
        (((9, None, 0.6), (9, None, 0.6)), "sum to 1.2; expected at most 1"),
        (((9, 0.0, 0.3), (9, 0.0, 0.2)), "no component has a weight above 0, but 0.5 of the"),
        ((), "no component has a weight"),
    ],
)
def test_numbers_that_cannot_be(parts, words):
    with pytest.raises(ValueError, match=words) as caught:
        mix(*parts)
    assert "\n" not in str(caught.value)


def test_names():
    part = Component("a", Sized(9))
    with pytest.raises(ValueError, match="2 components are called 'a'"):
        Mixture((part, part))
    with pytest.raises(ValueError, match="called 'a b'; expected letters"):
        Mixture((Component("a b", Sized(9)),))


def test_weights_beside_sizes():
    """A weight counts like a number of images."""
    assert mix((30, None, 0.0), (500, 10.0, 0.0)).expected() == {"a": 0.75, "b": 0.25}


def test_in_words():
    assert mix((30, 1.0, 0.0), (20, 3.0, 0.1)).describe() == (
        "data: a 22.5% of the rows, b 77.5% of the rows (10% of the batches are of it alone)"
    )


def test_opened_from_parts():
    found = open_mixture("", [("a", "scenes:30", None, 0.0), ("b", "scenes:20", None, 0.25)])
    assert [(p.name, len(p.source)) for p in found.components] == [("a", 30), ("b", 20)]
    assert found.expected() == pytest.approx({"a": 0.45, "b": 0.55})
    with pytest.raises(ValueError, match="sum to 1.2"):  # before anything is opened
        open_mixture("", [("a", "nowhere:", None, 0.6), ("b", "nowhere:", None, 0.6)])
    with pytest.raises(ValueError, match="component 'b': .*'scene'.*did you mean 'scenes'"):
        open_mixture("", [("a", "scenes:30", None, 0.0), ("b", "scene:20", None, 0.0)])
    (only,) = open_mixture("scenes:30").components
    assert len(only.source) == 30


def test_opened_from_what_data_curation_wrote(tmp_path):
    for name, rows in (("web", [3, 1, 4]), ("in1k", [5, 9])):
        (tmp_path / name).mkdir()
        table = pa.table({"row": rows, "count": [2] * len(rows)})
        table = table.replace_schema_metadata({"source": "scenes:50"})
        pq.write_table(table, tmp_path / name / "samples.parquet")
    parts = [{"name": n, "samples": f"{n}/samples.parquet", "n": 1} for n in ("web", "in1k")]
    written = {
        "version": 1,
        "seed": 65537,
        "components": parts,
        "homogeneous": [{"component": "in1k", "probability": 0.1}],
        "heterogeneous": {"components": ["web"], "weights": "size"},
    }
    (tmp_path / "mixture.json").write_text(json.dumps(written))
    found = open_mixture(f"curated:{tmp_path}/mixture.json")
    assert [(p.name, len(p.source)) for p in found.components] == [("web", 6), ("in1k", 4)]
    assert found.expected() == pytest.approx({"web": 0.9, "in1k": 0.1})
    one = open_mixture(f"curated:{tmp_path}/mixture.json?component=in1k")
    assert [len(p.source) for p in one.components] == [4]
