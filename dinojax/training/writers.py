"""Where numbers go: metrics.jsonl always, TensorBoard and wandb when there, a progress line to
read.

    metrics.jsonl   {"step", "phase", every scalar by name}; a row per logged step and per
    evaluation.
                    Only what the training computes, so two runs can be compared bit for bit: floats
                    are written so that they read back exactly (NaN and Infinity as Python's json).
    speed.jsonl     {"step", "phase", images_per_second, mfu, ...}: what differs from run to run.
                    Of a mixture also rows_<component>, its share of the rows since the last start
                    (or phase), and batch, the component of the latest one ("mixed": of several).
    tensorboard/    the same scalars, and pictures.

`step` is the number of steps done. All files are complete up to the last call (a killed process
loses nothing), and only the first process of a run writes.
"""

import atexit
import importlib.util
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dinojax.training.profiling import Speed

_LOSSES = ("loss", "dino_local", "dino_global", "ibot", "koleo", "gram")


class MetricsLog:
    """All writers of a run.

    Args:
        workdir: directory of the run.
        resume_step: steps done at the restored checkpoint; rows beyond it are removed, since those
            steps come again. 0 is a fresh start and removes everything.
        wandb: project name; "" is off.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], resume_step: int = 0, wandb: str = ""
    ) -> None:
        self._files: dict[str, Any] = {}
        self._board = self._wandb = None
        self.active = jax.process_index() == 0
        if not self.active:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        for name in ("metrics", "speed"):
            path = workdir / f"{name}.jsonl"
            _drop_rows_after(path, resume_step)
            self._files[name] = path.open("a")
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter  # imported late: it costs start-up time

            logdir = workdir / "tensorboard"
            self._board = SummaryWriter(str(logdir), purge_step=resume_step + 1)
        if wandb:
            self._wandb = _open_wandb(workdir, wandb)

    def write(self, step: int, phase: str, row: Mapping[str, Any]) -> None:
        """Scalars of one step."""
        self._write("metrics", "train", step, phase, row)

    def write_eval(self, step: int, phase: str, row: Mapping[str, Any]) -> None:
        """Results of evaluations after `step` steps."""
        self._write("metrics", "eval", step, phase, row)

    def write_speed(
        self, step: int, phase: str, speed: Speed, data: Mapping[str, Any] | None = None
    ) -> None:
        """What the step timer saw, and what the data told of themselves (a mixture's shares)."""
        known = {name: value for name, value in speed._asdict().items() if value is not None}
        self._write("speed", "speed", step, phase, known | dict(data or {}))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 image [i, j, c]."""
        if self._board is not None:
            self._board.add_image(f"pictures/{name}", image, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({f"pictures/{name}": wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Ends all writers."""
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._board = self._wandb = None

    def _write(self, file: str, group: str, step: int, phase: str, row: Mapping[str, Any]) -> None:
        if not self.active:
            return
        row = {name: _plain(value) for name, value in row.items()}
        line = json.dumps({"step": int(step), "phase": phase, **row}) + "\n"
        try:
            self._files[file].write(line)
            self._files[file].flush()
        except OSError as error:
            path = self._files[file].name
            raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from None
        numbers = {f"{group}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"phase": phase, **numbers}, step=step)


def _plain(value: Any) -> Any:
    """A number of Python's own; json writes its floats with repr, which reads back exactly."""
    return value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) else value


def _drop_rows_after(path: pathlib.Path, step: int) -> None:
    """Keeps the rows of `path` up to `step`, all or nothing; a line cut in writing goes too."""
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with path.open() as rows, temporary.open("w") as kept:
        for line in rows:
            try:
                if 0 < step and json.loads(line)["step"] <= step:
                    kept.write(line)
            except (ValueError, KeyError, TypeError):
                continue
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(temporary, path)


def check_wandb(project: str) -> None:
    """Raise ValueError if wandb is asked for and not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"config.wandb is {project!r} but wandb is not installed; pip install wandb, or set it "
            'to ""'
        )


def _open_wandb(workdir: pathlib.Path, project: str) -> Any:
    check_wandb(project)
    import wandb

    # A resumed run goes on in the same curves.
    known = workdir / "wandb_id"
    if not known.exists():
        known.write_text(wandb.util.generate_id())
    return wandb.init(
        project=project,
        name=workdir.name,
        dir=str(workdir),
        id=known.read_text().strip(),
        resume="allow",
    )


class ProgressLine:
    """One line that stays in place on a terminal; elsewhere a line per update."""

    def __init__(self, phase: str, last: int):
        self.phase, self.last = phase, last
        self._live = None
        self.active = jax.process_index() == 0
        if self.active:
            from rich.console import Console

            console = Console()
            if console.is_terminal and not console.is_jupyter:
                from rich.live import Live

                self._live = Live(console=console, auto_refresh=False)
                self._live.start()
                atexit.register(self.close)  # whatever ends the run, the cursor comes back

    def update(self, step: int, row: Mapping[str, float], speed: Speed) -> None:
        """`step` of `last` are done."""
        if not self.active:
            return
        line = describe(self.phase, step, self.last, row, speed)
        if self._live is None:
            print(line, flush=True)
        else:
            from rich.text import Text

            self._live.update(Text(line, overflow="ellipsis", no_wrap=True), refresh=True)

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)


def describe(phase: str, step: int, last: int, row: Mapping[str, float], speed: Speed) -> str:
    """The line: phase, step, losses, speed, utilisation, waiting, time left.

    gram 1,200/20,000 | loss 10.1 dino_local 7.31 | 812 img/s | MFU 41% | wait 2% | ETA 3:12:05
    """
    losses = " ".join(f"{name} {row[name]:.4g}" for name in _LOSSES if name in row)
    rate = speed.images_per_second
    parts = [
        f"{phase} {step:,}/{last:,}",
        losses,
        f"{rate:,.0f} img/s" if rate >= 10 else f"{rate:.2g} img/s",
        "" if speed.mfu is None else f"MFU {100 * speed.mfu:.0f}%",
        f"wait {100 * speed.data_wait:.0f}%",
        f"ETA {_clock(speed.eta_seconds)}",
    ]
    return " | ".join(part for part in parts if part)


def _clock(seconds: float) -> str:
    """h:mm:ss, with days in front where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"
