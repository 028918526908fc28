"""dinojax: self-supervised pretraining of DINOv3-style backbones in JAX.

import dinojax
backbone = dinojax.load("runs/a")
features = backbone.features(images)    # .cls, .patches, .storage
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # On demand: `import dinojax` stays cheap, and configs under it never start jax.
    if name in ("load", "Backbone"):
        from dinojax import backbone

        return getattr(backbone, name)
    raise AttributeError(f"module 'dinojax' has no attribute {name!r}")
