"""The order of images as a function of (seed, step), and the batches that come out of it."""

import io
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

from dinojax.data.decode import UnreadableImage
from dinojax.data.masking import Masks
from dinojax.data.mixture import Component, Mixture
from dinojax.data.multicrop import Crops, views
from dinojax.data.pipeline import GIVE_UP, Batches
from dinojax.data.sources import open_source

CROPS = (
    Crops(16, 8, locals=2),
    Crops(24, 8, 32, locals=2),
    Crops(16, 8, 24, 2, no_distortions=False),
)


@dataclass(frozen=True)
class Numbered:
    """Image k is a flat grey of first + k; those in `broken` cannot be read."""

    count: int = 23
    broken: tuple[int, ...] = ()
    first: int = 0
    bands: int = 3
    classes = None

    def __len__(self):
        return self.count

    def encoded(self, i):
        raise NotImplementedError

    def image(self, i):
        if i in self.broken:
            raise UnreadableImage(f"{self.name(i)}: broken")
        return np.full((12, 15, self.bands), (self.first + i) % 256, np.uint8)

    def name(self, i):
        return f"image{i}"

    def label(self, i):
        return None

    def labels(self):
        return None


def make(source=None, crops=CROPS[:1], **kwargs):
    settings = {
        "mixture": source or Numbered(),
        "crops": crops,
        "probabilities": (1.0,) * len(crops),
        "masks": Masks(patch=4),
        "batch": 8,
        "group": 2,
        "seed": 5,
    }
    return Batches(**(settings | kwargs))


def mixed(first=None):
    """Greys below 100 are of component a, others of b; three batches in ten are of a alone."""
    return Mixture(
        (
            Component("a", first or Numbered(17), 1.0, 0.3),
            Component("b", Numbered(31, first=100), 2.0),
        )
    )


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key, strict=True)


def test_shapes_and_dtypes():
    batch = make(crops=CROPS[1:2]).at(3)
    slots = Masks(patch=4).slots(4, 24)
    assert {
        k: (v.shape, v.dtype.name) for k, v in batch.items() if k not in ("triple", "replaced")
    } == {
        "global_crops": ((8, 2, 24, 24, 3), "uint8"),
        "local_crops": ((8, 2, 8, 8, 3), "uint8"),
        "gram_crops": ((8, 2, 32, 32, 3), "uint8"),
        "masks": ((8, 2, 36), "bool"),
        "mask_indices": ((4, slots), "int32"),
        "mask_weights": ((4, slots), "float32"),
        "seeds": ((8,), "uint32"),
        "groups": ((4,), "int32"),
    }
    assert batch["triple"] == 0 and batch["replaced"] == ()
    assert batch["groups"].tolist() == [0, 1, 2, 3]
    flat = batch["masks"].reshape(4, -1)
    for row in range(4):
        np.testing.assert_array_equal(batch["mask_indices"][row], np.flatnonzero(flat[row]))


def test_a_row_is_its_record_s_view_of_this_visit():
    """Position 8 * step + row; the row's draws depend on (seed, record, visit) alone."""
    batches = make()
    for step in (0, 2, 7):
        batch, rows = batches.at(step), batches.mixture.rows(5, step, 8)
        for row, (record, visit) in enumerate(zip(rows.record.tolist(), rows.visit.tolist())):
            rng = np.random.default_rng([5, record, visit])
            assert batch["seeds"][row] == rng.integers(2**32, dtype=np.uint32)
            expected = views(Numbered().image(record), rng, CROPS[0])
            np.testing.assert_array_equal(batch["global_crops"][row], expected["global_crops"])
            np.testing.assert_array_equal(batch["local_crops"][row], expected["local_crops"])


@pytest.mark.parametrize("threads", [0, 3])
def test_a_stream_from_any_step_gives_the_same_batches(threads):
    batches = make(mixed(), crops=CROPS, probabilities=(0.3, 0.4, 0.3))
    for start in (0, 4):
        with batches.stream(start, threads=threads) as stream:
            for step in range(start, start + 5):
                assert_same(next(stream), batches.at(step))
    with pytest.raises(ValueError, match="closed"):
        next(stream)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_out_the_same_global_batch(hosts):
    whole = make(mixed(), crops=CROPS, probabilities=(0.3, 0.4, 0.3))
    parts = [replace(whole, host=((h,), hosts)) for h in range(hosts)]
    for step in range(4):
        expected, found = whole.at(step), [part.at(step) for part in parts]
        assert {part["triple"] for part in found} == {expected["triple"]}
        for key in expected.keys() - {"triple", "replaced"}:
            joined = np.concatenate([part[key] for part in found])
            np.testing.assert_array_equal(joined, expected[key], err_msg=key, strict=True)


