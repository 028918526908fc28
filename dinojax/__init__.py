"""dinojax: self-supervised pretraining of DINOv3-style backbones in JAX."""
