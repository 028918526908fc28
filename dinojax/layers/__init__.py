"""Building blocks of the backbones (Flax NNX declarations and pure functions)."""
