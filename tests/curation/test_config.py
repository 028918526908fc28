"""Keys, settings of the command line, and what is refused before any work."""

import subprocess
import sys

import pytest

from data_curation import config as c
from data_curation.settings import CONFIGS, change, load

SHIPPED = sorted(path.stem for path in CONFIGS.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", [*SHIPPED, "random_2level:small"])
def test_shipped_configs_are_valid(name):
    config = load(name)
    c.validate(config)
    assert config.workdir == f"runs/{name.partition(':')[0]}"
    assert "data_curation/configs" in (CONFIGS / f"{name.partition(':')[0]}.py").read_text()


def test_the_published_settings():
    """Spec 1."""
    ring, web, lvd = (load(name) for name in ("ring2d", "web_4level", "lvd1689m"))
    levels = [[one.k, one.n_samples, one.n_resamples, one.n_splits] for one in ring.cluster.levels]
    assert levels == [[1000, 15, 10, 1], [300, 2, 10, 1]]
    assert [one.k * one.n_splits for one in web.cluster.levels] == [10**7, 500_000, 50_000, 10_000]
    counts = [one.k * one.n_splits for one in lvd.cluster.levels]
    assert counts == [200_000_000, 8_000_000, 800_000, 100_000, 25_000]
    assert lvd.sample[0].target == 1_689_000_000


def test_configs_load_without_jax():
    code = (
        "import sys\nfrom data_curation import config as c\n"
        "from data_curation.settings import load\n"
        f"[c.validate(load(name)) for name in {SHIPPED!r}]\n"
        "assert not {'jax', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings():
    before = load("ring2d")
    config = change(
        before,
        [
            "seed=7",
            "cluster.levels[0].k=500",
            "dedup.threshold=1",
            "plan.rows=17e9",
            "index.license_deny=CC BY-NC",
            'dedup.references=("a/b", "c")',
            "cluster.init=kmeans||",
            'sample=(sample("a", 10), sample("b", 20, strategy="c", nested=True))',
        ],
    )
    assert (config.seed, config.cluster.levels[0].k, config.dedup.threshold) == (7, 500, 1.0)
    assert config.plan.rows == 17_000_000_000 and config.index.license_deny == ("CC BY-NC",)
    assert config.dedup.references == ("a/b", "c") and config.cluster.init == "kmeans||"
    assert [one.name for one in config.sample] == ["a", "b"] and config.sample[1].nested
    assert before.cluster.levels[0].k == 1000 and len(before.sample) == 2  # a copy was changed
    assert change(before, ["sample=()"]).sample == ()


@pytest.mark.parametrize(
    "setting, sentence",
    [
        ("cluster.levls[0].k=3", r"no key 'cluster.levls\[0\].k'; did you mean 'cluster.levels"),
        ("cluster.levels[7].k=3", r"no key 'cluster.levels\[7\].k'"),
        ("seed=x", "seed is 'x'; expected a whole number"),
        ("seed=1.5", "seed is '1.5'; expected a whole number"),
        ("mix.once=1", "expected True or False"),
        ("dedup=3", "dedup is a section; set a key in it, such as dedup"),
        ("seed", "expected key=value"),
        ("sample=sampel('a', 3)", r"expected \(sample\(name, target, ...\), ...\)"),
        ("sample=(sample('a', open('x')),)", "cannot be read"),
        ("sample=sample('a', 3, size=4)", "cannot be read"),
        ("sample[0].strategy=closest", "'closest'; there are r, c, f"),
        ("sample[0].target=-1", "target is -1; expected 0 or more"),
        ("sample[0].name=a/b", "expected letters"),
        ("sample[0].name=one_level", "which has been given"),
        ("sample[0].flat_level=3", "there are 2 levels"),
        ("cluster.levels=()", "needs a tree, but cluster.levels is empty"),
        ("cluster.levels[1].k=5000", r"5000 clusters of the 1000 centroids.*levels\[1\].k=250"),
        ("cluster.levels[0].n_splits=2", "split and resampled"),
        ("cluster.levels[0].n_samples=1", "n_samples of 2 or more"),
        ("normalize=L2", "normalize is 'L2'; did you mean 'l2'"),
        ("embeddings=a.npy", "give one of them"),
        ("embed.source=", "embeddings and embed.source are both ''"),
        ("mix.components=component('balenced')", "did you mean 'balanced'"),
    ],
)
def test_refused_in_a_sentence(setting, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        c.validate(change(load("ring2d"), [setting]))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match="no config file 'ring3d'; did you mean 'ring2d'"):
        load("ring3d")
    file = tmp_path / "mine.py"
    head = "from data_curation import config as c\ndef get_config():\n    config = c.base()\n"
    for line, sentence in (
        ("    config.cluster.n_iter = 3", "unknown key cluster.n_iter; did you mean"),
        ("    del config.dedup.k", "lacks the key dedup.k; start from config.base"),
        ("    config.sample = (3,)", r"sample\[0\] is 3; expected sample\(name, target"),
        ("    1 / 0", "fails .ZeroDivisionError"),
    ):
        file.write_text(f"{head}{line}\n    return config\n")
        with pytest.raises(ValueError, match=sentence):
            load(str(file))


def test_public_names():
    """Functions, also where a file is called after them and has been imported."""
    import data_curation
    from data_curation.allot import allot

    assert data_curation.allot is allot and callable(data_curation.kmeans)
    for name in data_curation.__all__:
        assert callable(getattr(data_curation, name)), name
    with pytest.raises(AttributeError, match="no attribute 'allott'"):
        data_curation.allott  # noqa: B018
