"""Images of TensorFlow Datasets, read without TensorFlow: `tfds:NAME[:SPLIT]`.

Opened by `data/sources.py`. The same files and examples as `tfds.data_source`, which however keeps
every shard open: ImageNet's train split alone has 1,024, as many as a process may often open.
"""

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int64

from dinojax.data import storage
from dinojax.data.decode import READING_OPTIONS, EncodedSource, UnreadableImage, read_options
from dinojax.data.options import check_options, nearest
from dinojax.data.records import Records

THREADS, BLOCK = 16, 1024  # of reading labels: images at a time in each of the threads


@dataclass(frozen=True, kw_only=True)
class TfdsSource(EncodedSource):
    """Images of a prepared data set in ArrayRecord format. In memory: a name and 32 bytes a shard.

    The label of an image lies in its record, beside the image, and nowhere else.
    """

    records: Records
    features: Any = field(repr=False)  # tfds.features.FeaturesDict of the two features below
    image_feature: str
    label_feature: str | None

    def __len__(self) -> int:
        return self.records.count

    def encoded(self, i: int) -> bytes:
        return self._example(i)[self.image_feature]

    def label(self, i: int) -> int | None:
        """The label of image `i`; reads the record."""
        return None if self.label_feature is None else int(self._example(i)[self.label_feature])

    def labels(self) -> Int64[np.ndarray, " n"] | None:
        """All labels; reads every record, images included."""
        if self.label_feature is None:
            return None
        blocks = [range(i, min(i + BLOCK, len(self))) for i in range(0, len(self), BLOCK)]
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda block: [self.label(i) for i in block], blocks)
            return np.concatenate([np.array(block, np.int64) for block in found])

    def name(self, i: int) -> str:
        return self.records.name(i)

    def _example(self, i: int) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        skip = {self.image_feature: tfds.decode.SkipDecoding()}
        try:
            return self.features.deserialize_example_np(self.records.read(i), decoders=skip)
        except MemoryError:
            raise
        except Exception as error:  # OSError; protobuf's and tfds's of what is no such example
            raise UnreadableImage(f"{self.name(i)}: {error}") from error


def open_tfds(where: str, options: Mapping[str, str]) -> TfdsSource:
    """`NAME[/CONFIG][/VERSION][:SPLIT]`; without SPLIT `train`; `train[:80%]` is a part of it.

    `dir` is TFDS's data_dir; `split`, `image` and `label` name the split and the features.
    """
    check_options("tfds", options, ("dir", "split", "image", "label", *READING_OPTIONS))
    reading = read_options(options)
    name, _, split = where.partition(":")
    split = options.get("split", split or "train")
    info = _prepared(name, options.get("dir"))
    try:
        files = info.splits[split].file_instructions
    except (ValueError, KeyError) as error:
        hint = nearest(split, list(info.splits))
        raise ValueError(f"tfds source: {name!r} has no split {split!r}; {hint}") from error
    if not files:
        raise ValueError(f"tfds source: split {split!r} of {name!r} is empty.")
    if not storage.local(str(files[0].filename)):
        raise ValueError(
            f"tfds source: {name!r} is at {os.path.dirname(files[0].filename)!r}, and ArrayRecord "
            f"files are read from local disks alone; copy or mount it and give its dir=."
        )
    try:
        records = Records.of(
            [str(f.filename) for f in files], [f.skip for f in files], [f.take for f in files]
        )
    except OSError as error:
        raise ValueError(f"tfds source: a shard of {name!r} is missing ({error}).") from error
    image, label, classes, features = _features(name, info.features, options)
    return TfdsSource(
        classes=classes,
        reading=reading,
        records=records,
        features=features,
        image_feature=image,
        label_feature=label,
    )


def _prepared(name: str, folder: str | None) -> Any:
    """The DatasetInfo of a data set that has been prepared as ArrayRecord."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"tfds source: {name!r} needs the package tensorflow-datasets; pip install "
            f"'dinojax[tfds]'."
        ) from error
    place = folder or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    how = f"prepare it with `tfds build {name} --file_format=array_record --data_dir={place}`"
    # tfds wants a colon before the version; in a spec that is the split's.
    versioned = re.sub(r"/(\d+\.\d+\.\d+)$", r":\1", name)
    try:
        info = tfds.builder(versioned, data_dir=folder and os.path.expanduser(folder)).info
    except Exception as error:  # also ImportError, of what a known data set needs to be built
        reason = str(error).partition("\n")[0].rstrip(".: ")
        raise ValueError(
            f"tfds source: {name!r} is not in {place!r} and cannot be made out ({reason}); {how}, "
            f"or say where it is with dir=."
        ) from error
    if not info.splits:
        raise ValueError(f"tfds source: {name!r} is not prepared in {place!r}; {how}.")
    if info.file_format.value != "array_record":
        raise ValueError(
            f"tfds source: {name!r} is prepared as {info.file_format.value}, which cannot be read "
            f"at random without TensorFlow; {how}."
        )
    return info


def _features(
    name: str, features: Any, options: Mapping[str, str]
) -> tuple[str, str | None, tuple[str, ...] | None, Any]:
    """Names of the image and of the label, the classes, and a FeaturesDict of these two alone."""
    import tensorflow_datasets as tfds

    image = options.get("image", "image")
    label = options.get("label", "label" if "label" in features else None)
    for asked in (image, label):
        if asked is not None and asked not in features:
            hint = nearest(asked, list(features))
            raise ValueError(f"tfds source: {name!r} has no feature {asked!r}; {hint}")
    if not isinstance(features[image], tfds.features.Image):
        raise ValueError(
            f"tfds source: feature {image!r} of {name!r} is {features[image]}, not an Image."
        )
    if label is None:
        return image, None, None, tfds.features.FeaturesDict({image: features[image]})
    if features[label].shape != () or not np.issubdtype(features[label].np_dtype, np.integer):
        raise ValueError(
            f"tfds source: feature {label!r} of {name!r} is {features[label]}, not a ClassLabel "
            f"or an integer."
        )
    classes = getattr(features[label], "names", None)
    both = tfds.features.FeaturesDict({key: features[key] for key in (image, label)})
    return image, label, classes and tuple(classes), both