def test_a_host_may_hold_rows_that_are_not_in_one_run():
    """Of a TPU slice of 4 x 4 chips, hosts hold blocks of 2 x 2."""
    whole = make(batch=16, group=2)
    part = replace(whole, host=((1, 3), 4)).at(3)
    for key, value in whole.at(3).items():
        if isinstance(value, np.ndarray):
            quarters = np.split(value, 4)
            wanted = np.concatenate([quarters[1], quarters[3]])
            np.testing.assert_array_equal(part[key], wanted, err_msg=key)


def test_masks_differ_between_groups_and_steps():
    batches = make(batch=16, group=4)
    masks = [m.tobytes() for step in range(3) for m in batches.at(step)["masks"].reshape(4, -1)]
    assert len(set(masks)) == 12


def test_triples_come_with_their_probabilities():
    batches = make(crops=CROPS, probabilities=(3.0, 6.0, 1.0))
    counts = Counter(batches.triple(step) for step in range(3000))
    np.testing.assert_allclose([counts[k] / 3000 for k in range(3)], (0.3, 0.6, 0.1), atol=0.03)
    assert {make(crops=CROPS, probabilities=(0.0, 1.0, 0.0)).triple(s) for s in range(50)} == {1}
    assert "global_crops" not in make(crops=CROPS, probabilities=(0.0, 0.0, 1.0)).at(0)


def test_unreadable_images_are_replaced_and_told():
    """By images of the same component; everything else of the batch stays."""
    dead = tuple(range(3, 12))  # more than half of a: its neighbours are dead too
    whole, broken = make(mixed()), make(mixed(Numbered(17, dead)))
    with broken.stream(threads=2) as stream:
        names, instead = Counter(), set()
        for step in range(12):
            batch, rows = next(stream), whole.mixture.rows(5, step, 8)
            assert_same(batch, broken.at(step))
            names.update(failure.name for failure in batch["replaced"])
            assert {failure.reason for failure in batch["replaced"]} <= {"broken"}
            greys = batch["global_crops"][:, 0, 0, 0, 0].tolist()
            for component, record, grey in zip(rows.component, rows.record, greys):
                if component == 0 and record in dead:
                    assert grey < 17 and grey not in dead
                    instead.add(int(grey - record))
                    assert names[f"a: image{record}"]
                else:
                    assert grey == 100 * component + record
            # Draws and masks belong to the row, not to the image that stands in.
            for key in ("seeds", "masks"):
                np.testing.assert_array_equal(batch[key], whole.at(step)[key])
        assert stream.replaced == names and len(instead) > 5
        assert names.keys() <= {f"a: image{k}" for k in dead}


def test_replacements_are_a_function_of_the_step_too():
    broken = make(Numbered(23, tuple(range(0, 23, 2))))
    with broken.stream(4, threads=3) as stream:
        found = next(stream)
        assert found["replaced"]
        assert_same(found, broken.at(4))


def test_files_deleted_in_mid_run(tmp_path):
    """The run goes on with what is left, and tells what is not."""
    for k in range(40):
        Image.fromarray(np.full((12, 15, 3), k, np.uint8)).save(tmp_path / f"{k:02d}.png")
    with make(open_source(f"folder:{tmp_path}")).stream(threads=2, prefetch=1) as stream:
        assert next(stream)["replaced"] == ()
        for k in range(10, 35):
            (tmp_path / f"{k:02d}.png").unlink()
        next(stream)  # was being prepared meanwhile
        for _ in range(8):
            batch = next(stream)
            greys = batch["global_crops"][:, 0, 0, 0, 0]
            assert ((greys < 10) | (greys >= 35)).all()
        assert 20 <= len(stream.replaced) <= 25  # a whole visit has gone by
        assert stream.replaced.keys() <= {f"{k}.png" for k in range(10, 35)}


def test_images_with_other_bands_count_as_unreadable():
    odd = Mixture((Component("odd", Numbered(9, bands=4)), Component("even", Numbered(99))))
    with pytest.raises(UnreadableImage, match="the last: odd: image.: has 4 bands, expected 3"):
        [make(odd).at(step) for step in range(20)]
    batch = make(Numbered(9, bands=5), channels=5).at(0)
    assert batch["global_crops"].shape == (8, 2, 16, 16, 5) and batch["replaced"] == ()


