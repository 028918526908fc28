"""Statistics of block masks (item 9 of the vectors' README).

Masks are random, so counts must be exact and everything else close: 5 % on blocks and neighbours,
0.05 patches on what is filled in at random. Blocks per mask come from `place_blocks`, which returns
what each accepted block added.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dinojax.data.masking import block_mask, place_blocks

SAMPLES = 6000  # the vectors come from 1,500; more of ours leave the tolerance to their noise


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "stats" not in metafunc.fixturenames:
        return
    directory = Path(metafunc.config.getoption("vectors"))
    file = directory / "masking_stats.json"
    table = json.loads(file.read_text()) if file.exists() else {}
    found = [
        pytest.param(setting, float(ratio), stats, id=f"{name}-{ratio}")
        for name, setting in table.items()
        for ratio, stats in setting["ratios"].items()
    ]
    if not found:
        reason = pytest.mark.skip(f"masking_stats.json is not in {directory}")
        found = [pytest.param(None, None, None, marks=reason)]
    metafunc.parametrize(["setting", "ratio", "stats"], found)


def test_statistics(setting, ratio, stats):
    grid = tuple(setting["grid"])
    assert setting["max_num_patches"] == grid[0] // 2 * grid[1]
    target = int(grid[0] * grid[1] * ratio)
    assert target == stats["requested"]
    blocks = [place_blocks(random.Random(k), grid, target)[1] for k in range(SAMPLES)]
    masks = np.array([block_mask(random.Random(k), grid, target) for k in range(SAMPLES)])

    counts = masks.sum((1, 2))
    assert counts.min() == stats["masked_count_min"] and counts.max() == stats["masked_count_max"]
    number = np.array([len(added) for added in blocks])
    filled = np.array([target - sum(added) for added in blocks])
    pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    rows = masks.any(2)
    extent = grid[0] - rows.argmax(1) - rows[:, ::-1].argmax(1)
    relative = {
        "blocks_per_mask_mean": number.mean(),
        "new_patches_per_block_mean": np.concatenate(blocks).mean(),
        "masked_neighbour_pairs_per_masked_patch": pairs / counts.sum(),
        "vertical_extent_mean": extent.mean(),
    }
    for name, value in relative.items():
        assert value == pytest.approx(stats[name], rel=0.05), name
    assert number.std() == pytest.approx(stats["blocks_per_mask_std"], rel=0.1)
    assert filled.mean() == pytest.approx(stats["randomly_filled_mean"], abs=0.05)
    share = (filled > 0).mean()
    assert share == pytest.approx(stats["fraction_of_masks_with_random_fill"], abs=0.05)
    quantiles = np.quantile(np.concatenate(blocks), (0.1, 0.5, 0.9))
    expected = stats["new_patches_per_block_quantiles_10_50_90"]
    np.testing.assert_allclose(quantiles, expected, rtol=0.1, atol=1)  # whole patches
