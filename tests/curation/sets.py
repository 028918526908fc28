"""Small embedding sets and trees that the tests of curation share."""

import numpy as np
import pyarrow as pa

from data_curation.embeddings import EmbeddingWriter, open_embeddings
from data_curation.tree import ClusterTree, tree_level


def write_set(folder, vectors, columns, shard_rows=16, **about):
    """An embedding set on disk with these metadata columns; `about` goes into its manifest."""
    vectors = np.asarray(vectors, np.float32)
    writer = EmbeddingWriter(str(folder), vectors.shape[1], "float32", about=about)
    table = pa.table(columns)
    shards = range(0, len(vectors), shard_rows)
    for number, first in enumerate(shards):
        here = slice(first, first + shard_rows)
        writer.write(number, vectors[here], table.slice(first, shard_rows))
    writer.finish(len(shards))
    return open_embeddings(str(folder))


def small_tree(vectors, low, high):
    """Two levels over `vectors`: cluster of each row (-1: none), cluster of each cluster."""
    vectors, low, high = np.asarray(vectors, np.float32), np.asarray(low), np.asarray(high)
    centroids = np.stack([vectors[low == k].mean(0) for k in range(low.max() + 1)])
    dist = ((vectors - centroids[low]) ** 2).sum(1).astype(np.float32)
    dist[low < 0] = np.nan
    above = np.stack([centroids[high == k].mean(0) for k in range(high.max() + 1)])
    gap = ((centroids - above[high]) ** 2).sum(1).astype(np.float32)
    return ClusterTree((tree_level(centroids, low, dist), tree_level(above, high, gap)))
