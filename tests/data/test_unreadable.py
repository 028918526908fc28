"""A line for every unreadable image, each once, whatever happens to the process."""

import os

import pytest

from dinojax.data.pipeline import Failure
from dinojax.data.unreadable import UnreadableList

ONE, TWO = Failure("a/1.jpg", "truncated"), Failure("2.jpg", "has 4 bands, expected 3")


def test_each_once_and_at_once(tmp_path):
    path = tmp_path / "unreadable.txt"
    found = UnreadableList(path)
    assert found.add(()) == 0 and not path.exists()
    assert found.add([ONE, ONE]) == 1
    assert path.read_text() == "a/1.jpg\ttruncated\n"  # not only when it ends
    assert found.add([ONE, TWO, Failure("a/1.jpg", "another reason")]) == 1
    assert path.read_text() == "a/1.jpg\ttruncated\n2.jpg\thas 4 bands, expected 3\n"


def test_a_run_goes_on_with_its_list(tmp_path):
    path = tmp_path / "unreadable.txt"
    UnreadableList(path).add([ONE])
    again = UnreadableList(path)
    assert again.add([ONE]) == 0 and again.add([TWO, ONE]) == 1
    assert path.read_text().count("\n") == 2


def test_a_line_that_was_cut_is_written_again(tmp_path):
    path = tmp_path / "unreadable.txt"
    path.write_text("a/1.jpg\ttruncated\n2.jpg\thas 4 b")
    assert UnreadableList(path).add([ONE, TWO]) == 1
    assert path.read_text() == "a/1.jpg\ttruncated\n2.jpg\thas 4 bands, expected 3\n"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("tab\tand\nline", b"tab and line"),
        ("two  blanks", b"two  blanks"),
        (os.fsdecode(b"latin\xe9.jpg"), b"latin\xe9.jpg"),
        ("gr\u00fcn.jpg", "gr\u00fcn.jpg".encode()),
    ],
)
def test_names_of_all_kinds(tmp_path, name, written):
    path = tmp_path / "unreadable.txt"
    for _ in range(2):
        UnreadableList(path).add([Failure(name, "one\nreason")])
    assert path.read_bytes() == written + b"\tone reason\n"
