"""Pool rows like those of seed sets: near single rows, or from the clusters that they lie in.

DINOv2, arXiv 2304.07193, A.4 and data curation spec, section 8. Called by the stage `retrieve`,
which writes the rows with `chosen.write_chosen`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int, Int64

from data_curation.embeddings import as_embeddings
from data_curation.search import knn
from dinojax.data.options import nearest

COLLISIONS = ("merge", "fill")
BINS = 100  # of the similarity histogram, over [0, 1]
_EXAMPLES = 32


class Retrieved(NamedTuple):
    """Of `retrieve_samples`: distinct rows of the pool's full set, ascending."""

    rows: Int64[np.ndarray, " m"]
    count: Int64[np.ndarray, " m"]  # queries that asked for it
    query: Int64[np.ndarray, " m"]  # row of the most similar of them
    sim: Float32[np.ndarray, " m"]  # cosine to that one
    report: dict[str, Any]


class FromClusters(NamedTuple):
    """Of `retrieve_clusters`: distinct rows, ascending."""

    rows: Int64[np.ndarray, " m"]
    cluster: Int64[np.ndarray, " m"]
    eligible: Int64[np.ndarray, " c"]  # clusters with enough queries
    take: Int64[np.ndarray, " c"]  # rows drawn from each, before the cap
    report: dict[str, Any]


def retrieve_samples(
    pool: Any,
    queries: Any,
    n: int = 4,
    collisions: str = "merge",
    *,
    max_rank: int = 128,
    index: str = "auto",
    mesh: Mesh | None = None,
    seed: int = 0,
    stop: Callable[[], bool] | None = None,
    **lists: Any,
) -> Retrieved:
    """The `n` pool rows nearest to every query by cosine.

    Args:
      pool, queries: arrays or `EmbeddingSet`s.
      collisions: "merge": a row that several queries ask for comes once, with `count`, so there
        are fewer than n x queries rows. "fill": further neighbours make up for them, those of the
        highest similarity first.
      max_rank: "fill" looks at so many neighbours of each query, and then may still come short.
      index, mesh, seed, stop, lists: of the search, see `search.knn`.

    Raises:
      ValueError: unknown `collisions`; n over the pool or, for "fill", over `max_rank`.
    """
    pool, queries = as_embeddings(pool), as_embeddings(queries)
    if collisions not in COLLISIONS:
        raise ValueError(f"collisions is {collisions!r}; {nearest(str(collisions), COLLISIONS)}")
    depth = min(max_rank, len(pool)) if collisions == "fill" else n
    if not 1 <= n <= len(pool) or n > depth:
        raise ValueError(
            f"retrieval of n = {n} neighbours from {len(pool)} pool rows, {depth} deep; expected "
            f"1 to {min(depth, len(pool))}."
        )
    ids, sims = knn(queries, pool, depth, index=index, mesh=mesh, seed=seed, stop=stop, **lists)
    asked = queries.row_of(np.arange(len(queries)))
    found = _merge(ids[:, :n], sims[:, :n], asked)
    wanted, merged = n * len(queries), len(found[0])
    if collisions == "fill":
        found = _fill(found, ids[:, n:], sims[:, n:], asked, wanted)
    rows, count, query, sim = found
    report = {
        **{"queries": len(queries), "n": n, "collisions": collisions, "rows": len(rows)},
        "collided": wanted - merged,
        "filled": len(rows) - merged,
        "similarities": np.histogram(sim, BINS, (0, 1))[0],
        "examples": _examples(pool, queries, rows, query, sim, seed),
    }
    return Retrieved(rows, count, query, sim, report)


def _merge(
    ids: Int64[np.ndarray, "q n"], sims: Float32[np.ndarray, "q n"], asked: Int64[np.ndarray, " q"]
) -> tuple[np.ndarray, ...]:
    """Distinct rows, times each was asked for, and by whom most fittingly (the lower query)."""
    query = np.broadcast_to(asked[:, None], ids.shape)[ids >= 0]
    ids, sims = ids[ids >= 0], sims[ids >= 0]
    order = np.lexsort((query, -sims, ids))
    rows, first, count = np.unique(ids[order], return_index=True, return_counts=True)
    best = order[first]
    return rows, count, query[best], sims[best]


