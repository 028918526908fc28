"""ViT-S/16 features by the libraries people use, random weights, float32: to time ours against.

    python tests/benchmarks/torch_features.py --library transformers|timm [--compile] [--batch 8]
        [--side 224] [--steps 10] [--json FILE]

`transformers` is DINOv3ViTModel (its default attention, sdpa), `timm` vit_small_patch16_dinov3.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import torch


def from_transformers(side: int) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12}
    model = DINOv3ViTModel(
        DINOv3ViTConfig(
            **shape,
            num_attention_heads=6,
            patch_size=16,
            image_size=side,
            num_register_tokens=0,
        )
    ).eval()
    return lambda images: model(images).pooler_output


def from_timm(side: int) -> Callable[[torch.Tensor], torch.Tensor]:
    import timm

    model = timm.create_model("vit_small_patch16_dinov3", num_reg_tokens=0, img_size=side)
    return model.eval().forward_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=("transformers", "timm"), required=True)
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.manual_seed(0)
    build = {"transformers": from_transformers, "timm": from_timm}[options.library]
    forward = build(options.side)
    forward = torch.compile(forward) if options.compile else forward
    images = torch.randn(options.batch, 3, options.side, options.side)
    seconds = []
    with torch.inference_mode():
        for _ in range(options.steps + 2):
            started = time.perf_counter()
            forward(images)
            seconds.append(time.perf_counter() - started)
    seconds = seconds[2:]  # two for compiling and warming up
    figures = {
        "seconds_per_step": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "torch": torch.__version__,
    }
    print(json.dumps(figures))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
