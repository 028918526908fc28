"""Golden text of every experiment: its resolved config, and what becomes of each parameter.

    python tests/test_golden.py      rewrites tests/golden/*.txt; review the diff before a commit

A text holds the flattened config, then a line for each parameter of the student: path, shape,
dtype, initialiser, learning-rate multiplier (first..last block where blocks are stacked),
weight-decay multiplier, and how it is split on a mesh data=1, fsdp=8, tensor=1. Shapes and
partitions are those of `training.state.abstract`: nothing is allocated, so 7B parameters are no
trouble. The initialisers come from the table INITIALISERS; `test_initialisers_tell_the_truth` holds
that table to parameters that were really drawn.
"""

import difflib
import inspect
import pathlib
import re
from dataclasses import fields
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from dinojax import config as configs
from dinojax import sharding
from dinojax.layers import norm
from dinojax.losses import gram, koleo
from dinojax.models import convnext, variants
from dinojax.training import optim
from dinojax.training import state as states

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
COMMAND = "python tests/test_golden.py"
VARIANTS = {"gram_vitl": ("tiny",)}

# What a fresh parameter is drawn from, by its path; the first match counts. `initialiser` fills in
# the names in braces.
INITIALISERS: tuple[tuple[str, str], ...] = (
    (r"/patch_embed/(kernel|bias)$", "uniform(+-{bound:.6g})"),
    (r"/mask_token$", "zeros"),
    (r"/(cls_token|storage_tokens)$", "normal(0.02)"),
    (r"/(kernel|prototypes)$", "normal({std:.6g})"),
    (r"/scale$", "ones"),
    (r"/gamma$", "constant({layerscale:.6g})"),
    (r"/bias$", "zeros"),
)


def experiments() -> list[tuple[str, str]]:
    """(name, variant) of every experiment file; the plain one has the variant ""."""
    names = [
        file.stem
        for file in sorted((ROOT / "experiments").glob("*.py"))
        if "def get_config(" in file.read_text()
    ]
    return [(name, variant) for name in names for variant in ("", *VARIANTS.get(name, ()))]


def golden_file(name: str, variant: str) -> pathlib.Path:
    return GOLDEN / f"{name}{'_' * bool(variant)}{variant}.txt"


def initialiser(path: str, shape: tuple[int, ...], config: ConfigDict) -> str:
    """The law in words of the parameter at `path`."""
    model = config.model
    words = [words for pattern, words in INITIALISERS if re.search(pattern, path)]
    if not words:
        raise ValueError(f"no initialiser is known for {path}; add it to INITIALISERS")
    inputs = shape[-1] if path.endswith("prototypes") else shape[-2] if len(shape) > 1 else 1
    linear = len(shape) < 4  # [d, f], [s, d, f] or [k, b]; kernels of convolutions have more axes
    return words[0].format(
        bound=(model.in_channels * model.patch_size**2) ** -0.5 if model.name == "vit" else 0.0,
        std=inputs**-0.5 if config.init == "fan_in" and linear else 0.02,
        layerscale=model.layerscale,
    )


