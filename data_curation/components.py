"""Connected components of a stream of edges, without ever holding the edges.

Union-find over 8 bytes a row, a batch of edges at a time: every root that has a smaller neighbour
is hung under the smallest, paths are halved until flat, and again until nothing hangs. A component
is called after its smallest row. Called by `dedup.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, Int64

_BATCH = 1 << 22  # edges joined at a time
_CHUNK = 1 << 22  # rows relabelled at a time


@dataclass(frozen=True)
class UnionFind:
    """A forest over rows 0 to n - 1; `parent[i] <= i`. `add` edges, then ask for `labels`."""

    parent: Int64[np.ndarray, " n"] = field(repr=False)

    @classmethod
    def empty(cls, n: int) -> "UnionFind":
        """Every row on its own."""
        return cls(np.arange(n))

    def add(self, edges: Int[np.ndarray, "m 2"]) -> None:
        """Join both ends of every edge."""
        if len(edges) and not 0 <= edges.min() <= edges.max() < len(self.parent):
            wrong = edges.min() if edges.min() < 0 else edges.max()
            raise ValueError(f"an edge ends at row {wrong} of {len(self.parent)}.")
        for first in range(0, len(edges), _BATCH):
            self._join(edges[first : first + _BATCH].astype(np.int64, copy=False))

    def _join(self, edges: Int64[np.ndarray, "m 2"]) -> None:
        parent = self.parent
        while len(edges):
            nodes = edges.reshape(-1)
            self._flatten(nodes)
            roots = parent[nodes].reshape(-1, 2)
            edges = np.sort(roots[roots[:, 0] != roots[:, 1]], axis=1)
            # Smaller rows are never hung under larger ones, so there are no circles.
            np.minimum.at(parent, edges[:, 1], edges[:, 0])

    def _flatten(self, nodes: Int64[np.ndarray, " m"]) -> None:
        """Make roots the parents of these nodes; halves all of their paths at once."""
        parent = self.parent
        while True:
            up = parent[nodes]
            above = parent[up]
            if np.array_equal(up, above):
                return
            parent[nodes] = above

    def labels(self) -> Int64[np.ndarray, " n"]:
        """The smallest row of every row's component."""
        for first in range(0, len(self.parent), _CHUNK):
            # Parents are smaller rows, so those of the chunks before are roots already.
            self._flatten(np.arange(first, min(first + _CHUNK, len(self.parent))))
        return self.parent


def connected_components(
    n: int, edges: Int[np.ndarray, "m 2"] | Iterable[Int[np.ndarray, "_ 2"]]
) -> Int64[np.ndarray, " n"]:
    """The smallest row of every row's component.

    Args:
      n: rows.
      edges: undirected, in any order, repeated or not; or a stream of such arrays.
    """
    forest = UnionFind.empty(n)
    for part in [edges] if isinstance(edges, np.ndarray) else edges:
        forest.add(part)
    return forest.labels()
