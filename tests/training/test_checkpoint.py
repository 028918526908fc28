"""Checkpoints: what comes back is what went in, whatever happened to the files or the process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dinojax.training.checkpoint import CheckpointError, Checkpoints


def make_state(scale=1.0, devices=8):
    """A state with every kind of part: sharded, replicated, empty, a bare scalar."""
    mesh = jax.make_mesh(
        (devices,), ("fsdp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    kernel = jnp.arange(64, dtype=jnp.float32).reshape(16, 4) * scale + 0.1
    network = {
        "backbone": {
            "blocks": {"kernel": jax.device_put(kernel, split)},
            "cls_token": jax.device_put(jnp.full((1, 4), scale / 3), whole),
        },
        "ibot_head": {},
    }
    return {
        "step": jax.device_put(jnp.int32(7), whole),
        "teacher": network,
        "optimizer": {"mu": network, "count": jax.device_put(jnp.int32(3), whole)},
        "gram": {},
    }


def abstract_of(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with steps 10 and 20 of a state on eight devices; copy it before harming it."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(directory, keep_newest=2)
    for step in (10, 20):
        checkpoints.save(step, make_state(step), {"phase": "pretrain", "config": {"a": [1, 2]}})
    checkpoints.close()
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_round_trip_on_the_same_mesh(saved):
    checkpoints, state = Checkpoints(saved, read_only=True), make_state(20)
    assert checkpoints.latest() == 20
    restored, manifest = checkpoints.restore(20, abstract_of(state))
    assert_same(restored, state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state)):
        assert a.sharding == b.sharding
    assert manifest["step"] == 20 and manifest["phase"] == "pretrain"
    assert manifest["config"] == {"a": [1, 2]} and "jax" in manifest["versions"]


@pytest.mark.parametrize("devices", [1, 2])
def test_restore_on_another_mesh(saved, devices):
    want = make_state(20, devices)
    restored, _ = Checkpoints(saved, read_only=True).restore(20, abstract_of(want))
    assert_same(restored, want)
    kernel = restored["teacher"]["backbone"]["blocks"]["kernel"]
    assert len(kernel.sharding.device_set) == devices


def test_teacher_alone_without_knowing_its_shapes(saved):
    checkpoints = Checkpoints(saved, read_only=True)
    want = make_state(20)
    assert_same(checkpoints.restore_item(20, "teacher"), want["teacher"])
    backbone = checkpoints.restore_item(20, "teacher/backbone")
    assert_same(backbone, want["teacher"]["backbone"])
    assert {d for x in jax.tree.leaves(backbone) for d in x.devices()} == {jax.devices()[0]}
    assert int(checkpoints.restore_item(20, "step")) == 7


def test_empty_now_but_not_then(saved):
    """A phase without a Gram teacher after one that had it, and the reverse."""
    checkpoints = Checkpoints(saved, read_only=True)
    restored, _ = checkpoints.restore(20, {"teacher": {}})
    assert restored == {"teacher": {}}
    with pytest.raises(CheckpointError, match="step 20.*has no 'gram'.*teacher"):
        checkpoints.restore(20, {"gram": abstract_of(make_state()["teacher"])})


def test_another_shape_is_named(saved):
    abstract = abstract_of(make_state(20))
    one = SingleDeviceSharding(jax.devices()[0])
    wrong = jax.ShapeDtypeStruct((16, 5), jnp.float32, sharding=one)
    abstract["teacher"]["backbone"]["blocks"]["kernel"] = wrong
    sentence = r"teacher/backbone/blocks/kernel is float32\[16, 4\] there and float32\[16, 5\]"
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoints(saved, read_only=True).restore(20, abstract)


def test_newest_and_every_kth_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_newest=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, {"a": {"x": jnp.arange(3.0)}}, {})
    checkpoints.save(7, {"a": {"x": jnp.zeros(3)}}, {})  # there already: left as it is
    checkpoints.close()
    assert checkpoints.steps() == [4, 6, 7]
    np.testing.assert_array_equal(checkpoints.restore_item(7, "a")["x"], np.arange(3.0))


def files_of(directory):
    return sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())


@pytest.mark.parametrize("harm", ["shortened", "missing", "emptied", "altered"])
def test_any_damaged_file_is_detected(saved, copied, harm, caplog):
    """Every file of the newest checkpoint in turn: the one before is used, or nothing is lost."""
    newest, kept = copied / "20", []
    want = make_state(20)
    for name in files_of(newest):
        path = newest / name
        content = path.read_bytes()
        if harm == "missing":
            path.unlink()
        else:
            cut = {"shortened": len(content) - 1, "emptied": 0, "altered": len(content) // 2}[harm]
            flipped = bytes([content[cut] ^ 1]) + content[cut + 1 :] if harm == "altered" else b""
            path.write_bytes(content[:cut] + flipped)
        checkpoints = Checkpoints(copied, read_only=True)
        if checkpoints.latest() == 20:
            kept.append(str(name))
            restored, _ = checkpoints.restore(20, abstract_of(want))
            assert_same(restored, want)
        else:
            assert checkpoints.latest() == 10
        path.write_bytes(content)
    # What orbax keeps for itself, and the seal: without it the checkpoint proves itself.
    harmless = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert set(kept) == (harmless | {"seal.json"} if harm == "missing" else harmless)
    sentence = caplog.messages[0]
    assert "step 20 is damaged" in sentence and "using the one before it, step 10." in sentence
    assert sentence.count("\n") == 0


@pytest.mark.parametrize("harm", ["shortened", "missing"])
def test_without_a_seal_it_must_prove_itself(copied, harm):
    newest = copied / "20"
    (newest / "seal.json").unlink()
    checkpoints = Checkpoints(copied, read_only=True)
    assert checkpoints.latest() == 20
    largest = max((newest / "teacher").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    for path in (largest, newest / "teacher" / "_METADATA", newest / "manifest" / "metadata"):
        content = path.read_bytes()
        path.write_bytes(content[:-1]) if harm == "shortened" else path.unlink()
        assert checkpoints.latest() == 10, path
        path.write_bytes(content)


def test_a_run_goes_on_after_damage(copied):
    """The damaged step is set aside, the step before restored, and the same step saved again."""
    (copied / "20" / "teacher" / "_METADATA").write_bytes(b"{")
    (copied / "20" / "commit_success.txt").unlink()
    (copied / "30.orbax-checkpoint-tmp").mkdir()  # a killed process was writing it
    checkpoints = Checkpoints(copied, keep_newest=2)
    assert checkpoints.latest() == 10
    assert (copied / "broken-20").is_dir()
    checkpoints.save(20, make_state(21), {})
    checkpoints.close()
    assert checkpoints.steps() == [10, 20] and checkpoints.latest() == 20
    assert not (copied / "30.orbax-checkpoint-tmp").exists()
    restored, _ = checkpoints.restore(20, abstract_of(make_state()))
    assert_same(restored, make_state(21))


def test_nothing_usable_is_an_error_not_a_fresh_start(copied, tmp_path):
    assert Checkpoints(tmp_path / "none").latest() is None
    for step in ("10", "20"):
        (copied / step / "teacher" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint.*step 20.*step 10.*_METADATA"):
        Checkpoints(copied).latest()


def test_arrays_may_be_donated_at_once(tmp_path):
    step = jax.jit(lambda x: x * 0.0 - 1.0, donate_argnums=0)
    x = jax.random.normal(jax.random.key(0), (512, 1024))
    want = np.array(x)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"student": {"x": x}}, {})
    for _ in range(3):
        x = step(x)
    jax.block_until_ready(x)
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore_item(1, "student")["x"], want)


CHILD = """
    import jax, os, resource, signal, sys, time
    import jax.numpy as jnp
    from dinojax.training.checkpoint import CheckpointError, Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep_newest=2)
    {body}
