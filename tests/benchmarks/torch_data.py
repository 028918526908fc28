"""torchvision's input path for one image at a time, to time ours against: no part of the project.

The augmentation of the training spec (section 5) written with `torchvision.transforms.v2`: two
256-pixel crops of 0.32-1.0 of the area, eight 112-pixel ones of 0.05-0.32, bicubic, antialiased;
flip, colour jitter, grey, blur and solarize with the recipe's effective probabilities, normalise.

    python tests/benchmarks/torch_data.py FOLDER --way pil|tensor|geometry [--seconds 4]
"""

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

BICUBIC = v2.InterpolationMode.BICUBIC


def colour(blur, solarize):
    """Jitter, grey, blur, solarize, normalise."""
    steps = [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
    ]
    if blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur))
    if solarize:
        steps.append(v2.RandomSolarize(128, p=solarize))
    normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return [*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise]


def pipelines(augmented):
    """One transform for each of the ten crops."""
    large = v2.RandomResizedCrop(256, (0.32, 1.0), interpolation=BICUBIC, antialias=True)
    small = v2.RandomResizedCrop(112, (0.05, 0.32), interpolation=BICUBIC, antialias=True)
    if not augmented:
        return [large] * 2 + [small] * 8
    flip = v2.RandomHorizontalFlip()
    first = v2.Compose([large, flip, *colour(0.0, 0.0)])
    second = v2.Compose([large, flip, *colour(0.9, 0.2)])
    local = v2.Compose([small, flip, *colour(0.5, 0.0)])
    return [first, second] + [local] * 8


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--way", choices=("pil", "tensor", "geometry"), default="pil")
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoded = [path.read_bytes() for path in sorted(Path(options.folder).glob("*.jpg"))]
    transforms = pipelines(options.way != "geometry")
    for warm in (True, False):
        end = time.perf_counter() + (0.5 if warm else options.seconds)
        done, decoding, cropping = 0, 0.0, 0.0
        while time.perf_counter() < end:
            started = time.perf_counter()
            image = Image.open(io.BytesIO(encoded[done % len(encoded)])).convert("RGB")
            if options.way != "pil":
                # [i, j, 3] -> [3, i, j] in channels-last memory, what its fast kernels want
                image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            decoded = time.perf_counter()
            for transform in transforms:
                transform(image)
            decoding += decoded - started
            cropping += time.perf_counter() - decoded
            done += 1
    figures = {"decode": 1e3 * decoding / done, "crops": 1e3 * cropping / done}
    print(json.dumps(figures | {"total": sum(figures.values()), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