def test_nothing_readable_ends_in_a_sentence():
    batches = make(Numbered(broken=tuple(range(23))))
    sentence = f"{GIVE_UP} images in a row cannot be read, the last: image.*: broken"
    with pytest.raises(UnreadableImage, match=sentence):
        batches.at(0)
    with batches.stream(threads=2) as stream, pytest.raises(ValueError, match="cannot be read"):
        next(stream)


def test_a_stream_tells_what_it_saw():
    batches, seen = make(mixed()), Counter()
    with batches.stream(10, threads=2) as stream:
        for step in range(10, 40):
            greys = next(stream)["global_crops"][:, 0, 0, 0, 0]
            seen.update("b" if grey >= 100 else "a" for grey in greys.tolist())
            alone = batches.mixture.kind(5, step) == 0
            assert stream.kind == ("a" if alone else "mixed")
            assert not alone or (greys < 100).all()
        assert stream.rows == seen and seen.total() == 240
        rows = {"rows_a": seen["a"] / 240, "rows_b": seen["b"] / 240}
        assert stream.shares() == rows | {"batch": "a" if alone else "mixed"}
    with make().stream(threads=0) as stream:
        next(stream)
        assert stream.shares() == {}  # nothing to tell of a single source


def test_streams_of_a_component_draw_crops_of_their_own():
    """An image's first visits, homogeneous and heterogeneous, are not cropped alike."""
    batches, seeds = make(mixed(), batch=16), {}
    for step in range(40):
        rows, batch = batches.mixture.rows(5, step, 16), batches.at(step)
        for key in zip(*(c.tolist() for c in rows), batch["seeds"].tolist()):
            seeds[key[:-1]] = key[-1]
    assert {stream for _, _, _, stream in seeds} == {0, 1, 2}
    assert len(set(seeds.values())) == len(seeds)


def test_memory_is_bounded():
    """At most a decoded image a thread, and no more groups ahead than asked for."""
    live, most, lock, read = set(), [0], threading.Lock(), Counter()

    class Watched(Numbered):
        def image(self, i):
            image = super().image(i)
            key = object()
            with lock:
                live.add(key)
                read["images"] += 1
                most[0] = max(most[0], len(live))
            weakref.finalize(image, live.discard, key)
            return image

    batches = make(Watched(5000), batch=32, group=4)
    for threads, prefetch in ((3, 2), (20, 1)):
        most[0], read["images"] = 0, 0
        with batches.stream(threads=threads, prefetch=prefetch) as stream:
            for step in range(1, 6):
                next(stream)
                ahead = read["images"] - 32 * step
                assert ahead <= 4 * max(threads, 8 * prefetch)
        assert 1 <= most[0] <= threads


def test_worker_processes_give_the_same_batches(tmp_path):
    """And another number of them goes on in mid-epoch with exactly the right images."""
    rng = np.random.default_rng(0)
    for k in range(16):
        image = Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
        data = io.BytesIO()
        image.save(data, "JPEG")
        kept = data.getvalue()[: 300 if k == 4 else None]
        (tmp_path / f"{k:02d}.jpg").write_bytes(kept)
    files, scenes = open_source(f"folder:{tmp_path}"), open_source("scenes:40?size=24")
    mixture = Mixture((Component("files", files, 1.0, 0.3), Component("scenes", scenes, 1.0)))
    batches = make(mixture, crops=CROPS, probabilities=(0.3, 0.4, 0.3))
    seen = Counter()
    for start, workers in ((1, 2), (5, 1), (7, 0)):
        with batches.stream(start, workers=workers) as stream:
            for step in range(start, start + (4 if workers == 2 else 2)):
                batch = next(stream)
                assert_same(batch, batches.at(step))
                seen.update(failure.name for failure in batch["replaced"])
    assert seen.keys() == {"files: 04.jpg"}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"source": Numbered(7)}, "has 7 images, the batch needs 8; nearest: batch_size=7"),
        ({"source": mixed(Numbered(5))}, "component 'a' has 5 images, a homogeneous batch needs 8"),
        ({"batch": 9}, "9 images is not whole groups of 2 in each of 1 equal parts.*batch_size=8"),
        ({"host": ((0,), 3)}, "nearest: batch_size=6"),
        ({"probabilities": (0.5, 0.5)}, "1 crop sizes have the probabilities"),
        ({"probabilities": (-1.0,)}, "expected one non-negative number for each"),
    ],
)
def test_impossible_settings(kwargs, words):
    with pytest.raises(ValueError, match=words):
        make(**kwargs)
