"""Train: `python launch/run.py --config experiments/X.py --workdir DIR`. Run again to resume.

Every value of the config can be changed on the command line:

    --config.batch_size=64                      a value
    --config.data.source=folder:/images         what to train on
    --config.data.mixture[1].weight=2           a value of the second component of a mixture
    --config.phases[0].steps=500                a value of the first phase
    --config experiments/gram_vitl.py:tiny      a variant the experiment file offers

On several hosts, start the same command on each. How they find each other (TPU pods, GKE, Slurm,
MPI, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID) is printed.

    --preflight                                 only check that they can work together

Exit codes: 0 done; 1 the run ended early (the sentence says why); 2 something in the command or
the config cannot work, nothing was started; 75 start again to go on: stopped by SIGTERM or Ctrl-C
after a save, or another host was lost.
"""

import logging as stdlib_logging
import re
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from dinojax import startup

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, e.g. experiments/demo.py.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run: checkpoints, metrics, pictures, weights."
)
PREFLIGHT = flags.DEFINE_bool("preflight", False, "Check hosts, config, data and workdir only.")


def main(argv: list[str]) -> int:
    """Prepare (sentences, no work), then train."""
    if len(argv) > 1:
        return refuse(f"unexpected argument {argv[1]!r}; values are given as --config.KEY=VALUE")
    for flag, example in ((CONFIG, "experiments/demo.py"), (WORKDIR, "runs/a")):
        if flag.value is None:
            return refuse(f"--{flag.name} is missing; for example --{flag.name} {example}")

    from dinojax import hosts  # after the flags: jax starts only when it is needed

    logging.set_verbosity(logging.WARNING)
    # A failed save is reported once, in a sentence, and not again for every array of it.
    sys.unraisablehook = without_echoes
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    try:
        team = hosts.start()
    except ValueError as error:
        return refuse(str(error))
    return team.run(lambda: work(team))


def work(team: "hosts.Team") -> int:
    """What every host does; returns the exit code."""
    from dinojax import config as configs
    from dinojax import preflight, train
    from dinojax.data.decode import UnreadableImage
    from dinojax.training import checkpoint, health

    wrong = ""
    try:
        run = train.prepare(CONFIG.value, WORKDIR.value)
    except (ValueError, checkpoint.CheckpointError) as error:
        wrong = str(error)
    wrong = team.agree(wrong, configs.flatten(CONFIG.value))
    if wrong:
        return refuse(wrong)
    if team.index == 0:
        print(team.describe(run.mesh), flush=True)
    if PREFLIGHT.value:
        return preflight.check(run, team)
    try:
        return train.train(run)
    except (
        health.TrainingDiverged,
        checkpoint.CheckpointError,
        UnreadableImage,
        OSError,
    ) as error:
        team.wait_for_the_lost(error)
        print(f"error: {error}", file=sys.stderr)
        return 1


def without_echoes(report: Any) -> None:
    """Unraisable errors, except those of arrays calling back into a loop that orbax has closed."""
    closed = isinstance(report.exc_value, RuntimeError) and "loop is closed" in str(
        report.exc_value
    )
    if not closed:
        sys.__unraisablehook__(report)


def refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


def parse(argv: list[str]) -> list[str]:
    """Flags -> values; a misspelt key ends in a sentence with the nearest name."""
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        sys.exit(0)
    wrong = explain(argv)
    if wrong is None:
        try:
            return flags.FLAGS(argv)
        except Exception as error:  # the flag libraries raise nearly every kind
            wrong = " ".join(str(error.args[0] if error.args else error).split())
    sys.exit(refuse(wrong))


def explain(argv: list[str]) -> str | None:
    """What is wrong with the experiment file or a --config.KEY, in one sentence; None: nothing."""
    from dinojax import config as configs

    pairs = zip(argv, [*argv[1:], ""], strict=True)
    given = [b if a == "--config" else a[9:] for a, b in pairs if re.match(r"--config(=|$)", a)]
    if not given:
        return None  # main says so
    file, _, variant = given[-1].partition(":")
    try:
        known = list(configs.flatten(configs.load_file(file, variant or None)))
    except Exception as error:  # whatever the experiment file itself does
        reason = str(error) or type(error).__name__
        return reason if file in reason else f"{file}: {reason}"
    known += {key.partition("[")[0] for key in known}  # a tuple as a whole
    for argument in argv:
        match = re.match(r"--config\.([^=]+)", argument)
        if match and match[1] not in known:
            return f"the config has no key {match[1]!r}; {configs.nearest(match[1], known)}"
    return None


if __name__ == "__main__":
    startup.restart_with_huge_pages()
    app.run(main, flags_parser=parse)
