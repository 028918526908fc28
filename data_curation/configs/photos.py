"""A small pool of images from start to finish: embed, deduplicate, cluster, sample, mix, report.

    python -m data_curation run --config data_curation/configs/photos.py \
        embed.source=folder:/images embed.weights=runs/demo workdir=runs/photos

Then train on what was chosen: --config.data.source=curated:runs/photos/mixture.json

For some 1,000 to 100,000 images. Clusters follow the pool: for another size, set
`cluster.levels[0].k` to a twentieth of it, each higher level to a fifth of the one below, and
`sample[0].target` to what you want. Evaluation sets whose pictures must not remain:
`'dedup.references=("runs/val_embeddings",)'`.
"""

from ml_collections import ConfigDict

from data_curation import config as c


def get_config() -> ConfigDict:
    config = c.base()
    config.workdir = "runs/photos"
    config.embed.update({"source": "scenes:2000", "size": 64, "batch": 32})
    config.normalize = "l2"
    config.dedup.threshold = 0.96  # for a small backbone, all of whose images look alike
    config.cluster.levels = (
        c.level(100, n_samples=10, n_resamples=10),
        c.level(20, n_samples=3, n_resamples=10),
    )
    config.sample = (c.sample("balanced", 500),)
    config.report.update({"by": "label", "gallery": 6})
    return config
