"""What decoding JPEGs at reduced scale (`?draft=N`) does to the crops that training sees."""

import os
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from dinojax.data.decode import Reading, decode
from dinojax.data.multicrop import Crops, boxes, cut
from dinojax.data.resize import resize

# A zip of photographs; none come with the project.
PHOTOGRAPHS = Path(
    os.environ.get(
        "DINOJAX_PHOTOGRAPHS",
        Path(__file__).parents[3] / "shared/data/detection_small/coco_subset.zip",
    )
)


def differences(encoded, crops):
    """Mean levels between crops of the half-size and of the whole image, at the same places."""
    found = {"global_crops": [], "local_crops": []}
    for index, data in enumerate(encoded):
        whole = decode(data, "image")
        reduced = decode(data, "image", Reading(draft=min(whole.shape[:2]) // 2))
        height, width = reduced.shape[:2]
        assert (height, width) == tuple(-(-side // 2) for side in whole.shape[:2])
        places = boxes(height // 2 * 2, width // 2 * 2, np.random.default_rng(index), crops)
        for name, size in (("global_crops", crops.global_size), ("local_crops", crops.local_size)):
            for box in places[name]:
                one = resize(cut(reduced, box), size).astype(int)
                other = resize(cut(whole, tuple(2 * side for side in box)), size)
                found[name].append(np.abs(one - other).mean())
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_reduced_decoding_changes_crops_by_less_than_two_levels():
    """At twice the global crop's side, the draft that the guide recommends."""
    y, x = np.fft.fftfreq(300)[:, None], np.fft.rfftfreq(400)[None]
    falling = 1 / np.maximum(np.hypot(y, x), 1 / 400)  # the spectrum of photographs
    encoded = []
    for seed in range(6):
        phases = np.exp(2j * np.pi * np.random.default_rng(seed).random((*falling.shape, 3)))
        bands = np.fft.irfft2(falling[..., None] * phases, s=(300, 400), axes=(0, 1))
        bands = 0.3 * bands + bands.mean(-1, keepdims=True)  # bands of photographs are alike
        pixels = (128 + 50 * bands / bands.std()).clip(0, 255).astype(np.uint8)
        encoded.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    found = differences(encoded, Crops(72, 27))
    assert 0.05 < max(found.values()) < 2


@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason="no photographs here (DINOJAX_PHOTOGRAPHS)")
def test_reduced_decoding_of_photographs():
    """Of 288 pixels, measured over 100: 1.1 (global) and 0.6 (local) levels on average."""
    with zipfile.ZipFile(PHOTOGRAPHS) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith(".jpg")][:100]
        encoded = [archive.read(name) for name in names]
    found = differences(encoded, Crops(72, 27))
    assert found["global_crops"] < 2
    assert found["local_crops"] < 2
