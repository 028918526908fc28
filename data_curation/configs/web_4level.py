"""Web images in four levels, the lowest one split (Vo et al. 2024, arXiv 2405.15613; spec 1).

    python -m data_curation run --config data_curation/configs/web_4level.py \
        embeddings=s3://bucket/embeddings workdir=/runs/web

Published for 743 million rows that were left after deduplication, ViT-L features of 1,024 numbers,
neither normalised nor reduced: 100,000 pre-clusters x 100, then 500,000, 50,000 and 10,000
clusters; 16 nodes of 8 GPUs at the lowest level. Not run here at that size; `--dry-run` says what
it would cost.
"""

from ml_collections import ConfigDict

from data_curation import config as c


def get_config() -> ConfigDict:
    config = c.base()
    config.workdir = "runs/web_4level"
    config.plan.update({"rows": 743_000_000, "dim": 1024})  # until `embeddings` says
    config.dedup.method = "none"  # the published pool is deduplicated; for one that is not: below
    config.dedup.index = "ivf"
    config.cluster.init = "kmeans||"  # k-means++ takes as many passes as there are clusters
    config.cluster.levels = (
        c.level(100_000, n_splits=100),
        c.level(500_000, n_samples=10, n_resamples=10),
        c.level(50_000, n_samples=5, n_resamples=10),
        c.level(10_000, n_samples=3, n_resamples=10),
    )
    config.sample = (c.sample("web", 100_000_000),)
    return config
