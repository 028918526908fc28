"""Where a run's files go: a disk as it is, a bucket by whole files."""

import fsspec
import pytest

from dinojax.training import rundir
from dinojax.training.checkpoint import Checkpoints
from dinojax.training.rundir import RunDirectory


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A bucket of fsspec's in memory, and a home for the cache."""
    monkeypatch.setattr(rundir, "SCHEMES", ("gs", "memory"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


URL = "memory://bucket/runs/a"


def opened(process=0):
    home = RunDirectory(URL, process)
    home.fetch()
    return home


def test_a_disk_is_written_directly(tmp_path):
    home = RunDirectory(tmp_path / "run")
    home.fetch()
    home.check_writable()
    assert home.local == tmp_path / "run" and not list(home.local.iterdir())
    (home.local / "metrics.jsonl").write_text("1\n")
    home.upload()
    assert home.checkpoints == f"{tmp_path}/run/checkpoints"


def test_whole_files_go_up_and_come_back(bucket):
    home = opened()
    home.check_writable()
    (home.local / "metrics.jsonl").write_text("1\n")
    (home.local / "weights").mkdir()
    (home.local / "weights" / "teacher.safetensors").write_bytes(b"w")
    (home.local / "metrics.tmp").write_text("half")
    home.upload()
    found = {name.removeprefix("/bucket/runs/a/") for name in bucket.find("/bucket")}
    assert found == {"metrics.jsonl", "weights/teacher.safetensors"}

    (home.local / "metrics.jsonl").write_text("1\n2\n")
    (home.local / "stale").write_text("of a host that was first before")
    home.upload(seldom=True)
    assert bucket.cat("/bucket/runs/a/metrics.jsonl") == b"1\n"  # that may wait
    home.upload()
    again = opened()
    assert (again.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert not (again.local / "weights").exists()  # nothing that a run does not go on with


def test_only_what_changed_goes_up(bucket, monkeypatch):
    home = opened()
    (home.local / "a").write_text("1")
    (home.local / "b").write_text("1")
    home.upload()
    sent = []
    monkeypatch.setattr(home._files, "put_file", lambda here, there: sent.append(there))
    (home.local / "b").write_text("22")
    home.upload()
    assert sent == [f"{URL}/b"]


def test_every_process_has_its_own_files(bucket):
    first, second = opened(0), opened(1)
    assert first.local != second.local
    (first.local / "config.json").write_text("{}")
    (first.local / "metrics.jsonl").write_text("1\n")
    (second.local / "unreadable.1.txt").write_text("x\ty\n")
    first.upload(), second.upload()
    names = {path.name for path in opened(1).local.iterdir()}
    assert names == {"config.json", "unreadable.1.txt"}


def test_files_for_all(bucket, tmp_path):
    for home in (opened(), RunDirectory(tmp_path)):
        assert home.read_text(".x") is None
        home.write_text(".x", "token")
        assert home.read_text(".x") == "token"
        home.remove(".x")
        assert home.read_text(".x") is None


def test_what_cannot_be_served():
    with pytest.raises(ValueError, match="in a bucket of gs://, not s3://"):
        RunDirectory("s3://bucket/runs/a")


def test_a_library_that_is_missing(monkeypatch):
    def missing(scheme):
        raise ImportError("gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ValueError, match=r"pip install 'dinojax\[cloud\]'"):
        RunDirectory("gs://bucket/runs/a")


def test_a_bucket_that_takes_nothing(bucket, monkeypatch):
    def refuse(*_):
        raise PermissionError("403: no storage.objects.create")

    home = opened()
    (home.local / "a").write_text("1")
    monkeypatch.setattr(home._files, "put_file", refuse)
    monkeypatch.setattr(home._files, "pipe_file", refuse)
    with pytest.raises(OSError, match=f"{URL}/a could not be written: 403"):
        home.upload()
    with pytest.raises(ValueError, match=f"cannot write into --workdir {URL}: 403"):
        home.check_writable()


def test_checkpoints_stay_in_the_bucket():
    """etils' absolute() makes gs:// a directory below the present one."""
    assert str(Checkpoints("gs://bucket/a/checkpoints").directory) == "gs://bucket/a/checkpoints"
