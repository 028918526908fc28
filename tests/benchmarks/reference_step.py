"""The step of the public reference implementation, run from a checkout: no part of the project.

The same work as `torch_step.py` (ViT-S/16, batch 4, two 224-pixel and eight 96-pixel crops,
K = 4,096, float32, no stochastic depth, fixed data), through the reference's own meta architecture,
losses, parameter groups, clipping, AdamW and EMA. The reference is written for GPUs: `Tensor.cuda`
is made to return the tensor itself, and FSDP and torch.compile are left out.

    git clone https://github.com/facebookresearch/dinov3 /path/to/dinov3
    python tests/benchmarks/reference_step.py --reference /path/to/dinov3 [--what step|gram|forward]
"""

import copy
import os
import sys

import torch
from torch_step import BATCH, LOCALS, PROTOTYPES, command_line, make_masks, measure, report


def make_model(with_gram):
    """The reference's training model with its own initialisation, on the CPU."""
    import dinov3.distributed as distributed
    from dinov3.configs import get_default_config
    from dinov3.train.ssl_meta_arch import SSLMetaArch

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo")
    wrapper = sys.modules[distributed.get_process_subgroup.__module__]
    wrapper._DEFAULT_PROCESS_GROUP = torch.distributed.group.WORLD
    torch.Tensor.cuda = lambda self, **_: self

    config = get_default_config()
    config.student.arch = "vit_small"
    config.student.drop_path_rate = 0.0
    config.student.pos_embed_rope_dtype = "fp32"
    config.dino.head_n_prototypes = config.ibot.head_n_prototypes = PROTOTYPES
    if with_gram:
        config.gram.use_loss = True
        config.gram.it_load_ema_teacher = 0
        config.crops.gram_teacher_crops_size = 448
    with torch.device("meta"):
        model = SSLMetaArch(config)
    model.to_empty(device="cpu")
    model.has_gram_teacher = False  # its start asks for a file; it is loaded from the EMA below
    model.init_weights()
    model.has_gram_teacher = with_gram
    if with_gram:
        model.gram_load_ema_teacher()
    model.train()
    return model, config


def make_batch(with_gram):
    """Fixed random crops and masks, collated as the reference's own collation does."""
    masks = make_masks()
    indices = masks.flatten().nonzero().flatten()
    weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    batch = {
        "collated_global_crops": torch.randn(2 * BATCH, 3, 224, 224),
        "collated_local_crops": torch.randn(LOCALS * BATCH, 3, 96, 96),
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": weights,
        "upperbound": len(indices),
        "n_masked_patches": torch.full((1,), len(indices), dtype=torch.long),
        "global_batch_size": BATCH,
    }
    if with_gram:
        batch["collated_gram_teacher_crops"] = torch.randn(2 * BATCH, 3, 448, 448)
    return batch


def make_step(with_gram):
    """A function that makes one whole training step on fixed data and returns the loss."""
    model, config = make_model(with_gram)
    groups = model.get_params_groups()
    for group in groups:
        group["lr"] = 1e-4 * group["lr_multiplier"]
        group["weight_decay"] = 0.04 * group["wd_multiplier"]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    batch = make_batch(with_gram)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss, _ = model.forward_backward(batch, teacher_temp=0.05)
        for network in model.student.values():
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.optim.clip_grad)
        optimizer.step()
        model.update_ema(0.992)
        return loss.item()

    return step


def make_forward():
    """The backbone's forward pass alone on 8 images of 224 pixels."""
    model, _ = make_model(False)
    backbone, images = copy.deepcopy(model.teacher["backbone"]).eval(), torch.randn(8, 3, 224, 224)

    def forward():
        with torch.inference_mode():
            return backbone(images).sum().item()

    return forward


def main():
    parser = command_line(__doc__)
    parser.add_argument("--reference", required=True, help="a checkout of the reference")
    options = parser.parse_args()
    sys.path.insert(0, options.reference)
    torch.manual_seed(0)
    run = make_forward() if options.what == "forward" else make_step(options.what == "gram")
    report(measure(run, options.steps), options.json)


if __name__ == "__main__":
    main()
