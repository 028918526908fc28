"""k-NN classification with frozen features: the default online metric (evaluation spec, section 1).

Cosine similarity to every labelled image of a bank; the K nearest vote with softmax(similarity / T)
weights. Called by `train.py` with its teacher, by `dinojax evaluate knn`, and with raw pixels as
the floor that a useful backbone must clear (the untrained network is the other one).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt8

from dinojax import sharding
from dinojax.eval.common import FeaturesFn, Images, extract

TEMPERATURE = 0.07
_BANK_CHUNK = 8192  # rows of the bank compared at a time: similarities never exceed [chunk, this]
_QUERY_CHUNK = 256


@partial(jax.jit, static_argnames="k")
def nearest(
    queries: Float[Array, "q d"], bank: Float[Array, "chunks m d"], count: Int[Array, ""], k: int
) -> tuple[Float[Array, "q k"], Int[Array, "q k"]]:
    """Similarities and bank rows of the k largest dot products, largest first.

    `bank` is cut into equal chunks; only its first `count` rows exist. float32 throughout.
    """
    chunks, rows, _ = bank.shape

    def merge(best, item):
        chunk, offset = item
        similarity = jnp.einsum("qd,md->qm", queries, chunk, precision="highest")
        index = offset + jnp.arange(rows)
        similarity = jnp.where((index < count)[None], similarity, -jnp.inf)
        # The k best of a chunk first: top_k over the short list is all the merging costs.
        top, where = jax.lax.top_k(similarity, min(k, rows))
        values = jnp.concatenate([best[0], top], axis=1)
        indices = jnp.concatenate([best[1], offset + where], axis=1)
        top, where = jax.lax.top_k(values, k)
        return (top, jnp.take_along_axis(indices, where, axis=1)), None

    start = (
        jnp.full((len(queries), k), -jnp.inf, jnp.float32),
        jnp.zeros((len(queries), k), jnp.int32),
    )
    best, _ = jax.lax.scan(merge, start, (bank, rows * jnp.arange(chunks)))
    return best


def vote(
    similarity: Float[np.ndarray, "q k"],
    labels: Int[np.ndarray, "q k"],
    ks: Sequence[int],
    classes: int,
    temperature: float = TEMPERATURE,
) -> Float[np.ndarray, "t q z"]:
    """Class scores for each k of `ks` (t of them), z = classes; columns in order of similarity.

    The weights are normalised over all neighbours given, not over the first k (spec 1, item 4).
    """
    weights = np.exp((similarity - similarity[:, :1]) / temperature)
    weights /= weights.sum(axis=1, keepdims=True)
    scores = np.zeros((len(ks), len(labels), classes), np.float32)
    rows = np.arange(len(labels))[:, None]
    for table, k in zip(scores, ks):
        np.add.at(table, (rows, labels[:, :k]), weights[:, :k])
    return scores


def knn_scores(
    bank: Float[ArrayLike, "t d"],
    bank_labels: Int[ArrayLike, " t"],
    queries: Float[ArrayLike, "q d"],
    ks: Sequence[int] = (20,),
    temperature: float = TEMPERATURE,
    skip_first: bool = False,
) -> dict[int, np.ndarray]:
    """Class scores [q, classes] float32 of the queries, one array for each k.

    A k beyond the bank is capped at its size. `skip_first` drops each query's nearest row: for a
    bank that contains the queries themselves.
    """
    bank, queries = normalise(bank), normalise(queries)
    bank_labels = np.asarray(bank_labels, np.int32)
    size, dim = bank.shape
    usable = size - int(skip_first)
    if usable < 1:
        raise ValueError(f"the k-NN bank holds {size} images; at least one neighbour is needed.")
    ks = tuple(sorted({min(k, usable) for k in ks}))
    if ks[0] < 1:
        raise ValueError(f"k = {ks[0]} neighbours; expected at least 1.")
    rows = min(_BANK_CHUNK, size)
    chunks = -(-size // rows)
    padded = np.zeros((chunks * rows, dim), np.float32)
    padded[:size] = bank
    bank_there, count = _place(padded.reshape(chunks, rows, dim)), _place(np.int32(size))
    first = int(skip_first)
    classes, scores = int(bank_labels.max()) + 1, []
    for start in range(0, len(queries), _QUERY_CHUNK):
        part = queries[start : start + _QUERY_CHUNK]
        block = np.zeros((min(_QUERY_CHUNK, len(queries)), dim), np.float32)
        block[: len(part)] = part
        found = nearest(_place(block), bank_there, count, ks[-1] + first)
        similarity, index = jax.device_get(found)
        similarity, index = similarity[: len(part), first:], index[: len(part), first:]
        scores.append(vote(similarity, bank_labels[index], ks, classes, temperature))
    return dict(zip(ks, np.concatenate(scores, axis=1)))


def _place(x: Any) -> jax.Array:
    """Onto the devices, whole on each one of the run's mesh where there is one.

    Explicitly: the trainer's transfer guard stops everything implicit.
    """
    mesh = jax.sharding.get_mesh()
    return jax.device_put(x, None if mesh.empty else sharding.replicated(mesh))


def accuracy(
    scores: Float[np.ndarray, "q z"], labels: Int[np.ndarray, " q"], top: int = 1
) -> float:
    """Percentage of the queries whose label is among their `top` highest scores.

    A query whose label never occurs in the bank counts as wrong.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return 100.0 * float(np.mean((best == labels[:, None]).any(axis=1)))