def golden_text(name: str, variant: str) -> str:
    """The whole text of one experiment."""
    config = configs.resolve(
        configs.load_file(str(ROOT / "experiments" / f"{name}.py"), variant or None)
    )
    configs.validate(config)
    title = f"experiments/{name}.py" + (f":{variant}" if variant else "")
    settings = [f"{key} = {value!r}" for key, value in configs.flatten(config).items()]
    lines = [f"# {title}; rewritten by: {COMMAND}", "", "# config, resolved", *settings]
    lines += ["", *parameter_lines(config)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def parameter_lines(config: ConfigDict) -> list[str]:
    """A head, then a line for each parameter of the student."""
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
    networks = states.build_networks(config)
    student = states.abstract(config, networks, config.phases[0], mesh)["student"]
    rules = optim.parameter_rules(student, config.optim.layer_decay, config.optim.patch_embed_lr)
    leaves = optim.flatten(student)
    counts = [
        f"{network} {sum(leaf.size for leaf in optim.flatten(tree).values()):,}"
        for network, tree in student.items()
    ]
    lines = [
        f"# student, parameters: {', '.join(counts)}",
        "# path, shape, dtype, initialiser, learning rate x, weight decay x, [last layer,]",
        "# partition on data=1 fsdp=8 tensor=1",
    ]
    for path, leaf in sorted(leaves.items()):
        rule = rules[path]
        rates = np.atleast_1d(rule.lr_multiplier)
        rate = f"{rates[0]:.6g}" + (f"..{rates[-1]:.6g}" if np.ndim(rule.lr_multiplier) else "")
        words = (
            f"{path:<36} {list(leaf.shape)!s:<20} {leaf.dtype!s:<8}",
            f"{initialiser(path, leaf.shape, config):<22} lr {rate:<16}",
            f"wd {rule.decay_multiplier:g}" + "  last layer" * rule.is_last_layer,
            partition_words(leaf),
        )
        lines.append("  ".join(words))
    return lines


def partition_words(leaf: Any) -> str:
    """'[-, fsdp, -]', one word for each axis; 'whole' where nothing is split."""
    axes = [axis or "-" for axis in leaf.sharding.spec]
    axes += ["-"] * (leaf.ndim - len(axes))
    return "whole" if set(axes) <= {"-"} else f"[{', '.join(axes)}]"


@pytest.mark.parametrize(("name", "variant"), experiments())
def test_golden_text(name: str, variant: str) -> None:
    file = golden_file(name, variant)
    label = str(file.relative_to(ROOT))
    if not file.exists():
        pytest.fail(f"{label} is missing; write it with: {COMMAND}", pytrace=False)
    old, new = file.read_text().splitlines(), golden_text(name, variant).splitlines()
    changes = list(difflib.unified_diff(old, new, label, "now", n=0, lineterm=""))
    if changes:
        head = f"{label} differs from what the code gives; if that is meant: {COMMAND}"
        pytest.fail("\n".join([head, *changes]), pytrace=False)


def test_every_golden_text_has_its_experiment() -> None:
    assert set(GOLDEN.glob("*.txt")) == {golden_file(*each) for each in experiments()}


def vit_with_everything() -> ConfigDict:
    """The tiny variant of gram_vitl with one more norm."""
    config = configs.load_file(str(ROOT / "experiments" / "gram_vitl.py"), "tiny")
    config.model.untie_cls_and_patch_norms = True
    return config


def shrunk_7b() -> ConfigDict:
    """vit7b with its SwiGLU and its norm for local crops, at a width of 64."""
    config = configs.load_file(str(ROOT / "experiments" / "vit7b.py"))
    config.model.update({"width": 64, "depth": 2, "heads": 2})
    return config


def small_convnext() -> ConfigDict:
    config = vit_with_everything()
    sizes = {"dims": (16, 24, 32, 40), "depths": (1, 1, 1, 1)}
    config.model = ConfigDict({"name": "convnext", "layerscale": 1e-6, "dtype": "float32", **sizes})
    return config


# Compilation of the draws is what this costs, so heads are drawn once.
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (vit_with_everything, ("backbone", "dino_head", "ibot_head")),
        (shrunk_7b, ("backbone",)),
        (small_convnext, ("backbone",)),
    ],
)
def test_initialisers_tell_the_truth(make: Any, names: tuple[str, ...]) -> None:
    """Parameters really drawn, against the table that the golden texts quote."""
    config = make()
    networks, key = states.build_networks(config), jax.random.key(7)
    drawn = jax.jit(lambda key: {name: getattr(networks, name).init(key) for name in names})(key)
    # `init_params` with networks whose draws are at hand: both of its laws for one compilation.
    trees = {name: drawn.get(name, {}) for name in networks._fields}
    known = states.NetworkSet(
        *(networks.backbone._replace(init=lambda _, tree=tree: tree) for tree in trees.values())
    )
    for config.init in ("fixed", "fan_in"):
        for path, leaf in optim.flatten(states.init_params(known, key, config.init)).items():
            law = initialiser(path, leaf.shape, config)
            assert follows(np.asarray(leaf, np.float64), law), f"{path} {leaf.shape} is not {law}"


