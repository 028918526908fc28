"""A curation of seconds: two levels over a few hundred points."""

from ml_collections import ConfigDict

from data_curation import config as c


def get_config() -> ConfigDict:
    config = c.base()
    config.embed.update({"source": "normal:600x8", "dtype": "float32"})
    config.dedup.update({"k": 8, "threshold": 0.97})
    config.cluster.n_iters = 5
    config.cluster.levels = (c.level(24, n_samples=6, n_resamples=2), c.level(6))
    config.sample = (c.sample("small", 100),)
    return config
