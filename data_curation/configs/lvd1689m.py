"""The hierarchy of LVD-1689M (DINOv3, arXiv 2508.10104, section 3.1). NOT RUN HERE.

    python -m data_curation run --config data_curation/configs/lvd1689m.py --dry-run

17 billion moderated web images, 200 million, 8 million, 800,000, 100,000 and 25,000 clusters, of
which 1,689 million images are taken. Not published, and chosen here:

- the two lowest levels are split (100,000 pre-clusters x 2,000; 20,000 x 400), since comparing all
  rows with all centroids would take 7e21 operations an iteration (spec 10);
- a split level is not resampled; above, samples per cluster are half the average members, ten
  times, which is the rule of Vo et al. for a new run;
- the features: 1,024 numbers of a DINOv2 ViT-L;
- exact search is out of reach at this size, so duplicates are looked for in inverted lists.

`plan` describes a pod of 256 TPU v5p chips on 64 hosts of 448 GB. The dry run prints what each
stage costs and then refuses: the tree of level 1 (200 million centroids, the order of 17 billion
rows) is put together in the memory of one host, which would need 1.4 TB; and only one host looks
for duplicates. docs/curation.md has the cost model.
"""

from ml_collections import ConfigDict

from data_curation import config as c


def get_config() -> ConfigDict:
    config = c.base()
    config.workdir = "runs/lvd1689m"
    config.plan.update(
        {
            "rows": 17_000_000_000,
            "dim": 1024,
            "hosts": 64,
            "devices": 256,
            # 459e12 in bfloat16 is the maker's figure. A float32 product (Precision.HIGHEST) takes
            # six passes of it; half of the rest is a guess: nothing was measured on a TPU.
            "flops": 38e12,
            "read": 2e9,
        }
    )
    config.budget.update({"host_memory": 448.0, "device_memory": 95.0, "disk": 100_000.0})
    config.dedup.index = "ivf"
    config.cluster.init = "kmeans||"  # k-means++ takes as many passes as there are clusters
    config.cluster.levels = (
        c.level(100_000, n_splits=2000),
        c.level(20_000, n_splits=400),
        c.level(800_000, n_samples=5, n_resamples=10),
        c.level(100_000, n_samples=4, n_resamples=10),
        c.level(25_000, n_samples=2, n_resamples=10),
    )
    config.sample = (c.sample("lvd", 1_689_000_000),)
    return config