def follows(x: np.ndarray, law: str) -> bool:
    """Whether `x` could be a draw of `law`: moments within 4.5 standard errors, and the range."""
    kind, number = re.fullmatch(r"(\w+?)(?:\((?:\+-)?(.+)\))?", law).groups()
    if kind in ("zeros", "ones", "constant"):
        value = {"zeros": 0.0, "ones": 1.0}.get(kind, number)
        return bool(np.all(x == np.float32(value)))
    n, widest, number = x.size, np.abs(x).max(), float(number)
    std = number if kind == "normal" else number / 3**0.5
    # Standard error of a standard deviation: std / sqrt(2n) for a normal law, less for a uniform.
    near = abs(x.mean()) < 4.5 * std / n**0.5 and abs(x.std() / std - 1) < 4.5 / (2 * n) ** 0.5
    if kind == "uniform":
        return near and widest <= number * (1 + 1e-6)
    return near and (n < 1000 or 2.6 * std < widest < 6 * std)  # no truncation at two deviations


def test_the_laws_can_be_told_apart() -> None:
    """Otherwise the test above would prove nothing."""
    random = np.random.default_rng(0)
    normal, uniform = random.normal(size=4096) * 0.02, random.uniform(-0.03, 0.03, 4096)
    cut = np.clip(normal, -0.04, 0.04)
    assert follows(normal, "normal(0.02)") and follows(uniform, "uniform(+-0.03)")
    assert not follows(cut * 0.02 / cut.std(), "normal(0.02)")
    assert not follows(uniform * 0.02 / uniform.std(), "normal(0.02)")
    assert not follows(normal * 1.1, "normal(0.02)") and not follows(normal, "uniform(+-0.0346)")
    assert not follows(np.zeros(9), "ones") and not follows(np.zeros(9), "constant(1e-05)")
    assert follows(np.full(9, np.float32(1e-5)), "constant(1e-05)")


def test_numbers_outside_the_configs() -> None:
    """Those that no test of values sees: parameter counts do not, or tolerances hide them."""
    heads = {"small": 6, "splus": 6, "base": 12, "large": 16, "lplus": 16, "so400m": 18}
    heads |= {"huge2": 20, "hplus": 20, "giant2": 24, "7b": 32}  # spec 1.1
    found = {name: sizes["heads"] for name, sizes in variants.VIT.items() if name != "tiny"}
    assert found == heads
    assert (variants.VIT["giant2"]["width"], variants.VIT["giant2"]["depth"]) == (1536, 40)
    assert norm.EPSILON == {"layernorm": 1e-6, "layernormbf16": 1e-5, "rmsnorm": 1e-5}  # spec 1.2
    assert convnext.EPSILON == 1e-6  # spec 1.6
    assert (koleo.EPS, gram.EPS, gram.CUBIC) == (1e-8, 1e-12, -0.75)  # spec 3.5, 3.6
    assert inspect.signature(optim.update).parameters["eps"].default == 1e-8  # spec 6.1
    defaults = {field.name: field.default for field in fields(convnext.ConvNeXtConfig)}
    assert defaults["layerscale"] == 1e-6  # spec 1.6


def main() -> None:
    """Rewrite every text."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.glob("*.txt"):
        stale.unlink()
    for name, variant in experiments():
        golden_file(name, variant).write_text(golden_text(name, variant))
        print(golden_file(name, variant).relative_to(ROOT))


if __name__ == "__main__":
    main()
