"""How processes find each other, and meshes and rows of several hosts and slices: no processes."""

import types

import numpy as np
import pytest

from dinojax import hosts, sharding

COORDINATOR = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8482"}
SLURM = {"SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "node[1-2]"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}

FINDS = [
    ({}, None, {}),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, {}),
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, None, {}),
    ({"SLURM_NTASKS": "16"}, None, {}),  # sbatch without srun: this process is the only one
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU pod, from its environment", {}),
    (
        {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
        "TPU pod, from its environment, 2 slices",
        {},
    ),
    (COORDINATOR, "TPU pod, first host 10.0.0.2:8482", {}),  # launch/on_worker.sh
    (
        COORDINATOR | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
        "JAX_COORDINATOR_ADDRESS=10.0.0.2:8482",
        {"num_processes": 2, "process_id": 1},
    ),
    (SLURM, "Slurm", {"cluster_detection_method": "slurm"}),
    (
        SLURM | OMPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.2:1"},
        "Open MPI",
        {"cluster_detection_method": "ompi"},
    ),
    (COORDINATOR | OMPI, "MPI", {"num_processes": 4, "process_id": 3}),
    (
        COORDINATOR | {"PMI_SIZE": "4", "PMI_RANK": "0"},
        "MPI",
        {"num_processes": 4, "process_id": 0},
    ),
]


@pytest.mark.parametrize(("environment", "name", "arguments"), FINDS)
def test_find(environment, name, arguments):
    found = hosts.find(environment)
    assert (found and (found.name, dict(found.arguments))) == (name and (name, arguments))


def test_mpi_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: object())
    assert hosts.find(OMPI).arguments == {"cluster_detection_method": "mpi4py"}
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install mpi4py, or set JAX_COORDINATOR_ADDRESS"):
        hosts.find(OMPI)


def test_a_process_without_a_number():
    with pytest.raises(ValueError, match="JAX_PROCESS_ID is ''; expected a whole number"):
        hosts.find(COORDINATOR | {"JAX_NUM_PROCESSES": "2"})


def test_a_team_of_one():
    team = hosts.Team("")
    assert team.exchange("x", "text") == ["text"]
    assert team.agree("", {"a": 1}) == "" and team.agree("wrong", {}) == "wrong"
    assert team.run(lambda: 75) == 75
    mesh = sharding.make_mesh(data=2)
    assert team.describe(mesh) == "1 host x 8 devices (cpu), mesh data=2 fsdp=4 tensor=1"


class Three(hosts.Team):
    """As the second of three hosts sees it, with what the others tell."""

    def __init__(self, *others):
        super().__init__("")
        self.count, self.index, self.others = 3, 1, others
        self.names = ["host 0 (a)", "host 1 (b)", "host 2 (c)"]

    def exchange(self, name, text):
        return [self.others[0](text), text, self.others[1](text)]


def same(text):
    return text


def test_agreeing():
    assert Three(same, same).agree("", {"lr": 0.5}) == ""
    assert Three(same, same).agree("batch", {"lr": 0.5}) == "batch"
    other = Three(same, lambda text: text.replace("0.5", "0.2")).agree("", {"lr": 0.5, "a": 1})
    assert other == (
        "host 2 (c) has lr 0.2 and host 0 (a) has 0.5; give all hosts the same command and code"
    )
    wrong = Three(same, lambda text: text.replace('""', '"no disk"')).agree("", {"lr": 0.5})
    assert wrong == "host 2 (c): no disk"


# ---- meshes of several slices, rows of several hosts ---------------------------------------------


def device(number, per_host=2, per_slice=4):
    return types.SimpleNamespace(
        id=number,
        process_index=number // per_host,
        slice_index=number // per_slice,
        platform="gpu",
        device_kind="pretend",
    )


def test_only_data_crosses_slices():
    devices = [device(k) for k in (5, 0, 3, 6, 1, 2, 7, 4)]
    for shape in ((2, 4, 1), (4, 2, 1), (2, 2, 2)):
        found = sharding.arrange_slices(devices, shape)
        assert found.shape == shape
        half = shape[0] // 2
        for part, number in ((found[:half], 0), (found[half:], 1)):
            assert {one.slice_index for one in part.flat} == {number}
    with pytest.raises(ValueError, match="does not fit 2 slices of 4 devices.*data=2 fsdp=4"):
        sharding.arrange_slices(devices, (1, 8, 1))


def runs(monkeypatch, hosts_of_devices, shape):
    """`local_runs` of each host, for devices that belong to hosts in any order."""
    found = []
    mesh = sharding.make_mesh(*shape)
    whole = sharding.batch_sharding(mesh)
    for host in sorted(set(hosts_of_devices)):
        pieces = whole.devices_indices_map((sharding.batch_shards(mesh),))
        mine = {d: i for d, i in pieces.items() if hosts_of_devices[d.id] == host}
        pretend = types.SimpleNamespace(addressable_devices_indices_map=lambda _, mine=mine: mine)
        monkeypatch.setattr(sharding, "batch_sharding", lambda mesh, pretend=pretend: pretend)
        found.append(sharding.local_runs(mesh))
        monkeypatch.undo()
    return found


def test_rows_of_hosts(monkeypatch):
    ordered, blocks = (0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 0, 0, 1, 1)
    assert runs(monkeypatch, (0,) * 8, (1, 8, 1)) == [((0,), 1)]
    assert runs(monkeypatch, ordered, (2, 4, 1)) == [((0, 1, 2, 3), 8), ((4, 5, 6, 7), 8)]
    assert runs(monkeypatch, blocks, (1, 8, 1)) == [((0, 1, 4, 5), 8), ((2, 3, 6, 7), 8)]
    # Tensor pairs across hosts: both hosts need all rows.
    assert runs(monkeypatch, (0, 1) * 4, (1, 4, 2)) == [((0,), 1), ((0,), 1)]


def test_a_batch_lands_where_its_rows_belong():
    mesh = sharding.make_mesh(fsdp=8)
    rows = np.arange(16)
    found = sharding.to_global({"x": rows}, mesh)["x"]
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, rows[shard.index])
