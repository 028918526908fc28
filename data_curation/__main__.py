"""`python -m data_curation VERB --config FILE [key=value ...]`: curate images or embeddings.

Exit codes: 0 done; 1 ended early (a full disk, ...); 2 something in the command, the config or the
data cannot work, nothing was begun; 75 stopped by SIGTERM or Ctrl-C after a save, or another host
was lost: the same command goes on; 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ml_collections import ConfigDict

from data_curation import config as configs
from data_curation import settings
from dinojax.data.options import nearest

if TYPE_CHECKING:
    from dinojax.hosts import Team

TRY_AGAIN = 75
VERBS = {
    "run": "all stages, one after the other; again: what is left",
    "embed": "images -> vectors, by a dinojax backbone",
    "index": "which rows are usable: bad ones, licences, opt-outs (DIR: make its manifest.json)",
    "dedup": "near-duplicates, and pictures of evaluation sets, out",
    "cluster": "hierarchical k-means, bottom-up",
    "sample": "balanced samples of the tree: samples/NAME",
    "retrieve": "rows like those of seed sets: retrieval/NAME",
    "mix": "mixture.json, which training reads (curated:WORKDIR/mixture.json)",
    "report": "figures and pictures: report.json, report.html",
    "export": "lists of what was chosen, in another format or without some rows",
}
# Options that are keys in other words: verb -> option -> (setting, what it is followed by, help).
OPTIONS = {
    "index": {"--verify": ("", "", "of DIR: compare the SHA-256 of every shard instead")},
    "report": {
        "--by": ("report.by=", "COLUMN", "count a column's values before and after"),
        "--gallery": ("report.gallery=", "N", "show pictures of N clusters"),
    },
    "export": {
        "--format": ("export.format=", "F", "parquet, txt, npy or arrayrecord-index"),
        "--exclude": ("export.exclude=", "FILE", "without these ids, urls or sha256, one a line"),
    },
}
ABOUT = "From images or embeddings to a deduplicated, balanced training set."
EXAMPLES = """\
examples:
  python -m data_curation run --config ring2d                        a minute, needs no data
  python -m data_curation run --config photos embed.source=folder:/images embed.weights=runs/demo
  python -m data_curation run --config web_4level embeddings=/data/embeddings --dry-run
  python -m data_curation index /data/embeddings                     make manifest.json of a folder
  python -m data_curation report --config ring2d --by label          one stage alone

FILE is a config (get_config() of a Python file), or a name in data_curation/configs. Any key of it
can be set behind: seed=1, dedup.threshold=0.5, 'cluster.levels[0].k=500',
'sample=(sample("small", 1000), sample("large", 9000, strategy="c"))'; `--help-keys` lists them.

