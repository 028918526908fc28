"""What a model will see of an image: its crops before and after colour, masks and boxes.

All of it comes from the functions that training uses (`data.pipeline.Batches` on the host,
`data.photometric.views` inside the compiled step); here it is only drawn. Called by
`dinojax data SPEC --crops N`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import cv2
import jax
import numpy as np
from jaxtyping import Bool, Shaped, UInt8, UInt32
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from dinojax import config as configs
from dinojax.data import photometric
from dinojax.data.decode import UnreadableImage
from dinojax.data.from_config import phase_batches
from dinojax.data.masking import Masks
from dinojax.data.mixture import as_mixture
from dinojax.data.multicrop import Box, Crops, boxes
from dinojax.data.photometric import Photometric
from dinojax.data.pipeline import Batches, sample
from dinojax.data.sources import Source
from dinojax.data_pictures import names
from dinojax.visualize import captioned, contact_sheet, font, rgb

ORIGINAL, GLOBAL, LOCAL = 470, 224, 132  # pixels of the longer side, as drawn, at most
COLUMNS = 8  # local crops in a row
COLOURS = ((214, 39, 40), (31, 119, 180))  # of the two global crops
LOCAL_COLOUR = (255, 214, 0)
HIDDEN, SEAM = (38, 38, 66), (150, 150, 190)  # patches that the student does not see
EDGE = 4  # pixels
TRIES = 32  # images that may be unreadable before the first that is not
Picture = UInt8[np.ndarray, "_ _ 3"]


def of_phase(
    config: ConfigDict, index: int, source: Source, count: int
) -> tuple[Batches, Photometric]:
    """What phase `index` of a resolved config makes of a source, in whole groups of images.

    Fewer images than a group make a smaller one; `model.in_channels` is what the images have.
    """
    config = configs.resolve(config)  # a copy
    config.model.in_channels, phase = bands(source), config.phases[index]
    phase.group = min(phase.group, len(source))
    groups = min(-(-count // phase.group), len(source) // phase.group)
    phase.batch_size = phase.group * groups
    batches = phase_batches(config, index, as_mixture(source), configs.patch_stride(config))
    return batches, photometric.policy(config.augment)


def of_defaults(source: Source, count: int) -> tuple[Batches, Photometric]:
    """Two crops of 224 and eight of 96 pixels, patches of 16: what most experiments make."""
    group = min(max(count, TRIES), len(source))
    crops, masks = (Crops(global_size=224, local_size=96),), Masks(patch=16)
    batches = Batches(source, crops, (1.0,), masks, group, group, seed=0, channels=bands(source))
    return batches, Photometric()


def bands(source: Source) -> int:
    """Bands of the first image that can be read."""
    for i in range(min(TRIES, len(source))):
        try:
            return source.image(i).shape[2]
        except UnreadableImage as error:
            last = error
    raise ValueError(f"the first {min(TRIES, len(source))} images cannot be read, the last: {last}")


def panels(batches: Batches, policy: Photometric, count: int) -> Iterator[Picture]:
    """The first `count` readable images of step 0, one picture each."""
    batch = batches.at(0)
    crops = batches.crops[batch["triple"]]
    sent = {name: batch[name] for name in (*crops.shapes(), "masks", "seeds")}
    rows = [row for _, row in zip(range(count), read(batches))]
    if not rows:
        raise ValueError(f"none of the first {batches.batch} images of the run can be read.")
    sent = {name: array[[row for row, *_ in rows]] for name, array in sent.items()}
    seen = as_levels(sent, policy, crops)
    words = events(sent["seeds"], policy, 2 + crops.locals, batches.channels)
    for n, (_, image, title, rng) in enumerate(rows):
        own = {name: sent[name][n] for name in (*crops.shapes(), "masks")}
        levels = {name: array[n] for name, array in seen.items()}
        places = in_image(boxes(*image.shape[:2], rng, crops), crops)
        yield panel(image, title, own, levels, places, words[n], batches.masks.patch)


def read(
    batches: Batches,
) -> Iterator[tuple[int, UInt8[np.ndarray, "i j c"], list[str], np.random.Generator]]:
    """Rows of step 0 whose image can be read: row, image, names, the generator of its crops."""
    columns = (column.tolist() for column in batches.mixture.rows(batches.seed, 0, batches.batch))
    for row, (component, record, visit, stream) in enumerate(zip(*columns)):
        source = batches.mixture.components[component].source
        try:
            image = source.image(record)
        except UnreadableImage:
            continue
        if image.shape[2] == batches.channels:
            _, rng = sample(batches.seed, record, visit, stream)
            yield row, image, names(source, record), rng


def as_levels(
    batch: Mapping[str, Shaped[np.ndarray, "b ..."]], policy: Photometric, crops: Crops
) -> dict[str, UInt8[np.ndarray, "b _ _ _ c"]]:
    """Crops and seeds of a batch -> what the networks get, before it is normalised."""
    bands = batch["local_crops"].shape[-1]
    policy = replace(policy, mean=(0.0,) * bands, std=(1.0,) * bands)

    def views(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return photometric.views(batch, policy, crops.no_distortions, crops.global_size)

    return {
        name: np.rint(255 * np.asarray(crop)).clip(0, 255).astype(np.uint8)
        for name, crop in jax.jit(views)(dict(batch)).items()
    }


def in_image(places: Mapping[str, Sequence[Box]], crops: Crops) -> dict[str, list[Box]]:
    """Boxes in pixels of the image, also of local crops that are cut from the global ones."""
    found = {name: list(boxes) for name, boxes in places.items()}
    if crops.local_grid:
        half = (crops.locals + 1) // 2
        for k, (top, left, h, w) in enumerate(places["local_crops"]):
            y0, x0, height, width = places["global_crops"][int(k >= half)]
            down, right = height / crops.global_size, width / crops.global_size
            found["local_crops"][k] = (
                round(y0 + top * down),
                round(x0 + left * right),
                round(h * down),
                round(w * right),
            )
    return found


def events(
    seeds: UInt32[np.ndarray, " n"], policy: Photometric, views: int, bands: int
) -> list[list[str]]:
    """What happens to each crop of each image, in words: 'flip, jitter, blur 1.3'."""

    def draws(seed: jax.Array, view: jax.Array) -> photometric.Draws:
        return photometric.draw(photometric.crop_key(seed, view), policy, view)

    over_views = jax.vmap(draws, in_axes=(None, 0))
    drawn = jax.jit(jax.vmap(over_views, in_axes=(0, None)))(seeds, np.arange(views))
    drawn = jax.tree.map(np.asarray, drawn)
    return [
        [_words(jax.tree.map(lambda x, n=n, v=v: x[n, v], drawn), bands) for v in range(views)]
        for n in range(len(seeds))
    ]


def _words(draws: photometric.Draws, bands: int) -> str:
    factors = (draws.brightness, draws.contrast, draws.saturation)
    found = {
        "flip": draws.flip,
        "jitter": draws.hue != 0 or any(factor != 1 for factor in factors),
        "grey": draws.grayscale and bands == 3,
        f"blur {draws.sigma:.1f}": draws.sigma > 0,
        "solarize": draws.solarize and bands == 3,
    }
    return ", ".join(word for word, happens in found.items() if happens) or "unchanged"


def panel(
    image: UInt8[np.ndarray, "i j c"],
    title: Sequence[str],
    row: Mapping[str, Shaped[np.ndarray, "_ ..."]],
    seen: Mapping[str, UInt8[np.ndarray, "_ _ _ c"]],
    places: Mapping[str, Sequence[Box]],
    words: Sequence[str],
    patch: int,
) -> Picture:
    """One image with everything that is made of it.

    `row`: its crops and masks [2, p] as the host sends them; `seen`: "global", "local" and perhaps
    "gram" as the networks get them, as levels; `places`: boxes of the global and the local crops in
    the image; `words`: what colour did to each, the global ones first.
    """
    cut = row["global_crops"] if "global_crops" in row else row["gram_crops"]
    large = []
    for view, colour in enumerate(COLOURS):
        mask = row["masks"][view]
        told = f"{mask.sum()} of {mask.size} patches hidden" if mask.any() else "nothing hidden"
        crop = seen["global"][view]
        times = max(1, GLOBAL // len(crop))
        tiles = [
            (cut[view], (f"global {view + 1} as cut", f"{cut[view].shape[0]} pixels")),
            (crop, ("after colour", words[view])),
            (hidden(enlarged(crop, times), mask, patch * times), ("for the student", told)),
        ]
        if "gram" in seen:
            anchor = seen["gram"][view]
            tiles.append((anchor, ("for the Gram teacher", f"{anchor.shape[0]} pixels")))
        drawn = [captioned(edged(sized(pixels, GLOBAL), colour), text) for pixels, text in tiles]
        large.append(contact_sheet(drawn, columns=len(drawn)))
    small = []
    local = row["local_crops"]
    for first in range(0, len(local), COLUMNS):
        views = range(first, min(first + COLUMNS, len(local)))
        before = [captioned(sized(local[v], LOCAL), [f"local {v + 1}"]) for v in views]
        after = [
            captioned(sized(seen["local"][v], LOCAL), ["after colour", *halves(words[2 + v])])
            for v in views
        ]
        small += [contact_sheet(tiles, columns=COLUMNS) for tiles in (before, after)]
    told = [*title, f"{image.shape[1]} x {image.shape[0]} pixels"]
    told.append("red and blue: global crops; yellow: local crops")
    whole = captioned(boxed(image, places), told)
    whole = np.pad(whole, ((8, 0), (8, 0), (0, 0)), constant_values=255)
    return joined([joined([whole, joined(large, 0)], 1), *small], 0)


def boxed(image: UInt8[np.ndarray, "i j c"], places: Mapping[str, Sequence[Box]]) -> Picture:
    """The image with the boxes of its crops, at a size to look at."""
    scale = ORIGINAL / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture = Image.fromarray(cv2.resize(rgb(image), (width, height), interpolation=way))
    draw, face = ImageDraw.Draw(picture), font(12)
    marks = [
        (box, LOCAL_COLOUR, 2, f"{number}")
        for number, box in enumerate(places["local_crops"], start=1)
    ]
    marks += [(box, COLOURS[view], 4, "") for view, box in enumerate(places["global_crops"])]
    cards = []
    for (top, left, h, w), colour, thickness, number in reversed(marks):
        x0, y0, x1, y1 = (round(side * scale) for side in (left, top, left + w, top + h))
        outer = (x0 - 1, y0 - 1, max(x0, x1), max(y0, y1))
        draw.rectangle(outer, outline=(0, 0, 0), width=thickness + 2)  # seen on any ground
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=thickness)
        if number:
            cards.append(((x0 + 4, y0 + 2), number))
    for corner, number in cards:  # over all lines
        x0, y0, x1, y1 = draw.textbbox(corner, number, face)
        draw.rectangle((x0 - 3, y0 - 2, x1 + 2, y1 + 2), LOCAL_COLOUR)
        draw.text(corner, number, (0, 0, 0), face)
    return np.asarray(picture)


def hidden(
    crop: UInt8[np.ndarray, "i j c"], mask: Bool[np.ndarray, " p"], patch: int
) -> UInt8[np.ndarray, "i j 3"]:
    """A crop with its masked patches covered; `mask` row-major over the patches."""
    crop = rgb(crop).copy()
    rows, cols = crop.shape[0] // patch, crop.shape[1] // patch
    for cell in np.flatnonzero(mask.reshape(rows * cols)).tolist():
        top, left = cell // cols * patch, cell % cols * patch
        crop[top : top + patch, left : left + patch] = HIDDEN
        crop[top, left : left + patch] = crop[top : top + patch, left] = SEAM
    return crop


def sized(crop: UInt8[np.ndarray, "i j c"], side: int) -> Picture:
    """A crop enlarged as many times as fit into `side`, or shrunk to it."""
    if len(crop) <= side:
        return enlarged(crop, side // len(crop))
    return cv2.resize(rgb(crop), (side, side), interpolation=cv2.INTER_AREA)


def enlarged(crop: UInt8[np.ndarray, "i j c"], times: int) -> Picture:
    """A crop with every pixel `times` as wide and high."""
    return np.repeat(np.repeat(rgb(crop), times, 0), times, 1)


def edged(picture: Picture, colour: tuple[int, int, int]) -> Picture:
    """A picture with a coloured edge."""
    frame = np.full((picture.shape[0] + 2 * EDGE, picture.shape[1] + 2 * EDGE, 3), colour, np.uint8)
    frame[EDGE:-EDGE, EDGE:-EDGE] = picture
    return frame


def halves(words: str) -> list[str]:
    """Words separated by commas, on two lines."""
    parts = words.split(", ")
    middle = (len(parts) + 1) // 2
    return [", ".join(parts[:middle]), ", ".join(parts[middle:])]


def joined(pictures: Sequence[Picture], axis: int) -> Picture:
    """Pictures below (axis 0) or beside (axis 1) one another, from the same edge, on white."""
    across = max(picture.shape[1 - axis] for picture in pictures)
    padded = []
    for picture in pictures:
        widths = [(0, 0)] * 3
        widths[1 - axis] = (0, across - picture.shape[1 - axis])
        padded.append(np.pad(picture, widths, constant_values=255))
    return np.concatenate(padded, axis)
