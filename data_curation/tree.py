"""A hierarchy of clusters: who belongs to whom, level by level, on disk or in memory.

Level 1 groups the rows of an embedding set, level l the clusters of level l - 1. Made by
`hierarchy.py`, read by `allot.py`, `sample.py`, retrieval and the reports. Section 2 of the
curation spec says what the files are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, Int64

from data_curation.files import read_json, sha256, write_json, write_npy

ARRAYS = ("centroids", "parent", "dist", "members", "offsets")


@dataclass(frozen=True)
class TreeLevel:
    """The k clusters of one level over n inputs, of which m belong to one (all but at level 1)."""

    centroids: Float32[np.ndarray, "k d"]
    parent: Int[np.ndarray, " n"]  # cluster of each input; -1: not in the tree
    dist: Float32[np.ndarray, " n"]  # to its centroid, squared (l2); NaN: not in the tree
    members: Int[np.ndarray, " m"]  # inputs by cluster, nearest to its centroid first
    offsets: Int64[np.ndarray, " k+1"]  # cluster i: members[offsets[i]:offsets[i + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sizes(self) -> Int64[np.ndarray, " k"]:
        """Members of each cluster."""
        return np.diff(self.offsets)


def tree_level(
    centroids: Float32[np.ndarray, "k d"],
    parent: Int[np.ndarray, " n"],
    dist: Float32[np.ndarray, " n"],
) -> TreeLevel:
    """A level from the cluster of each input (-1: none), members sorted by distance, then by row.

    Indices are int32 where they fit.
    """
    count = len(centroids)
    members = np.lexsort((dist, parent))  # stable: of equal distances the lower row is first
    sizes = np.bincount(parent[parent >= 0], minlength=count)
    outside = len(parent) - int(sizes.sum())
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return TreeLevel(
        centroids,
        parent.astype(index_dtype(count), copy=False),
        dist,
        members[outside:].astype(index_dtype(len(parent))),
        offsets,
    )


def drop_empty(
    centroids: Float32[np.ndarray, "k d"], parent: Int[np.ndarray, " n"]
) -> tuple[Float32[np.ndarray, "c d"], Int[np.ndarray, " n"]]:
    """Centroids with members, and the inputs' clusters renumbered in order."""
    held = np.bincount(parent, minlength=len(centroids)) > 0
    return centroids[held], (np.cumsum(held) - 1)[parent]


@dataclass(frozen=True)
class ClusterTree:
    """Levels of clusters, lowest first. Rows are those of the full embedding set."""

    levels: tuple[TreeLevel, ...]

    def __post_init__(self) -> None:
        for number, (below, level) in enumerate(zip(self.levels, self.levels[1:]), start=2):
            if len(level.parent) != len(below):
                raise ValueError(
                    f"level {number} of the tree groups {len(level.parent)} clusters; expected "
                    f"the {len(below)} of level {number - 1}"
                )

    @classmethod
    def from_lists(cls, *levels: Sequence[Int[np.ndarray, " _"]]) -> "ClusterTree":
        """A tree without centroids from the members of each cluster, level 1 first.

        Members are taken to be in the order nearest first; each one's place is its distance.

        Raises:
          ValueError: an input is in two clusters, or a cluster in none.
        """
        made: list[TreeLevel] = []
        for number, clusters in enumerate(levels, start=1):
            sizes = np.array([len(cluster) for cluster in clusters], np.int64)
            offsets = np.concatenate(([0], np.cumsum(sizes)))
            members = np.concatenate([np.zeros(0, np.int64), *clusters]).astype(np.int64)
            inputs = len(made[-1]) if made else int(members.max(initial=-1)) + 1
            _check_members(members, inputs, number)
            parent, dist = np.full(inputs, -1), np.full(inputs, np.nan, np.float32)
            parent[members] = np.repeat(np.arange(len(sizes)), sizes)
            dist[members] = ranks(offsets)
            made.append(
                TreeLevel(np.zeros((len(sizes), 0), np.float32), parent, dist, members, offsets)
            )
        return cls(tuple(made))

    @property
    def depth(self) -> int:
        """Number of levels."""
        return len(self.levels)

    def __len__(self) -> int:
        """Rows in the tree."""
        return len(self.levels[0].members)

    def leaf_counts(self, level: int) -> Int64[np.ndarray, " k"]:
        """Rows under each cluster of a level, counted from 1."""
        counts = self.levels[0].sizes()
        for above in self.levels[1 : self._index(level) + 1]:
            running = np.concatenate(([0], np.cumsum(counts[above.members])))
            counts = running[above.offsets[1:]] - running[above.offsets[:-1]]
        return counts

    def cluster_of(self, rows: Int[np.ndarray, " n"], level: int) -> Int64[np.ndarray, " n"]:
        """Cluster of each row at a level, counted from 1; -1 for rows outside the tree."""
        found = np.asarray(self.levels[0].parent[rows], np.int64)
        for above in self.levels[1 : self._index(level) + 1]:
            found = np.where(found < 0, np.int64(-1), above.parent[found])
        return found

    def without(self, rows: Int[np.ndarray, " n"]) -> "ClusterTree":
        """The same clusters with these rows taken out; a cluster may be left empty.

        For removals after the fact: sampling from it shares the target among what is left.
        """
        lowest = self.levels[0]
        parent, dist = np.array(lowest.parent), np.array(lowest.dist)
        parent[rows], dist[rows] = -1, np.nan
        keep = parent[lowest.members] >= 0
        running = np.concatenate(([0], np.cumsum(keep)))
        level = TreeLevel(
            lowest.centroids, parent, dist, lowest.members[keep], running[lowest.offsets]
        )
        return ClusterTree((level, *self.levels[1:]))

    def save(self, directory: str | Path) -> None:
        """Writes `level1/*.npy`, ... and, last, `tree.json` with counts and digests."""
        directory = Path(directory)
        for number, level in enumerate(self.levels, start=1):
            save_level(level, directory / f"level{number}")
        save_tree(directory, self)

    @classmethod
    def load(cls, directory: str | Path, verify: bool = False) -> "ClusterTree":
        """Opens what `save` wrote; arrays stay on disk until they are read.

        Args:
          directory: the work folder, with `tree.json`.
          verify: compare the digests of all files, which reads them.

        Raises:
          ValueError: no tree there, or a file that is not the one `tree.json` describes.
        """
        directory = Path(directory)
        if not (directory / "tree.json").exists():
            raise ValueError(f"{directory} has no tree.json; expected a folder with a cluster tree")
        stated = read_json(directory / "tree.json")["levels"]
        levels = []
        for number, facts in enumerate(stated, start=1):
            folder = directory / f"level{number}"
            level = load_level(folder)
            if (len(level), len(level.parent)) != (facts["clusters"], facts["inputs"]):
                raise ValueError(
                    f"{folder} holds {len(level)} clusters of {len(level.parent)} inputs; expected "
                    f"{facts['clusters']} of {facts['inputs']}, as tree.json says"
                )
            if verify:
                _verify(folder, facts["sha256"])
            levels.append(level)
        return cls(tuple(levels))

    def _index(self, level: int) -> int:
        if not 1 <= level <= self.depth:
            nearest = min(max(level, 1), self.depth)
            raise ValueError(f"level {level} of {self.depth} levels; nearest: {nearest}")
        return level - 1