Everything is written into workdir=DIR. The same command again goes on where it ended, and refuses
what has changed: take another workdir, or --force-restart to discard those stages. On several hosts
start it on each, as a training run (docs/tpu.md).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    try:
        return begin(argv)
    except BrokenPipeError:  # `python -m data_curation --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def begin(argv: Sequence[str] | None) -> int:
    """What `main` runs."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        if arguments.directory is not None:
            return make_manifest(arguments.directory, arguments.verify)
        config = read_config(arguments)
        if arguments.help_keys:
            print("\n".join(f"{key}={value}" for key, value in configs.flatten(config).items()))
            return 0
        configs.validate(config)
        if arguments.dry_run:
            return show_plan(config)
        from dinojax import hosts  # jax starts only when it is needed

        team = hosts.start()
    except ValueError as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        return 130
    return team.run(lambda: work(arguments, config, team))


def work(arguments: argparse.Namespace, config: ConfigDict, team: "Team") -> int:
    """What every host does; returns the exit code."""
    from data_curation import run, stages
    from data_curation.files import Stopped

    wrong, steps = "", []
    try:
        steps = stages.stages(config, arguments.verb)
        run.check(Path(config.workdir), config, steps, arguments.verb, arguments.force_restart)
    except ValueError as error:
        wrong = str(error)
    wrong = team.agree(wrong, configs.flatten(config))
    if wrong:
        return refuse(wrong) if team.index == 0 or team.count == 1 else 2
    with run.stoppable() as stop:
        try:
            here = run.Work(Path(config.workdir), config, stages.mesh(config), team, stop)
            run.run(here, steps, arguments.verb, arguments.force_restart)
        except Stopped as stopped:
            print(f"stopped ({stopped}); run the same command to go on", file=sys.stderr)
            return TRY_AGAIN
        except (ValueError, OSError) as error:
            team.wait_for_the_lost(error)
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; run the same command to go on", file=sys.stderr)
            return 130
    return 0


def read_config(arguments: argparse.Namespace) -> ConfigDict:
    """The config with the settings of the command line; ValueError if one cannot be."""
    if not arguments.config:
        known = ", ".join(sorted(f.stem for f in settings.CONFIGS.glob("[a-z]*.py")))
        raise ValueError(f"--config is missing; give a file, or one of {known}")
    given = list(arguments.settings)
    for option, (setting, value, _) in OPTIONS.get(arguments.verb, {}).items():
        said = getattr(arguments, option.strip("-").replace("-", "_"))
        if said and setting:
            given.append(f"{setting}{said if value else ''}")
    if arguments.workdir:
        given.append(f"workdir={arguments.workdir}")
    config = settings.change(settings.load(arguments.config), given)
    if not config.workdir:
        raise ValueError("workdir is ''; give workdir=DIR, where everything is written")
    return config


def show_plan(config: ConfigDict) -> int:
    """The plan of `--dry-run`; 2 if it does not fit."""
    from data_curation import plan, stages

    data = stages.size(config)
    machine = plan.find_machine(config, Path(config.workdir))
    costs = plan.costs(config, data, machine)
    print(plan.table(costs, machine))
    plan.refuse(config, costs, machine)
    return 0


def make_manifest(directory: str, verify: bool) -> int:
    """`index DIR`."""
    from data_curation import embeddings

    if verify:
        found = embeddings.open_embeddings(directory, verify=True)
        print(f"{directory}: {len(found):,} rows of {found.dim}, as manifest.json says")
        return 0
    made = embeddings.index(directory)
    print(f"{directory}: {made['n_total']:,} rows of {made['dim']}, {len(made['shards'])} shards")
    return 0


# ---- arguments ----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """What is wrong with the arguments, in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        sys.exit(refuse(f"{message}; {self.prog} --help explains"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """VERB and its arguments; settings may stand anywhere behind it."""
    # Not argparse's own sub-commands: these cannot have settings on both sides of an option.
    prog = "python -m data_curation"
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {verb:{width}}  {what}" for verb, what in VERBS.items())
        print(
            f"usage: {prog} VERB --config FILE [key=value ...]\n\n{ABOUT}\n\n{verbs}\n\n{EXAMPLES}"
        )
        sys.stdout.flush()
        sys.exit(0 if argv else 2)
    verb = argv[0]
    if verb not in VERBS:
        sys.exit(refuse(f"there is no verb {verb!r}; {nearest(verb, VERBS)}"))
    parser = Parser(
        prog=f"{prog} {verb}",
        description=f"{verb}: {VERBS[verb]}.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value", help="keys of the config to change")
    add("--config", metavar="FILE", help="the config, or FILE:VARIANT")
    add("--workdir", metavar="DIR", help="as workdir=DIR")
    add("--dry-run", action="store_true", help="only say what it would cost, and if it fits")
    add("--force-restart", action="store_true", help="discard stages whose config has changed")
    add("--help-keys", action="store_true", help="list the keys of the config and their values")
    for option, (_, value, text) in OPTIONS.get(verb, {}).items():
        add(option, help=text, **({"metavar": value} if value else {"action": "store_true"}))
    found = parser.parse_intermixed_args(argv[1:])
    found.verb, found.directory = verb, None
    if verb == "index" and found.settings and "=" not in found.settings[0]:
        found.directory, *found.settings = found.settings
    return found


def refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
