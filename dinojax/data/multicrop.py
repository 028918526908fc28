"""The crops of one image: two global ones, several local ones, Gram crops (spec section 5).

Geometry only, on the host, uint8 in and out, any number of bands. Flips and everything about colour
happen on the device (`data.photometric`). Called by `data.pipeline` for every image.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from dinojax.data.resize import resize

TRIES = 10
Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class Crops:
    """Sizes in pixels (square crops), areas as fractions of the image.

    `gram_size` 0 makes no Gram crops. With `no_distortions` the Gram teacher gets the student's
    crop without colour changes; otherwise it gets the student's distorted crop, so only the larger
    crop travels (as `gram_crops`) and the device derives the global one after colour. With
    `local_grid` the local crops are windows of the global ones, cut without resizing at multiples
    of that many pixels (the patch), the first half of them from the first; each is flipped on its
    own.
    """

    global_size: int
    local_size: int
    gram_size: int = 0
    locals: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    no_distortions: bool = True
    local_grid: int = 0

    def __post_init__(self) -> None:
        if self.local_grid and self.local_size > self.global_size:
            raise ValueError(
                f"local_size={self.local_size} is larger than global_size={self.global_size}: with "
                f"local crops cut from the global ones; nearest: local_size={self.global_size}."
            )
        if self.gram_size and not self.no_distortions and self.gram_size < self.global_size:
            raise ValueError(
                f"gram_size={self.gram_size} is smaller than global_size={self.global_size}: with "
                f"no_distortions=False the global crop is made from the Gram crop; nearest: "
                f"gram_size={self.global_size}."
            )

    def shapes(self, channels: int = 3) -> dict[str, tuple[int, int, int, int]]:
        """Name to shape [v, i, j, c] of what `views` returns."""
        sizes = {
            "global_crops": (2, self.global_size),
            "local_crops": (self.locals, self.local_size),
        }
        if self.gram_size:
            sizes["gram_crops"] = (2, self.gram_size)
            if not self.no_distortions:
                del sizes["global_crops"]
        return {name: (v, size, size, channels) for name, (v, size) in sizes.items()}


def crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, as torchvision's RandomResizedCrop draws it.

    Area uniform in `scale`, width/height log-uniform in `aspect`, sides rounded half to even, ten
    tries; then the central crop with the nearest allowed aspect.
    """
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(TRIES):
        u_area, u_aspect, u_top, u_left = rng.random(4).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        ratio = math.exp(log_low + (log_high - log_low) * u_aspect)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    h, w = height, width
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    elif width / height > aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


def boxes(height: int, width: int, rng: np.random.Generator, crops: Crops) -> dict[str, list[Box]]:
    """Where an image of this size is cut: "global_crops" (2) and "local_crops", in image pixels.

    With `local_grid` the local boxes count the pixels of their global crop instead.
    """
    found = {
        "global_crops": [
            crop_box(rng, height, width, crops.global_scale, crops.aspect) for _ in range(2)
        ]
    }
    if crops.local_grid:
        free = (crops.global_size - crops.local_size) // crops.local_grid + 1
        corners = (rng.random((crops.locals, 2)) * free).astype(int) * crops.local_grid
        size = crops.local_size
        found["local_crops"] = [(top, left, size, size) for top, left in corners.tolist()]
    else:
        found["local_crops"] = [
            crop_box(rng, height, width, crops.local_scale, crops.aspect)
            for _ in range(crops.locals)
        ]
    return found


def cut(image: UInt8[np.ndarray, "i j c"], box: Box) -> UInt8[np.ndarray, "h w c"]:
    """The pixels of a box, without a copy."""
    # Resizing out of the whole image would save a copy too, but its kernel reaches past the box,
    # which differs from cropping first by up to 8 levels along the edges.
    top, left, h, w = box
    return image[top : top + h, left : left + w]


def views(
    image: UInt8[np.ndarray, "i j c"], rng: np.random.Generator, crops: Crops
) -> dict[str, UInt8[np.ndarray, "v _ _ c"]]:
    """All crops of an image: global_crops [2,i,j,c], local_crops [v,i,j,c], gram_crops [2,i,j,c].

    Gram crops share the global crops' geometry. As in the reference, both come from one base crop
    of max(global, gram) pixels, which is then resized again (bicubic) to each of the two sizes.
    """
    places = boxes(*image.shape[:2], rng, crops)
    side = max(crops.global_size, crops.gram_size)
    bases = [resize(cut(image, box), side) for box in places["global_crops"]]
    large = [resize(base, crops.global_size) for base in bases]
    if crops.local_grid:
        half = (crops.locals + 1) // 2
        small = [cut(large[k >= half], box) for k, box in enumerate(places["local_crops"])]
    else:
        small = [resize(cut(image, box), crops.local_size) for box in places["local_crops"]]
    made = {"global_crops": large, "local_crops": small}
    if crops.gram_size:
        made["gram_crops"] = [resize(base, crops.gram_size) for base in bases]
    return {name: np.stack(made[name]) for name in crops.shapes()}
