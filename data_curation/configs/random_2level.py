"""Standard normal points, without any structure: a smoke test of every stage, not of balance.

    python -m data_curation run --config data_curation/configs/random_2level.py workdir=runs/random

The published example (spec 1): 100,000 x 256, 5,000 and 1,000 clusters, 20,000 samples. Resampling
collapses such data into one large cluster (spec 15.7), which the report must warn of.
`--config data_curation/configs/random_2level.py:small` has a fiftieth of the rows.
"""

from ml_collections import ConfigDict

from data_curation import config as c


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "small"):
        raise ValueError(f"the variant is {variant!r}; there is 'small'")
    shrink = 50 if variant else 1
    config = c.base()
    config.workdir = "runs/random_2level"
    config.embed.source = f"normal:{100_000 // shrink}x{256 if not variant else 64}"
    config.dedup.method = "none"
    config.cluster.levels = (
        c.level(5000 // shrink, n_samples=10, n_resamples=10),
        c.level(1000 // shrink, n_samples=3, n_resamples=10),
    )
    config.sample = (c.sample("balanced", 20_000 // shrink),)
    return config
