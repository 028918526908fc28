"""The deterministic parts of batch assembly, and where masks lie (item 9 of the vectors' README).

The reference is crop-major (all first crops, then all second ones), we are image-major: rows are
transposed here.
"""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import vectors

from dinojax.data.masking import (
    Masks,
    block_mask,
    group_masks,
    mask_counts,
    mask_positions,
    mask_slots,
)
from dinojax.data.multicrop import Crops
from dinojax.data.pipeline import Batches

SAMPLES = 1500


@vectors.cases("collate", sub=lambda case: case.matching(r"ratio[^/]*(?=/frequency)"))
def test_how_often_each_patch_is_masked(case, sub):
    """Two samples of 1,500 masks each: within 5 standard deviations of their difference."""
    expected = case[f"{sub}/frequency"]
    target = int(expected.size * float(sub.removeprefix("ratio")))
    masks = [block_mask(random.Random(k), expected.shape, target) for k in range(SAMPLES)]
    frequency = np.mean(masks, axis=0)
    smoothed = (expected * SAMPLES + 1) / (SAMPLES + 2)  # a patch never masked may yet be
    bound = 5 * np.sqrt(2 * smoothed * (1 - smoothed) / SAMPLES)
    assert (np.abs(frequency - expected) <= bound).all()
    assert frequency.mean() == pytest.approx(float(expected.mean()), abs=1e-6)


def rows_only(case):
    return ["rows"] if "masks" in case else []


@vectors.cases("collate", sub=rows_only)
def test_counts_indices_and_weights(case, sub):
    meta, masks = case.meta, case["masks"]
    rows, patches = masks.shape
    settings = (meta["prob"], tuple(meta["ratio"]))
    counts = mask_counts(rows, patches, *settings)
    np.testing.assert_array_equal(sorted(counts), case["sorted_counts"])
    slots = mask_slots(rows, tuple(meta["grid"]), *settings)
    assert slots == case["upperbound"] == case["n_masked_patches"]

    # The reference's own masks give its own indices and weights (order of rows as given) ...
    indices, weights = mask_positions(masks)
    np.testing.assert_array_equal(indices, case["mask_indices_list"])
    np.testing.assert_array_equal(weights, case["masks_weight"])
    # ... and ours have its counts.
    shift = bool(meta.get("shift", False))
    drawn = group_masks(np.random.default_rng(0), rows, tuple(meta["grid"]), *settings, shift)
    np.testing.assert_array_equal(np.sort(drawn.sum(1)), case["sorted_counts"])


@dataclass(frozen=True)
class Numbered:
    """Image k is flat grey k."""

    count: int
    classes = None

    def __len__(self):
        return self.count

    def encoded(self, i):
        raise NotImplementedError

    def image(self, i):
        return np.full((4, 4, 3), i, np.uint8)

    def name(self, i):
        return str(i)

    def label(self, i):
        return None

    def labels(self):
        return None


@vectors.cases("collate", sub=rows_only)
def test_order_of_crops(case, sub):
    """order_* hold 100 * crop + sample (local crops + 1000): ours, transposed, is that order."""
    b, v = case.meta["batch"], case.meta["local_crops"]
    crops = Crops(4, 2, locals=v)
    batches = Batches(Numbered(b), (crops,), (1.0,), Masks(patch=2), b, b, seed=0)
    batch = batches.at(0)
    sample = batches.mixture.rows(0, 0, b).record
    for name, order, first in (
        ("global_crops", "order_global", 0),
        ("local_crops", "order_local", 1000),
    ):
        rows = batch[name][..., 0, 0, 0].reshape(-1)  # b v i j c -> (b v), image-major
        views = len(rows) // b
        crop_major = rows.reshape(b, views).T.reshape(-1)  # (b v) -> (v b)
        place = np.argsort(sample)[crop_major]  # record -> row of the batch
        got = first + 100 * np.repeat(np.arange(views), b) + place
        np.testing.assert_array_equal(got, case[order])
