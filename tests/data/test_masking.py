"""Block masks: exact counts, the block rule drawn for drawn, positions and weights."""

import math
import random

import numpy as np
import pytest

from dinojax.data.masking import (
    Masks,
    block_mask,
    group_masks,
    mask_counts,
    mask_positions,
    mask_slots,
    place_blocks,
)


def reference_blocks(draw, grid, target):
    """Spec section 4, step 1, with a numpy mask and the same stream of uniform numbers."""
    height, width = grid
    mask, added = np.zeros(grid, bool), []
    while sum(added) < target:
        rem = min(target - sum(added), (height // 2) * width)
        found = False
        for _ in range(10):
            area = 4 + (rem - 4) * draw.random()
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * draw.random())
            bh, bw = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if bw < width and bh < height:
                top = math.floor(draw.random() * (height - bh + 1))
                left = math.floor(draw.random() * (width - bw + 1))
                new = bh * bw - mask[top : top + bh, left : left + bw].sum()
                if 0 < new <= rem:
                    mask[top : top + bh, left : left + bw] = True
                    added.append(int(new))
                    found = True
                    break
        if not found:
            break
    return mask, added


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (5, 9), (3, 2)])
def test_blocks_follow_the_rule_draw_for_draw(grid):
    cells = grid[0] * grid[1]
    for seed in range(60):
        target = int(cells * (0.1 + 0.4 * seed / 59))
        bits, added = place_blocks(random.Random(seed), grid, target)
        mask, expected = reference_blocks(random.Random(seed), grid, target)
        assert added == expected
        assert [bits >> k & 1 for k in range(cells)] == mask.ravel().astype(int).tolist()


@pytest.mark.parametrize("grid", [(14, 14), (2, 3), (1, 1), (32, 32)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_mask_has_exactly_the_asked_for_patches(grid, share):
    target = int(grid[0] * grid[1] * share)
    for seed in range(10):
        assert block_mask(random.Random(seed), grid, target).sum() == target


def test_fill_leaves_no_cell_out():
    """Where no block fits (a 2 x 2 grid takes 1 x 1 ones at most), every cell gets its turn."""
    draw = random.Random(0)
    seen = np.mean([block_mask(draw, (2, 2), 1) for _ in range(2000)], axis=0)
    np.testing.assert_allclose(seen, 0.25, atol=0.04)


# (images, grid side) -> masked tokens of a batch at probability 0.5, ratio 0.1 to 0.5: spec 4.
@pytest.mark.parametrize(
    ("images", "side", "slots"), [(16, 16, 1274), (8, 32, 2659), (8, 48, 5987), (64, 14, 3771)]
)
def test_slots_of_the_published_recipes(images, side, slots):
    assert mask_slots(2 * images, (side, side), 0.5, (0.1, 0.5)) == slots
    assert Masks().slots(2 * images, 16 * side) == slots


# Cases where float32 arithmetic rounded after every operation gives another count than torch's
# linspace: rows, side, probability, ratio -> masked patches (made with torch 2.13.0).
@pytest.mark.parametrize(
    ("rows", "side", "probability", "ratio", "total"),
    [
        (10, 20, 1.0, (0.1, 0.45), 1169),
        (12, 10, 1.0, (0.1, 0.5), 375),
        (14, 20, 0.7, (0.2, 0.5), 1317),
        (18, 20, 1.0, (0.1, 0.5), 2231),
    ],
)
def test_counts_are_spaced_as_torch_does(rows, side, probability, ratio, total):
    assert mask_slots(rows, (side, side), probability, ratio) == total


@pytest.mark.parametrize("shift", [False, True])
def test_a_group_has_its_counts_in_random_order(shift):
    rng = np.random.default_rng(0)
    counts = mask_counts(20, 49, 0.7, (0.2, 0.6))
    assert counts[14:] == [0] * 6 and counts[:14] == sorted(counts[:14])
    orders = set()
    for _ in range(5):
        masks = group_masks(rng, 20, (7, 7), 0.7, (0.2, 0.6), circular_shift=shift)
        assert masks.shape == (20, 49)
        assert sorted(masks.sum(1)) == sorted(counts)
        orders.add(tuple(masks.sum(1)))
    assert len(orders) == 5


def test_nothing_is_masked_at_probability_zero():
    masks = group_masks(np.random.default_rng(0), 6, (4, 4), 0.0, (0.1, 0.5))
    indices, weights = mask_positions(masks)
    assert not masks.any() and indices.shape == weights.shape == (0,)


def test_circular_shift_masks_all_patches_alike():
    rng = np.random.default_rng(1)
    spread = {}
    for shift in (False, True):
        masks = [group_masks(rng, 32, (6, 6), 1.0, (0.1, 0.5), shift) for _ in range(100)]
        frequency = np.concatenate(masks).mean(0)
        spread[shift] = frequency.std() / frequency.mean()
    assert spread[True] < 0.05 < 0.15 < spread[False]  # blocks stay clear of the corners


def test_positions_and_weights():
    masks = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    indices, weights = mask_positions(masks)
    assert indices.dtype == np.int32 and weights.dtype == np.float32
    assert indices.tolist() == [1, 2, 8, 12, 13, 14, 15]
    assert weights.tolist() == [0.5, 0.5, 1, 0.25, 0.25, 0.25, 0.25]
