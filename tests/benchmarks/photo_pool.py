"""An imbalanced pool of photographs with planted near-duplicates and leaked evaluation images.

Three labelled sets (CIFAR-10, Caltech-101, EuroSAT) in one: the classes of the first thin out
geometrically, those of the others are rare from the start. Some images get altered copies, and some
of the evaluation queries lie in the pool, as they are or altered. What was planted is written
beside the images, in columns that curation never reads. Called by `curation_photos.py`.
"""

import dataclasses
import io
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from data_curation.files import write_table

FILES = {
    "cifar10": "cifar10_train50k_32px.parquet",
    "caltech101": "caltech101_classesA_128px.parquet",
    "eurosat": "eurosat_a_64px.parquet",
}
CHANGES = ("jpeg", "crop", "brightness", "flip")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many images of what; the defaults make a pool of about 11,900."""

    head: int = 4000  # images of CIFAR-10's first class
    decay: float = 0.6  # each further class has so many times the one before
    bank: int = 300  # images of a CIFAR-10 class that the bank of the evaluation takes
    queries: int = 100  # and its queries
    rare: int = 40  # images, at most, of each class of the other sets: half to the pool, half bank
    copied: int = 800  # images that get one or two altered copies
    leaked: int = 150  # evaluation queries that lie in the pool


def build(data: pathlib.Path, folder: pathlib.Path, sizes: Sizes, seed: int = 0) -> None:
    """Writes queries.parquet, bank.parquet and pool.parquet: image, label, source, and in the first
    two split, which is the source; in the pool also

      group: number shared by an image and its copies, -1 for all others;
      kind: "" for an image as it was, else how the copy was made;
      query: the row of queries.parquet that a leaked image shows, -1 for all others.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[pa.Table]] = {"queries": [], "bank": [], "pool": []}
    classes: list[str] = []
    for source, file in FILES.items():
        table = pq.read_table(data / file)
        names = json.loads(table.schema.metadata[b"classes"])
        for number in range(len(names)):
            train, val = (
                _shuffled(table, number, split, source, len(classes) + number, rng)
                for split in ("train", "val")
            )
            if source == "cifar10":
                bank = sizes.bank
                pool = min(round(sizes.head * sizes.decay**number), len(train) - bank)
            else:
                bank = pool = min(sizes.rare, len(train)) // 2
            parts["queries"].append(val.slice(0, sizes.queries))
            parts["bank"].append(train.slice(0, bank))
            parts["pool"].append(train.slice(bank, pool))
        classes += [f"{source}/{name}" for name in names]
    tables = {name: pa.concat_tables(of_name).combine_chunks() for name, of_name in parts.items()}
    pool = _plant(tables["pool"], tables["queries"], sizes, rng)
    tables["pool"] = pool.take(rng.permutation(len(pool)))
    for name in ("queries", "bank"):
        tables[name] = tables[name].append_column("split", tables[name]["source"])
    for name, table in tables.items():  # the pool last: where it is, all is
        told = {"classes": json.dumps(classes)}
        write_table(folder / f"{name}.parquet", table.replace_schema_metadata(told))


def _shuffled(
    table: pa.Table, label: int, split: str, source: str, new: int, rng: np.random.Generator
) -> pa.Table:
    """The images of a class and a split, with the label `new`."""
    chosen = pc.and_(pc.equal(table["label"], label), pc.equal(table["split"], split))
    images = table["image"].filter(chosen)
    images = images.take(rng.permutation(len(images)))
    columns = {"label": np.full(len(images), new), "source": pa.array([source] * len(images))}
    return pa.table({"image": images, **columns})


def _plant(pool: pa.Table, queries: pa.Table, sizes: Sizes, rng: np.random.Generator) -> pa.Table:
    """The pool with altered copies of some of its images and with some of the queries."""
    group = np.full(len(pool), -1)
    originals = rng.choice(len(pool), min(sizes.copied, len(pool)), replace=False)
    group[originals] = np.arange(len(originals))
    extra: list[dict[str, object]] = []
    for number, row in enumerate(originals):
        kinds = rng.permutation(CHANGES)[: 1 + number % 2]
        told = pool.slice(row, 1).to_pylist()[0] | {"group": number, "query": -1}
        for kind in kinds:
            extra.append(told | {"image": alter(told["image"], kind, rng), "kind": str(kind)})
    for number, row in enumerate(rng.choice(len(queries), sizes.leaked, replace=False)):
        kind = CHANGES[number // 2 % len(CHANGES)] if number % 2 else "same"
        told = queries.slice(row, 1).to_pylist()[0] | {"group": -1, "query": int(row)}
        image = told["image"] if kind == "same" else alter(told["image"], kind, rng)
        extra.append(told | {"image": image, "kind": kind})
    pool = pool.append_column("group", pa.array(group))
    pool = pool.append_column("kind", pa.array([""] * len(pool)))
    pool = pool.append_column("query", pa.array(np.full(len(pool), -1)))
    return pa.concat_tables([pool, pa.Table.from_pylist(extra, schema=pool.schema)])


def alter(encoded: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """An image as it may come a second time: another JPEG of it, cropped, lighter, mirrored."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    quality = 90
    if kind == "jpeg":
        quality = int(rng.integers(30, 60))
    elif kind == "crop":
        width, height = (round(side * rng.uniform(0.85, 0.95)) for side in image.size)
        left = int(rng.integers(image.width - width + 1))
        top = int(rng.integers(image.height - height + 1))
        box = (left, top, left + width, top + height)
        image = image.resize(image.size, Image.Resampling.BICUBIC, box=box)
    elif kind == "brightness":
        factor = rng.choice([rng.uniform(0.7, 0.85), rng.uniform(1.15, 1.3)])
        image = ImageEnhance.Brightness(image).enhance(factor)
    elif kind == "flip":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()