"""
SAVE_FOR_EVER = """
    for step in range(1, 10_000):
        checkpoints.save(step, {"teacher": {"x": jnp.full((300, 1000), float(step))}}, {})
        print(step, flush=True)
"""
SAVE_ON_A_FULL_DISK = """
    checkpoints.save(1, {"teacher": {"x": jnp.ones(3)}}, {})
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        noise = jax.random.normal(jax.random.key(0), (300, 1000))
        checkpoints.save(2, {"teacher": {"x": noise}}, {})
        LEARN
    except CheckpointError as error:
        print(error)
    checkpoints.close()
"""
ONE_OF_TWO_ON_A_FULL_DISK = """
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]), initialization_timeout=60)
    mesh = jax.make_mesh((2,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    noise = jax.random.normal(jax.random.key(0), (1, 300_000))
    state = {"x": jax.make_array_from_process_local_data(split, noise)}
    if jax.process_index() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    checkpoints.save(1, {"teacher": state}, {})
    try:
        checkpoints.wait()
    except CheckpointError as error:
        print(error, flush=True)
    os._exit(0)
"""


def child(body, directory, *arguments):
    code = textwrap.dedent(CHILD).replace("{body}", textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_killed_at_any_moment(tmp_path):
    process = child(SAVE_FOR_EVER, tmp_path)
    started = [int(process.stdout.readline()) for _ in range(4)][-1]
    time.sleep(np.random.default_rng().uniform(0, 0.3))  # any moment will do
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split()
    started = int(rest[-1]) if rest else started
    checkpoints = Checkpoints(tmp_path)
    step = checkpoints.latest()
    assert step in (started - 1, started, started + 1)
    x = checkpoints.restore_item(step, "teacher")["x"]
    np.testing.assert_array_equal(x, np.full((300, 1000), float(step)))
    checkpoints.save(step + 1, {"teacher": {"x": x}}, {})
    checkpoints.close()
    assert checkpoints.latest() == step + 1
    assert not [p for p in os.listdir(tmp_path) if "tmp" in p]


@pytest.mark.parametrize(
    "learn", ["checkpoints.wait()", "while checkpoints.check() is None: time.sleep(0.01)"]
)
def test_full_disk_is_one_sentence_and_keeps_the_old_one(tmp_path, learn):
    body = SAVE_ON_A_FULL_DISK.replace("LEARN", learn)
    out, errors = child(body, tmp_path).communicate(timeout=120)
    assert "step 2 could not be written" in out and "file too large" in out
    assert "the one of step 1 is kept" in out and out.count("\n") == 1
    assert errors == ""
    assert os.listdir(tmp_path) == ["1"]
    assert Checkpoints(tmp_path).latest() == 1


def test_of_two_hosts_the_one_with_a_full_disk_does_not_wait_for_the_other(tmp_path):
    """Which waits for it; how the run then ends, tests/e2e/test_hosts.py tries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [child(ONE_OF_TWO_ON_A_FULL_DISK, tmp_path, address, str(k)) for k in range(2)]
    try:
        out, errors = both[1].communicate(timeout=120)
        assert "step 1 could not be written" in out and "file too large" in out, errors
        assert both[0].poll() is None
    finally:
        for process in both:
            process.kill()
            process.communicate()
