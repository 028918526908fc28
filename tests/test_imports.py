"""Who may import whom (CONTRIBUTING, "Write"): read from the sources, nothing is imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dinojax"

# A file belongs to the longest key that its module name begins with; it may import what its row
# names (prefixes), its own subtree where the row says so, and `dinojax` itself (the version).
MAY_IMPORT = {
    "": (),
    "losses": ("kernels.prototypes", "losses.sinkhorn"),
    "training.schedules": (),
    "sharding": (),
    "hosts": (),
    "planning": ("config", "data", "models", "planning", "sharding", "train", "training"),
    "preflight": ("config", "hosts", "sharding", "train"),
    "config": (),
    "startup": (),
    "convert": (),
    "backbone": ("models", "convert", "training.checkpoint", "sharding"),
    "features": ("backbone", "data", "eval.common", "sharding"),
    "visualize": ("backbone", "eval", "data", "convert", "training.checkpoint"),
    "data_pictures": ("data", "visualize"),
    "crop_pictures": ("config", "data", "data_pictures", "visualize"),
    "verbs": (
        *("backbone", "config", "convert", "crop_pictures", "data", "data_pictures", "eval"),
        *("features", "training.checkpoint", "verbs", "visualize"),
    ),
    "cli": ("verbs",),
    "__main__": ("cli",),
    "kernels": ("sharding",),
    "layers": ("kernels", "sharding", "layers"),
    "models": ("layers", "sharding", "models.variants", "models.functional"),
    "data": ("data",),
    "objectives": ("losses", "data.photometric", "sharding", "objectives", "models.functional"),
    "training": ("sharding", "training", "models"),
    "eval": ("backbone", "data", "sharding", "eval.common"),
    "train": (
        *("backbone", "config", "data", "eval", "kernels", "layers", "losses", "models"),
        *("objectives", "sharding", "startup", "training", "visualize", "convert"),
    ),
}
# photometric is the exception within data
NO_JAX = ("data", "config", "startup", "training.schedules")
FORBIDDEN = ("torch", "torchvision", "tensorflow", "transformers", "timm", "flax.linen")
BANNED_CALLS = ("nnx.jit", "nnx.grad", "nnx.scan", "nnx.remat", "nnx.Optimizer", "jax.pmap")


def module_name(path: Path) -> str:
    """'losses.dino' of dinojax/losses/dino.py; '' of the package itself."""
    return (
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .strip(".")
    )


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def begins(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rule(name: str) -> tuple[str, ...]:
    return MAY_IMPORT[max((key for key in MAY_IMPORT if not key or begins(name, key)), key=len)]


def ours(path: Path) -> set[str]:
    """Our modules that a file imports: 'data.sources', not 'data.sources.open_source'."""
    found = set()
    for name in imports(path):
        if not begins(name, "dinojax"):
            continue
        parts = name.split(".")[1:]
        while parts and not any(
            (
                PACKAGE.joinpath(*parts).with_suffix(".py").exists(),
                PACKAGE.joinpath(*parts).is_dir(),
            )
        ):
            parts = parts[:-1]
        found.add(".".join(parts))
    return found - {""}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_import_table(path):
    name = module_name(path)
    if not name:  # the package's own __init__ loads `backbone` when asked for it
        assert ours(path) <= {"backbone"}
        return
    allowed = rule(name)
    wrong = {target for target in ours(path) if not any(begins(target, a) for a in allowed)}
    assert not wrong, (
        f"dinojax.{name} imports {sorted(wrong)}; it may import {allowed or 'nothing'}"
    )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_foreign(path):
    name, found = module_name(path), imports(path)
    foreign = {i for i in found if any(begins(i, f) for f in FORBIDDEN)}
    assert not foreign
    if any(begins(name, folder) for folder in NO_JAX) and name != "data.photometric":
        assert not {i for i in found if begins(i, "jax") or begins(i, "flax")}
    if not begins(name, "layers") and not begins(name, "models"):
        assert not {i for i in found if begins(i, "flax")}, "Flax only declares modules"
    top = {i.split(".")[0] for i in found}
    assert not top & {"experiments", "data_curation", "launch", "tests"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_nnx_transforms(path):
    used = {
        ast.unparse(n)
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Attribute)
    }
    assert not used & set(BANNED_CALLS)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_array_work_at_import(path):
    """Nothing at module level calls jax.numpy or jax.jit: importing must not start a backend."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr) and node.value is not None:
            calls = [n for n in ast.walk(node.value) if isinstance(n, ast.Call)]
            wrong = [ast.unparse(c.func) for c in calls]
            assert not [w for w in wrong if w.startswith(("jnp.", "jax.random.", "jax.jit"))]


CURATION = sorted((ROOT / "data_curation").rglob("*.py"))
CURATION_MAY_IMPORT = ("backbone", "data", "features", "hosts", "sharding")


@pytest.mark.parametrize("path", CURATION, ids=lambda p: p.stem)
def test_data_curation_imports(path):
    """Of dinojax only what embeds, reads images and finds devices; drawing only where drawn."""
    found = imports(path)
    wrong = {t for t in ours(path) if not any(begins(t, a) for a in CURATION_MAY_IMPORT)}
    assert not wrong
    assert not {i for i in found if any(begins(i, f) for f in FORBIDDEN)}
    assert path.stem == "plots" or not {i for i in found if begins(i, "matplotlib")}
    assert not {i.split(".")[0] for i in found} & {"experiments", "launch", "tests"}


CONFIGS = sorted(p for p in (ROOT / "experiments").glob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_imports_only_the_config_module(path):
    found = {i for i in imports(path) if begins(i, "dinojax")}
    assert all(begins(i, "dinojax.config") for i in found), found
    assert not {i for i in imports(path) if begins(i, "jax") or begins(i, "flax")}


def test_configs_load_in_under_a_second_without_jax():
    """All of them in one fresh process; its own time counts, not the machine's load."""
    code = (
        "import sys, time, runpy; start = time.process_time()\n"
        "for path in sys.argv[1:]: runpy.run_path(path)['get_config']()\n"
        "seconds = time.process_time() - start\n"
        "assert not {'jax', 'flax', 'torch', 'tensorflow'} & set(sys.modules)\n"
        "assert seconds < 1, seconds"
    )
    command = [sys.executable, "-c", code, *map(str, CONFIGS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
