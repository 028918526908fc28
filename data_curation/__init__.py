"""Curation of training sets from embeddings: deduplicate, cluster, sample, retrieve, mix.

python -m data_curation run --config ring2d workdir=runs/ring2d

Every step is also a function, of arrays or of embedding sets that are larger than memory:

import data_curation
tree = data_curation.hierarchical_kmeans(x, [data_curation.Level(1000, 15, 10)])
rows = data_curation.hierarchical_sample(tree, 10_000)
"""

import importlib
import sys
from types import ModuleType
from typing import Any

_PUBLIC = {
    "allot": "allot",
    "balance": "balance_metrics kl_from_uniform",
    "components": "connected_components",
    "dedup": "self_dedup",
    "embeddings": "EmbeddingSet EmbeddingWriter as_embeddings index open_embeddings",
    "hierarchy": "Level hierarchical_kmeans",
    "kmeans": "KMeansResult assign kmeans",
    "relative": "relative_dedup",
    "retrieve": "retrieve_clusters retrieve_samples",
    "sample": "flat_sample hierarchical_sample",
    "search": "knn",
    "seeding": "kmeans_plusplus",
    "semdedup": "semdedup",
    "tree": "ClusterTree",
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted(_HOME)


class _Package(ModuleType):
    """Names on demand: a config imports this package and must not start jax.

    Some files are called as the function they hold. Python would put the file in the function's
    place as soon as anybody imports it.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'data_curation' has no attribute {name!r}")
        return getattr(importlib.import_module(f"data_curation.{_HOME[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
