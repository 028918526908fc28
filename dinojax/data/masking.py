"""Which patches of the global crops the student does not see (block masks, spec section 4).

Called by `data.pipeline` once per group on the host. Numbers of masked patches are exact, so the
device works with static shapes; which patches they are is random.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32

MIN_PATCHES = 4  # area of the smallest block that is asked for
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
TRIES = 10


@dataclass(frozen=True)
class Masks:
    """How global crops are masked; `patch` pixels make one cell of the mask."""

    patch: int = 16
    probability: float = 0.5  # fraction of the crops of a group that get a mask
    ratio: tuple[float, float] = (0.1, 0.5)  # of the patches of a masked crop
    circular_shift: bool = False

    def grid(self, size: int) -> tuple[int, int]:
        """Rows and columns of the mask of a square crop of `size` pixels."""
        return size // self.patch, size // self.patch

    def slots(self, rows: int, size: int) -> int:
        """Masked patches in a group of `rows` global crops of `size` pixels."""
        return mask_slots(rows, self.grid(size), self.probability, self.ratio)


def mask_counts(
    rows: int, patches: int, probability: float, ratio: tuple[float, float]
) -> list[int]:
    """Masked patches of each of the `rows` crops before shuffling, the unmasked ones last.

    int(rows * probability) crops get int(patches * r[i + 1]), r = torch's float32 linspace(*ratio).
    Truncation turns the last bit of r into a whole patch, so r is spaced as torch does it on a CPU:
    from both ends towards the middle, each multiply-add rounded once (rounding twice changed the
    counts in 189 of 8,100 combinations of rows, grid and ratio; this, in none).
    """
    masked = int(rows * probability)
    first, last = np.float32(ratio[0]), np.float32(ratio[1])
    counts = []
    for i in range(1, masked + 1):
        step = float((last - first) / np.float32(masked))
        low_half = i < (masked + 1) // 2
        value = float(first) + step * i if low_half else float(last) - step * (masked - i)
        counts.append(int(np.float32(patches) * np.float32(value)))
    return counts + [0] * (rows - masked)


def mask_slots(
    rows: int, grid: tuple[int, int], probability: float, ratio: tuple[float, float]
) -> int:
    """Masked patches in a group of `rows` crops: the same for every draw."""
    return sum(mask_counts(rows, grid[0] * grid[1], probability, ratio))


def place_blocks(draw: random.Random, grid: tuple[int, int], target: int) -> tuple[int, list[int]]:
    """Random rectangles until `target` cells are covered or no try of ten adds any.

    The mask is one Python integer, bit y * columns + x: covering a box and counting what it adds
    are two operations on it (9 us for 58 patches of 14 x 14; numpy slices took 21). Only `random()`
    is drawn, the one method whose values Python promises to keep.

    Returns:
        The mask and the number of newly covered cells of each accepted block.
    """
    height, width = grid
    largest = (height // 2) * width
    column = [0]  # column[k]: one bit at the start of each of k rows
    for row in range(height):
        column.append(column[-1] | 1 << (row * width))
    mask, added = 0, []
    remaining = target
    while remaining > 0:
        limit = min(remaining, largest)
        for _ in range(TRIES):
            area = MIN_PATCHES + (limit - MIN_PATCHES) * draw.random()
            aspect = math.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * draw.random())
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w >= width or h >= height:
                continue
            top = int(draw.random() * (height - h + 1))
            left = int(draw.random() * (width - w + 1))
            box = (((1 << w) - 1) * column[h]) << (top * width + left)
            new = (box & ~mask).bit_count()
            if 0 < new <= limit:
                mask |= box
                added.append(new)
                remaining -= new
                break
        else:
            break
    return mask, added


def block_mask(draw: random.Random, grid: tuple[int, int], target: int) -> Bool[np.ndarray, "y x"]:
    """A mask of exactly `target` cells: blocks, then single cells drawn without replacement."""
    bits, added = place_blocks(draw, grid, target)
    cells = grid[0] * grid[1]
    packed = np.frombuffer(bits.to_bytes((cells + 7) // 8, "little"), np.uint8)
    mask = np.unpackbits(packed, count=cells, bitorder="little").astype(bool)
    missing = target - sum(added)
    if missing > 0:
        free = np.flatnonzero(~mask).tolist()
        for k in range(missing):  # the head of a Fisher-Yates shuffle
            other = k + int(draw.random() * (len(free) - k))
            free[k], free[other] = free[other], free[k]
        mask[free[:missing]] = True
    return mask.reshape(grid)


def group_masks(
    rng: np.random.Generator,
    rows: int,
    grid: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
    circular_shift: bool = False,
) -> Bool[np.ndarray, "rows p"]:
    """Masks of the `rows` global crops of one group, in random order; p = grid cells, row-major."""
    height, width = grid
    masks = np.zeros((rows, height * width), bool)
    draw = random.Random(int(rng.integers(2**63)))
    counts = mask_counts(rows, height * width, probability, ratio)
    for row, count in zip(rng.permutation(rows), counts, strict=True):
        if count == 0:
            continue
        mask = block_mask(draw, grid, count)
        if circular_shift:
            mask = np.roll(mask, (rng.integers(height), rng.integers(width)), (0, 1))
        masks[row] = mask.ravel()
    return masks


def mask_positions(
    masks: Bool[np.ndarray, "rows p"],
) -> tuple[Int32[np.ndarray, "m"], Float32[np.ndarray, "m"]]:
    """Positions of the masked patches in the flattened masks, and 1 / (masked of their crop)."""
    counts = masks.sum(1)
    weights = np.float32(1) / np.maximum(counts, 1).astype(np.float32)
    return np.flatnonzero(masks).astype(np.int32), np.repeat(weights, counts)