def normalise(x: Float[ArrayLike, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length 1 in float32 (a row of zeros stays so)."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def pixels(images: UInt8[np.ndarray, "n i j c"]) -> Float[np.ndarray, "n d"]:
    """Raw pixels, d = i*j*c, in [0, 1]: a `features_fn` that needs no network.

    Nothing is subtracted. On CIFAR-10 (45,000 images in the bank, k = 20) this scores 34.6%, and
    44.3% with mid-grey subtracted, which is the stricter floor where the cosine is concerned.
    """
    return images.reshape(len(images), -1).astype(np.float32) / 255


class Evaluator:
    """k-NN accuracy of the labels of `queries` among those of `bank`.

    Args:
        bank, queries: labelled sources, opened or as SPECs.
        size, resize: the image side that the network sees; see `eval.common.fit`.
        k: numbers of neighbours, each reported.
        batch: images in a call of the features function.
        bank_limit, query_limit: use so many images of each, spread evenly (None: all).
        skip_first: drop each query's nearest neighbour (bank and queries are the same images).
    """

    def __init__(
        self,
        bank: Any,
        queries: Any,
        size: int,
        resize: int | None = None,
        k: Sequence[int] = (20,),
        batch: int = 64,
        temperature: float = TEMPERATURE,
        bank_limit: int | None = None,
        query_limit: int | None = None,
        skip_first: bool = False,
    ):
        self.bank = Images(bank, size, resize, bank_limit)
        self.queries = Images(queries, size, resize, query_limit)
        self.k, self.batch = tuple(k), batch
        self.temperature, self.skip_first = temperature, skip_first

    def run(self, features_fn: FeaturesFn) -> Iterator[tuple[str, float]]:
        """Yields ("knn20/top1", percentage) and, with at least 5 classes, ("knn20/top5", ...)."""
        bank, bank_labels = extract(features_fn, self.bank, self.batch)
        queries, labels = extract(features_fn, self.queries, self.batch)
        scores = knn_scores(bank, bank_labels, queries, self.k, self.temperature, self.skip_first)
        for k, table in scores.items():
            yield f"knn{k}/top1", accuracy(table, labels)
            if table.shape[1] >= 5:
                yield f"knn{k}/top5", accuracy(table, labels, top=5)

    def pixel_knn(self) -> Iterator[tuple[str, float]]:
        """The same with raw pixels for features: the floor under every network."""
        yield from self.run(pixels)
