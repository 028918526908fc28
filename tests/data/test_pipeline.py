"""The order of images as a function of (seed, step), and the batches that come out of it."""

import io
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

from dinojax.data.decode import UnreadableImage
from dinojax.data.masking import Masks
from dinojax.data.multicrop import Crops, views
from dinojax.data.pipeline import Batches, validate
from dinojax.data.sources import open_source

CROPS = (
    Crops(16, 8, locals=2),
    Crops(24, 8, 32, locals=2),
    Crops(16, 8, 24, 2, no_distortions=False),
)


@dataclass(frozen=True)
class Numbered:
    """Image k is a flat grey of k; those in `broken` cannot be read."""

    count: int = 23
    broken: tuple[int, ...] = ()
    classes = None

    def __len__(self):
        return self.count

    def encoded(self, i):
        raise NotImplementedError

    def image(self, i):
        if i in self.broken:
            raise UnreadableImage(f"{self.name(i)}: broken")
        return np.full((12, 15, 3), i, np.uint8)

    def name(self, i):
        return f"image{i}"

    def label(self, i):
        return None

    def labels(self):
        return None


def make(source=None, crops=CROPS[:1], **kwargs):
    settings = {
        "source": source or Numbered(),
        "crops": crops,
        "probabilities": (1.0,) * len(crops),
        "masks": Masks(patch=4),
        "batch": 8,
        "group": 2,
        "seed": 5,
    }
    return Batches(**(settings | kwargs))


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
    assert batch["triple"] == 0 and batch["replaced"] == 0
    assert batch["groups"].tolist() == [0, 1, 2, 3]
    flat = batch["masks"].reshape(4, -1)
    for row in range(4):
        np.testing.assert_array_equal(batch["mask_indices"][row], np.flatnonzero(flat[row]))


def test_every_record_once_per_visit():
    batches = make()
    for visit in range(3):
        found = batches.records(range(23 * visit, 23 * visit + 23))
        assert sorted(found) == [(k, visit) for k in range(23)]
    orders = [tuple(r for r, _ in batches.records(range(23 * v, 23 * v + 23))) for v in range(4)]
    other = tuple(r for r, _ in make(seed=6).records(range(23)))
    assert len({*orders, other}) == 5


def test_a_row_is_its_record_s_view_of_this_visit():
    """Position 8 * step + row; the row's draws depend on (seed, record, visit) alone."""
    batches = make()
    for step in (0, 2, 7):
        batch = batches.at(step)
        for row, (record, visit) in enumerate(batches.records(range(8 * step, 8 * step + 8))):
            rng = np.random.default_rng([5, record, visit])
            assert batch["seeds"][row] == rng.integers(2**32, dtype=np.uint32)
            expected = views(batches.source.image(record), rng, CROPS[0])
            np.testing.assert_array_equal(batch["global_crops"][row], expected["global_crops"])
            np.testing.assert_array_equal(batch["local_crops"][row], expected["local_crops"])


@pytest.mark.parametrize("threads", [0, 3])
def test_a_stream_from_any_step_gives_the_same_batches(threads):
    batches = make(crops=CROPS, probabilities=(0.3, 0.4, 0.3))
    for start in (0, 4):
        with batches.stream(start, threads=threads) as stream:
            for step in range(start, start + 5):
                assert_same(next(stream), batches.at(step))
    with pytest.raises(ValueError, match="closed"):
        next(stream)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_out_the_same_global_batch(hosts):
    whole = make(crops=CROPS, probabilities=(0.3, 0.4, 0.3))
    parts = [replace(whole, host=(h, hosts)) for h in range(hosts)]
    for step in range(4):
        expected, found = whole.at(step), [part.at(step) for part in parts]
        assert {part["triple"] for part in found} == {expected["triple"]}
        for key in expected.keys() - {"triple", "replaced"}:
            joined = np.concatenate([part[key] for part in found])
            np.testing.assert_array_equal(joined, expected[key], err_msg=key, strict=True)


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


def test_unreadable_images_are_replaced_by_the_next_and_counted():
    whole, broken = make(), make(Numbered(broken=(3, 4, 22)))
    tried = {3: (3, 4), 4: (4,), 22: (22,)}  # unreadable images met at a record
    with broken.stream(threads=2) as stream:
        names = []
        for step in range(6):
            batch, found = next(stream), whole.records(range(8 * step, 8 * step + 8))
            met = [k for record, _ in found for k in tried.get(record, ())]
            assert batch["replaced"] == len(met)
            names += [f"image{k}" for k in met]
            for row, (record, _) in enumerate(found):
                instead = {3: 5, 4: 5, 22: 0}.get(record, record)
                assert (batch["global_crops"][row] == instead).all()
            # Draws belong to the row, not to the image that stands in.
            np.testing.assert_array_equal(batch["seeds"], whole.at(step)["seeds"])
        assert stream.replaced == Counter(names) and len(names) >= 6


def test_nothing_readable_ends_in_a_sentence():
    batches = make(Numbered(broken=tuple(range(23))))
    with pytest.raises(ValueError, match="23 images in a row cannot be read, the last: image"):
        batches.at(0)
    with batches.stream(threads=2) as stream, pytest.raises(ValueError, match="cannot be read"):
        next(stream)


def test_worker_processes_give_the_same_batches(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(10):
        image = Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8))
        data = io.BytesIO()
        image.save(data, "JPEG")
        kept = data.getvalue()[: 300 if k == 4 else None]
        (tmp_path / f"{k}.jpg").write_bytes(kept)
    batches = make(open_source(f"folder:{tmp_path}"), crops=CROPS[:2])
    with batches.stream(1, workers=2) as stream:
        for step in range(1, 6):
            assert_same(next(stream), batches.at(step))
    assert stream.replaced.keys() == {"4.jpg"}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"source": Numbered(7)}, "has 7 images, the batch needs 8; nearest: batch_size=7"),
        ({"batch": 9}, "9 images is not whole groups of 2 on each of 1 hosts.*batch_size=8"),
        ({"host": (0, 3)}, "nearest: batch_size=6"),
        ({"probabilities": (0.5, 0.5)}, "1 crop sizes have the probabilities"),
        ({"probabilities": (-1.0,)}, "expected one non-negative number for each"),
    ],
)
def test_impossible_settings(kwargs, words):
    with pytest.raises(ValueError, match=words):
        make(**kwargs)


def test_validate():
    validate(Numbered(8), 8)
    with pytest.raises(ValueError, match="7 images, the batch needs 8"):
        validate(Numbered(7), 8)
