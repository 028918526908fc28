"""Steps compiled by libtpu for TPUs that are not here."""

import importlib.util

import pytest

from dinojax.planning import compiling, figures
from dinojax.planning.topology import parse

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'"
)


def test_without_libtpu(monkeypatch, experiment):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        compiling.importlib.util, "find_spec", lambda n: None if n == "libtpu" else found(n)
    )
    config = experiment("tiny")
    with pytest.raises(ValueError, match=r"needs libtpu.*pip install 'dinojax\[plan\]'"):
        figures.measure(config, 0, (24, 16, 0), parse("v5e:2x2"))


@needs_libtpu
def test_compiled_for_a_tpu(experiment):
    config = experiment("tiny", mesh__shard_above=1, model__dtype="bfloat16")
    step = figures.measure(config, 1, (24, 16, 48), parse("v5e:2x2"))
    assert step.how.startswith("compiled by libtpu") and "code not generated" in step.how
    assert set(step.seconds) == {"compute", "memory", "network"} and step.fits
    assert step.memory.limit == 15.75 * 2**30
    assert "all-gather" in step.collectives and "all-to-all" not in step.collectives
    rough = figures.guess(config, 1, (24, 16, 48), parse("v5e:2x2"))
    assert rough.flops_per_image == pytest.approx(step.flops_per_image, rel=0.15)


@needs_libtpu
@pytest.mark.slow
def test_the_dumps_say_what_the_compiler_says(experiment):
    """With code generation: memory as `memory_analysis` gives it, and splash attention compiles."""
    config = experiment("tiny", model__attention="splash", model__dtype="bfloat16")
    found = compiling.compile_for_tpu(config, 0, (24, 16, 0), parse("v5p:2x2x1"), code=True)
    short = compiling.compile_for_tpu(config, 0, (24, 16, 0), parse("v5p:2x2x1"))
    assert short.code is None and found.code > 0
    assert short.arguments == pytest.approx(found.arguments, rel=0.01)
    assert short.temporaries == pytest.approx(found.temporaries, rel=0.01)
    assert short.program == found.program
