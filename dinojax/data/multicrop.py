"""The crops of one image: two global ones, several local ones, Gram crops (spec section 5).

Geometry only, on the host, uint8 in and out. Flips and everything about colour happen on the device
(`data.photometric`). Called by `data.pipeline` for every image.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

TRIES = 10


@dataclass(frozen=True)
class Crops:
    """Sizes in pixels (square crops), areas as fractions of the image.

    `gram_size` 0 makes no Gram crops. With `no_distortions` the Gram teacher gets the student's
    crop without colour changes; otherwise it gets the student's distorted crop, so only the larger
    crop travels (as `gram_crops`) and the device derives the global one after colour.
    """

    global_size: int
    local_size: int
    gram_size: int = 0
    locals: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    no_distortions: bool = True

    def __post_init__(self) -> None:
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


def resize(picture: Image.Image, size: int) -> Image.Image:
    """To size x size with PIL's bicubic (a = -0.5, antialiased); the same size is the identity."""
    return picture.resize((size, size), Image.Resampling.BICUBIC)


def random_crop(
    picture: Image.Image,
    rng: np.random.Generator,
    size: int,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> Image.Image:
    """A random crop of `picture`, resized to size x size."""
    top, left, h, w = crop_box(rng, picture.height, picture.width, scale, aspect)
    # Not `resize(box=...)`, although that saves a copy: its kernel reaches past the box into the
    # image, which differs from cropping first by up to 8 levels along the edges (and the copy
    # costs 14 us of 1 ms, the pixels of the box being what takes the time).
    return resize(picture.crop((left, top, left + w, top + h)), size)


def views(
    image: UInt8[np.ndarray, "i j c"], rng: np.random.Generator, crops: Crops
) -> dict[str, UInt8[np.ndarray, "v _ _ c"]]:
    """All crops of an image: global_crops [2,i,j,c], local_crops [v,i,j,c], gram_crops [2,i,j,c].

    Gram crops share the global crops' geometry. As in the reference, both come from one base crop
    of max(global, gram) pixels, which is then resized again (bicubic) to each of the two sizes.
    """
    picture = Image.fromarray(image)
    base = max(crops.global_size, crops.gram_size)
    bases = [random_crop(picture, rng, base, crops.global_scale, crops.aspect) for _ in range(2)]
    small = [
        random_crop(picture, rng, crops.local_size, crops.local_scale, crops.aspect)
        for _ in range(crops.locals)
    ]
    pictures = {
        "global_crops": (bases, crops.global_size),
        "local_crops": (small, crops.local_size),
        "gram_crops": (bases, crops.gram_size),
    }
    out = {}
    for name, shape in crops.shapes(image.shape[2]).items():
        out[name] = np.empty(shape, np.uint8)
        for view, picture in enumerate(pictures[name][0]):
            out[name][view] = np.asarray(resize(picture, pictures[name][1]))
    return out