def _fill(
    found: tuple[np.ndarray, ...],
    ids: Int64[np.ndarray, "q r"],
    sims: Float32[np.ndarray, "q r"],
    asked: Int64[np.ndarray, " q"],
    wanted: int,
) -> tuple[np.ndarray, ...]:
    """Rows of lower ranks that are not there yet, the most similar first, up to `wanted`."""
    more = _merge(np.where(np.isin(ids, found[0]), -1, ids), sims, asked)
    best = np.lexsort((more[0], -more[3]))[: wanted - len(found[0])]
    rows, _, query, sim = (part[best] for part in more)
    parts = zip(found, (rows, np.ones_like(rows), query, sim))
    whole = [np.concatenate(part) for part in parts]
    order = np.argsort(whole[0])
    return tuple(part[order] for part in whole)


def _examples(
    pool: Any,
    queries: Any,
    rows: Int64[np.ndarray, " m"],
    query: Int64[np.ndarray, " m"],
    sim: Float32[np.ndarray, " m"],
    seed: int,
) -> list[dict[str, Any]]:
    """Some pairs by id."""
    rng = np.random.default_rng((seed, 0x3F))
    some = np.sort(rng.choice(len(rows), min(len(rows), _EXAMPLES), replace=False))
    ids, asked = pool.ids(rows[some]).to_pylist(), queries.ids(query[some]).to_pylist()
    return [
        {"id": one, "query_id": by, "sim": round(float(cosine), 4)}
        for one, by, cosine in zip(ids, asked, sim[some])
    ]


def retrieve_clusters(
    pool_assign: Int[np.ndarray, " p"],
    query_assign: Int[np.ndarray, " q"],
    per_cluster: int = 10_000,
    min_queries: int = 3,
    cap: int = 1_000_000,
    seed: int = 0,
) -> FromClusters:
    """Pool rows of the clusters in which more than `min_queries` queries lie.

    From each, `per_cluster` rows uniformly without replacement, or all if it has fewer; then, of
    all of them, `cap` uniformly. What is drawn from a cluster depends on the seed and its number
    only.

    Args:
      pool_assign: cluster of every row (-1: none, such as rows that deduplication removed).
      query_assign: cluster of every query.
    """
    for name, value in {"per_cluster": per_cluster, "cap": cap}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1.")
    clusters, queries = np.unique(query_assign[query_assign >= 0], return_counts=True)
    eligible = clusters[queries > min_queries].astype(np.int64)
    order = np.argsort(pool_assign, kind="stable")
    starts = np.searchsorted(pool_assign, eligible, side="left", sorter=order)
    stops = np.searchsorted(pool_assign, eligible, side="right", sorter=order)
    take = np.minimum(stops - starts, per_cluster)
    drawn = [np.empty(0, np.int64)]
    for cluster, start, stop, count in zip(eligible.tolist(), starts, stops, take):
        members, rng = order[start:stop], np.random.default_rng((seed, 0x4F, cluster))
        drawn.append(members if count == len(members) else rng.choice(members, count, False))
    rows = np.sort(np.concatenate(drawn))
    before = len(rows)
    if before > cap:
        rows = np.sort(np.random.default_rng((seed, 0x5F)).choice(rows, cap, replace=False))
    report = {
        **{"queries": len(query_assign), "clusters": len(clusters), "eligible": len(eligible)},
        **{"before_cap": before, "rows": len(rows)},
    }
    return FromClusters(rows, pool_assign[rows].astype(np.int64), eligible, take, report)


def overlap(sets: Mapping[str, Int64[np.ndarray, "..."]]) -> dict[str, dict[str, int]]:
    """Rows that every two retrieved sets share; on the diagonal, the distinct rows of each."""
    return {
        a: {b: len(np.intersect1d(rows, others)) for b, others in sets.items()}
        for a, rows in sets.items()
    }
