"""Files appear whole under their name, or not at all."""

import errno
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_curation import files


def test_round_trips(tmp_path):
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    files.write_npy(tmp_path / "deep" / "a.npy", array.T)
    np.testing.assert_array_equal(np.load(tmp_path / "deep" / "a.npy"), array.T)
    assert not np.isfortran(np.load(tmp_path / "deep" / "a.npy"))
    files.write_npy(tmp_path / "scalar.npy", np.array(3))
    assert np.load(tmp_path / "scalar.npy") == 3
    tree = {"a": np.int64(3), 5: [np.float32(0.5), np.nan, tmp_path], "b": array}
    files.write_json(tmp_path / "t.json", tree)
    expected = {"a": 3, "5": [0.5, None, str(tmp_path)], "b": array.tolist()}
    assert files.read_json(tmp_path / "t.json") == expected
    files.write_table(tmp_path / "t.parquet", pa.table({"x": [1, 2]}))
    assert pq.read_table(tmp_path / "t.parquet").to_pydict() == {"x": [1, 2]}
    files.write_text(tmp_path / "t.txt", "é")
    assert (tmp_path / "t.txt").read_text(encoding="utf-8") == "é"
    assert not list(tmp_path.rglob("*.part"))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    files.write_json(tmp_path / "a.json", 1)

    def full(file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="a.json cannot be written .No space left on device"):
        files.write_file(tmp_path / "a.json", full)
    with pytest.raises(ZeroDivisionError):
        files.write_file(tmp_path / "b.json", lambda file: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == 1


def test_unreadable_json(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is not JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="none.json cannot be read .*No such file"):
        files.read_json(tmp_path / "none.json")
