"""The `dinojax` command: what it prints and writes, how it refuses, how it stops."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinojax.cli import main
from dinojax.data import shards, sources, survey
from dinojax.verbs import common
from dinojax.verbs import data as verb

ROOT = Path(__file__).parent.parent


def run(capsys, *argv):
    """(exit code, stdout, stderr) of a command in this process."""
    try:
        code = main([str(argument) for argument in argv])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def python(code, *argv):
    """A fresh process that runs `code`; its stdout."""
    command = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_at(monkeypatch, module, name, count):
    """Send this process SIGTERM in the call number `count` of a function."""
    function, calls = getattr(module, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counted)


@pytest.fixture
def folder(tmp_path):
    """Nine PNGs in three classes, one of them twice, and one that cannot be read."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for k in range(9):
        path = root / f"class{k % 3}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + k, 60, 3), np.uint8)).save(path)
    (root / "class0" / "copy.png").write_bytes((root / "class1" / "1.png").read_bytes())
    (root / "class2" / "broken.jpg").write_bytes(b"")
    return root


# ---- help ----------------------------------------------------------------------------------------


def test_help_names_every_kind_of_source(capsys):
    kinds = {name.removeprefix("_open_") for name in vars(sources) if name.startswith("_open_")}
    for argv in (["--help"], ["data", "--help"]):
        code, out, _ = run(capsys, *argv)
        assert code == 0
        assert kinds <= set(re.findall(r"^  (\w+)[:\[]", out, re.M))
    assert "examples:" in out


def test_the_parser_is_quick_and_figures_need_no_jax(tmp_path):
    code = (
        "import sys, time; start = time.process_time()\n"
        "from dinojax import cli; cli.parser()\n"
        "assert time.process_time() - start < 0.5\n"
        "assert not {'jax', 'numpy', 'rich', 'pyarrow'} & set(sys.modules)\n"
        "assert cli.main(['data', 'scenes:3', '--out', sys.argv[1]]) == 0\n"
        "assert not {'jax', 'flax', 'tensorflow'} & set(sys.modules)\n"
    )
    assert "labels" in python(code, tmp_path / "out")


