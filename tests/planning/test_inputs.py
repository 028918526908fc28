"""What goes into a planned step is what goes into a real one."""

import jax
import pytest

from dinojax import config as c
from dinojax import sharding
from dinojax.data import from_config
from dinojax.planning import inputs
from dinojax.planning.topology import parse
from dinojax.training import phases
from dinojax.training import state as states


def test_the_abstract_batch_is_that_of_a_run(experiment):
    """Shapes and dtypes of what the pipeline gives, for every phase of a run."""
    config, mesh = experiment("tiny"), sharding.make_mesh()
    data = from_config.open_data(config)
    for index, phase in enumerate(config.phases):
        stride = c.patch_stride(config)
        real = from_config.phase_batches(config, index, data, stride).at(0)
        crops = phase.crops.sizes[real.pop("triple")]
        made = inputs.abstract_batch(config, phase, tuple(crops), mesh)
        assert real.pop("replaced") == ()
        assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
            k: (v.shape, v.dtype) for k, v in real.items()
        }


@pytest.mark.parametrize(
    ("name", "spec", "advice"),
    [
        ("vit7b", "v5p:8x8x8", "512 shards.*nearest: --config.phases.0..group=8 .*mesh.tensor=2"),
        ("vit7b", "v5p:8x8x16", "1024 shards.*group=4 .*koleo_group=16 .*, or .*mesh.tensor=4"),
        ("pretrain_vitl", "v5e:8x16", "32 groups of 64.*--config.mesh.tensor=4.*batch_size=8192"),
        ("vit7b", "gpu:h100x24", r"24 shards.*nearest: --config.phases\[0\].batch_size=4224$"),
    ],
)
def test_groups_that_do_not_split(name, spec, advice, experiment):
    config, found = experiment(name), parse(spec)
    with pytest.raises(ValueError, match=advice):
        inputs.check(config, found)


def test_what_is_advised_works(experiment):
    inputs.check(experiment("vit7b", mesh__tensor=2), parse("v5p:8x8x8"))
    inputs.check(experiment("vit7b", mesh__tensor=4), parse("v5p:8x8x16"))


def test_held_is_what_devices_hold(experiment):
    """By component, against the bytes of a real sharded state."""
    config = experiment("tiny", mesh__shard_above=1)
    for index, phase in enumerate(config.phases):
        crops = tuple(phase.crops.sizes[0])
        parts = inputs.held(config, index, crops, (1, 8, 1))
        networks, mesh = states.build_networks(config), sharding.make_mesh(fsdp=8)
        state = states.create(config, networks, phase, mesh)
        for name in ("student", "teacher", "gram"):
            leaves = jax.tree.leaves(state[name])
            assert parts[name] == sum(x.addressable_shards[0].data.nbytes for x in leaves)
        everything = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        batch = inputs.abstract_batch(config, phase, crops, mesh)
        given = sum(x.size * x.dtype.itemsize for x in batch.values()) / 8
        scalars = 4 * len(phases.scalars(config, phase, 0))
        assert sum(parts.values()) == everything + given + scalars


def test_no_arrays(experiment):
    """A 7B step is lowered, whose state no machine of a test could hold, and nothing is left."""
    config, before = experiment("vit7b"), sum(x.nbytes for x in jax.live_arrays())
    inputs.lower(config, 1, (256, 112, 512), sharding.make_mesh())
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 1000