def save_level(level: TreeLevel, folder: Path) -> None:
    """Writes the five arrays of one level."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ARRAYS:
        write_npy(folder / f"{name}.npy", getattr(level, name))


def load_level(folder: Path) -> TreeLevel:
    """Opens the five arrays of one level, mapped into memory."""
    return TreeLevel(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS))


def save_tree(directory: Path, tree: ClusterTree) -> None:
    """Writes leaf counts and `tree.json` beside levels that are saved already."""
    described = []
    for number, level in enumerate(tree.levels, start=1):
        folder = directory / f"level{number}"
        write_npy(folder / "leaf_counts.npy", tree.leaf_counts(number))
        files = [f"{name}.npy" for name in (*ARRAYS, "leaf_counts")]
        described.append(
            {
                "clusters": len(level),
                "inputs": len(level.parent),
                "members": len(level.members),
                "dim": level.centroids.shape[1],
                "dtype": str(level.parent.dtype),
                "leaf_counts": f"level{number}/leaf_counts.npy",
                "sha256": {file: sha256(folder / file) for file in files},
            }
        )
    write_json(directory / "tree.json", {"version": 1, "rows": len(tree), "levels": described})


def ranks(offsets: Int[np.ndarray, " h"]) -> Int64[np.ndarray, " n"]:
    """Place of each element within its segment: 0, 1, .. for offsets[i]:offsets[i + 1]."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


def runs(sizes: Int[np.ndarray, " k"], limit: int) -> Iterator[slice]:
    """Runs of clusters of at most `limit` members together, or of one that has more."""
    ends = np.cumsum(sizes)
    start = before = 0
    while start < len(sizes):
        stop = max(int(np.searchsorted(ends, before + limit, side="right")), start + 1)
        yield slice(start, stop)
        start, before = stop, int(ends[stop - 1])


def index_dtype(count: int) -> type[np.signedinteger]:
    """int32 where indices below `count` fit."""
    return np.int32 if count <= 2**31 - 1 else np.int64


def _check_members(members: Int64[np.ndarray, " m"], inputs: int, number: int) -> None:
    times = np.bincount(members, minlength=inputs)
    wrong = np.flatnonzero(times > 1 if number == 1 else times != 1)
    if len(wrong):
        what = "row" if number == 1 else f"cluster of level {number - 1}"
        raise ValueError(
            f"{what} {wrong[0]} is in {times[wrong[0]]} clusters of level {number}; expected 1"
        )


def _verify(folder: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        if sha256(folder / name) != digest:
            raise ValueError(
                f"{folder / name} has changed since tree.json was written; expected sha256 {digest}"
            )