def test_as_a_module():
    command = [sys.executable, "-m", "dinojax", "data", "scenes"]
    done = subprocess.run(
        [*command, "--limit", "none"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: argument --limit: 'none' is not a whole number")


# ---- figures -------------------------------------------------------------------------------------


def test_everything_that_out_is_for(folder, tmp_path, capsys):
    out, file = tmp_path / "a/looks", tmp_path / "b/figures.json"
    code, text, _ = run(capsys, "data", f"folder:{folder}", "--out", out, "--json", file)
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "contact.png",
        "labels.png",
        "report.json",
        "sizes.png",
        "unreadable.txt",
    ]
    figures = json.loads((out / "report.json").read_text())
    assert figures == json.loads(file.read_text())
    assert figures["images"] == 11 and figures["duplicates"]["copies"] == 1
    assert figures["labels"]["counts"] == {"class0": 4, "class1": 3, "class2": 4}
    name, reason = (out / "unreadable.txt").read_text().rstrip("\n").split("\t")
    assert name == "class2/broken.jpg" and "empty" in reason
    for picture in out.glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200
    assert "class0/copy.png = class1/1.png" in text
    shown = ", ".join(f"{value:.4f}" for value in figures["mean"])
    assert f'--config.data.mean="({shown})"' in text


def test_without_out_nothing_is_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(capsys, "data", f"folder:{folder}", "--limit", 5)[0] == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are_no_text(tmp_path, capsys):
    name = os.fsdecode(b"bad\xff[red]name.jpg")  # neither UTF-8 nor markup
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(b"")
    code, text, _ = run(capsys, "data", f"folder:{tmp_path}/images", "--out", tmp_path / "out")
    assert code == 0 and "[red]name.jpg" in text
    listed = (tmp_path / "out/unreadable.txt").read_bytes()
    assert listed.startswith(b"bad\xff[red]name.jpg\t")


def command(text):
    """The arguments of the training command that ends an output."""
    lines = text[text.index("  python launch/run.py") :].replace("\\\n", " ")
    words = shlex.split(lines)
    assert words[:2] == ["python", "launch/run.py"]
    return words[1:]


READ = (
    "import json, sys; sys.path.insert(0, 'launch'); import run; run.parse(sys.argv[1:])\n"
    "from dinojax import config; from dinojax.data.from_config import open_data\n"
    "found = config.resolve(run.CONFIG.value); config.validate(found); open_data(found)\n"
    "print(json.dumps([found.data.mean, found.data.std, found.model.in_channels,\n"
    "                  found.batch_size, found.group, found.data.source]))\n"
)


def test_the_training_command_can_be_pasted(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "five bands").mkdir()
    for k in range(7):
        pixels = rng.integers(0, 65536, (70, 80, 5), np.uint16)
        tifffile.imwrite(tmp_path / f"five bands/{k}.tif", pixels, photometric="minisblack")
    for spec, bands, batch in ((f"folder:{tmp_path}/five bands", 5, 7), ("scenes:70", 3, 64)):
        code, text, _ = run(capsys, "data", spec, "--json", tmp_path / "figures.json")
        assert code == 0
        mean, std, channels, images, group, source = json.loads(python(READ, *command(text)))
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert (channels, images, source) == (bands, batch, spec) and images % group == 0
        np.testing.assert_allclose(mean, figures["mean"], atol=5e-5)
        np.testing.assert_allclose(std, figures["std"], atol=5e-5)


def test_the_contact_sheet_of_dark_values_shows_something(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for k in range(3):
        pixels = rng.integers(0, 900, (40, 50, 5), np.uint16)
        tifffile.imwrite(tmp_path / f"images/{k}.tif", pixels, photometric="minisblack")
    code, text, _ = run(capsys, "data", f"folder:{tmp_path}/images", "--out", tmp_path / "out")
    assert code == 0 and "look again:\n  dinojax data 'folder:" in text and "range=" in text
    sheet = np.asarray(Image.open(tmp_path / "out/contact.png"))
    picture = sheet[60:100, 40:100]  # inside the first image
    assert picture.std() > 40


# ---- what a model will see -----------------------------------------------------------------------


def test_crops(folder, tmp_path, capsys):
    argv = ["data", f"folder:{folder}", "--out", tmp_path / "out", "--crops", 2]
    argv += ["--config", ROOT / "experiments/demo.py"]
    code, text, err = run(capsys, *argv)
    assert code == 0 and "wrote 2 into" in err
    pictures = sorted((tmp_path / "out/crops").iterdir())
    assert [path.name for path in pictures] == ["000.png", "001.png"]
    for path in pictures:
        with Image.open(path) as image:
            assert image.size[0] > 900 and image.size[1] > 600
    assert (tmp_path / "out/report.json").exists()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "the following arguments are required: VERB"),
        (["dat", "scenes"], "invalid choice: 'dat'"),
        (["data"], "the following arguments are required: SPEC"),
        (["data", "scenes", "--limt", "3"], "unrecognized arguments: --limt 3"),
        (["data", "scenes", "--limit", "-3"], "--limit"),
        (["data", "scenes", "--threads", "0"], "'0' is not a whole number from 1 on"),
        (["data", "scene:20"], "did you mean 'scenes'?"),
        (["data", "folder:nowhere"], "'nowhere' does not exist"),
        (["data", "scenes:9?split=vla"], "'vla'"),
        (["data", "scenes:9", "--crops", "2"], "--crops N needs --out DIR"),
        (["data", "scenes:9", "--config", "x.py"], "--config is only used with --crops N"),
        (["data", "scenes:9", "--verify"], "--verify is only used with --shard DIR"),
        (["data", "scenes:9", "--shard-mb", "3"], "--shard-mb is only used with --shard DIR"),
        (["data", "scenes:9", "--shard", "s", "--crops", "2"], "not used with --shard DIR"),
        (["data", "scenes:9", "--out", "file/in"], "cannot write into 'file/in'"),
        (["data", "scenes:9", "--json", "file/in/x"], "cannot write into 'file/in'"),
        (["data", "scenes:9", "--crops", "2", "--out", "o", "--config", "demo.py"], "'demo.py'"),
        (["data", "scenes:9", "--crops", "2", "--out", "o", "--phase", "gram"], "--config FILE"),
        (
            ["data", "scenes:9", "--crops", "2", "--out", "o"]
            + ["--config", f"{ROOT}/experiments/gram_vitl.py", "--phase", "grm"],
            "no phase 'grm'; there are pretrain, gram, highres",
        ),
    ],
)
def test_one_sentence_for_what_cannot_work(argv, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1


def test_a_broken_experiment_is_named(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def get_config():\n    return undefined\n")
    argv = ["data", "scenes:9", "--crops", "2", "--out", tmp_path / "out"]
    code, _, err = run(capsys, *argv, "--config", tmp_path / "mine.py")
    assert code == 2 and "mine.py: name 'undefined' is not defined" in err


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(verb, "write", full)
    code, _, err = run(capsys, "data", "scenes:9", "--out", tmp_path / "out")
    assert code == 1 and "No space left on device" in err and "report.json" in err


def test_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    common.write(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        common.write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---- stopping ------------------------------------------------------------------------------------


def test_a_stopped_look_goes_on(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run(capsys, "data", "scenes:60", "--out", tmp_path / "whole")[0] == 0
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        kill_at(patch, survey, "glance", 20)
        code, text, err = run(capsys, "data", "scenes:60", "--out", out)
    assert (code, text) == (75, "")
    done = int(re.search(r"stopped after (\d+) of 60 images; run the same command", err)[1])
    assert 10 < done < 40 and [path.name for path in out.iterdir()] == [verb.UNFINISHED]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    glances = []
    look = survey.glance
    monkeypatch.setattr(survey, "glance", lambda *a: glances.append(1) or look(*a))
    code, text, err = run(capsys, "data", "scenes:60", "--out", out)
    assert code == 0 and err.startswith(f"{60 - done} images to go") and len(glances) == 60 - done
    reports = [json.loads((f / "report.json").read_text()) for f in (out, tmp_path / "whole")]
    for figures in reports:
        for timed in ("seconds", "images_per_second", "bytes_per_second"):
            figures.pop(timed)
    assert reports[0] == reports[1] and not (out / verb.UNFINISHED).exists()


def test_a_second_ctrl_c_interrupts():
    with common.Stop() as stop:
        assert not stop()
        for _ in range(2):  # some schedulers repeat themselves
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_before_long_work(capsys, monkeypatch):
    def interrupted(spec):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "open_source", interrupted)
    assert run(capsys, "data", "scenes:9") == (130, "", "interrupted\n")


def test_sigterm_ends_a_process_with_75(tmp_path):
    argv = [sys.executable, "-m", "dinojax", "data", "scenes:1000000", "--limit", "0"]
    with subprocess.Popen(
        [*argv, "--out", str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr.readline() == "1,000,000 images to go\n"
        process.terminate()
        err = process.stderr.read()
    assert process.returncode == 75
    assert re.fullmatch(r"stopped after \d+ of 1,000,000 images; run the same .* go on\n", err)


# ---- copying -------------------------------------------------------------------------------------


def test_shards_are_written_and_resumed(folder, tmp_path, capsys, monkeypatch):
    argv = ["data", "scenes:400?size=64", "--shard-mb", 1]
    code, text, _ = run(capsys, *argv, "--shard", tmp_path / "whole")
    assert code == 0 and f"array_record:{tmp_path}/whole/*.array_record" in text
    with monkeypatch.context() as patch:
        kill_at(patch, shards, "pack", 200)
        code, text, err = run(capsys, *argv, "--shard", tmp_path / "parts")
    assert (code, text) == (75, "") and "run the same command to go on" in err
    first = tmp_path / "parts/data-00000.array_record"
    before = first.stat().st_mtime_ns
    assert not (tmp_path / "parts/index.json").exists()
    assert not list((tmp_path / "parts").glob("*tmp*"))
    assert run(capsys, *argv, "--shard", tmp_path / "parts")[0] == 0
    assert first.stat().st_mtime_ns == before  # not written again
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / file.name).read_bytes()
    shown = sources.open_source(f"array_record:{tmp_path}/parts/*.array_record")
    np.testing.assert_array_equal(shown.image(399), sources.open_source("scenes:400").image(399))


def test_what_cannot_be_read_is_left_out_of_shards(folder, tmp_path, capsys):
    code, text, _ = run(capsys, "data", f"folder:{folder}", "--shard", tmp_path / "s", "--verify")
    assert code == 0 and text.startswith("left out: 1 that cannot be read")
    assert len(sources.open_source(f"array_record:{tmp_path}/s/*.array_record")) == 10
