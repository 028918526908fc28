"""Image files under a folder: `folder:PATH`. Opened by `data/sources.py`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinojax.data.decode import EncodedSource, UnreadableImage
from dinojax.data.options import check_options, number_classes

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


@dataclass(frozen=True, kw_only=True)
class FolderSource(EncodedSource):
    """Image files under a folder, in sorted order."""

    root: str
    files: tuple[str, ...]  # relative to root

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, i: int) -> bytes:
        path = os.path.join(self.root, self.files[i])
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{path}: {error.strerror}") from error

    def name(self, i: int) -> str:
        return self.files[i]


def open_folder(where: str, options: Mapping[str, str]) -> FolderSource:
    """Nested to any depth. If every image lies in a sub-folder, that sub-folder is its class.

    Outer folders that hold all images (a lone `train/`) are no classes and are looked through.
    """
    check_options("folder", options, ())
    root = os.path.expanduser(where)
    if not os.path.isdir(root):
        problem = "is not a folder" if os.path.exists(root) else "does not exist"
        raise ValueError(f"folder source: {where!r} {problem}.")
    files, others = [], 0
    for directory, folders, names in os.walk(root, onerror=_reraise):
        folders[:] = [f for f in folders if not f.startswith(".")]
        inside = os.path.relpath(directory, root)
        for file in names:
            if file.startswith("."):
                continue
            if file.lower().endswith(EXTENSIONS):
                files.append(file if inside == "." else os.path.join(inside, file))
            else:
                others += 1
    if not files:
        what = f"{others} files but no image" if others else "no file"
        raise ValueError(
            f"folder source: {where!r} holds {what} (looked for {', '.join(EXTENSIONS)})."
        )
    files.sort()
    # The list is sorted, so what its ends share, all of it shares.
    parents = [f.split(os.sep)[:-1] for f in (files[0], files[-1])]
    shared = len(os.path.commonprefix(parents))
    folders = [f.split(os.sep)[shared:-1] for f in files]
    classes = targets = None
    if all(folders):
        classes, targets = number_classes(f[0] for f in folders)
    return FolderSource(root=root, files=tuple(files), classes=classes, targets=targets)


def _reraise(error: OSError) -> None:
    raise ValueError(f"folder source: {error.filename!r} cannot be read ({error.strerror}).")
