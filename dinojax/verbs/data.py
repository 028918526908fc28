"""`dinojax data SPEC`: what a source of images holds, and what a model will see of it."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinojax.verbs import common
from dinojax.verbs.common import Stop, Stopped, folder, positive, progress, tell, whole, write

LIMIT = 20_000  # images that are looked at
UNFINISHED = ".unfinished.npz"  # in --out: counts of a pass that was stopped
EXAMPLES = """\
examples:
  dinojax data scenes:200 --out looks                  try it without data
  dinojax data folder:/images --out looks              figures and pictures of them
  dinojax data 'parquet:/d/*.parquet?split=train' --limit 0 --json figures.json
  dinojax data folder:/images --crops 4 --out looks --config experiments/gram_vitl.py --phase gram
  dinojax data s3://bucket/images --shard /disk/shards    copy into a few large files

"""


def add_parser(verbs: Any) -> None:
    """What the verb takes."""
    parser = verbs.add_parser(
        "data",
        help="what a source of images holds, and what a model will see of it",
        description="Shows formats, sizes, bands, mean and deviation, duplicates, unreadable files "
        "and balance of classes, and the command that trains on the images.",
        epilog=EXAMPLES + common.SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=run)
    add = parser.add_argument
    add("spec", metavar="SPEC", help="where the images are, see below")
    add("--out", metavar="DIR", type=Path, help="write report.json, unreadable.txt and pictures")
    add("--json", metavar="FILE", type=Path, help="write the figures into this file")
    looked = f"look at N images, evenly spaced (default {LIMIT:,}; 0: at all)"
    add("--limit", metavar="N", type=whole, default=LIMIT, help=looked)
    add("--threads", metavar="N", type=positive, help="that read images (default: one a core)")
    add = parser.add_argument_group("what a model will see").add_argument
    add("--crops", metavar="N", type=positive, help="draw all views of N images into DIR/crops")
    add("--config", metavar="FILE", help="of this experiment[:variant]: its crops, masks, colours")
    add("--phase", metavar="NAME", help="of this phase (default: the first)")
    add = parser.add_argument_group("copying, instead of looking").add_argument
    add("--shard", metavar="DIR", type=Path, help="write ArrayRecord shards; run again to go on")
    add("--shard-mb", metavar="N", type=positive, help="MB of a shard (default 256)")
    add("--verify", action="store_true", help="decode every image, leave out what cannot be")


def run(arguments: argparse.Namespace) -> int:
    """Figures, pictures and advice; or, with --shard, a copy."""
    if arguments.shard:
        refuse(arguments, ("out", "json", "crops", "config", "phase"), "not used with --shard DIR")
        return shard(arguments)
    refuse(arguments, ("shard_mb", "verify"), "only used with --shard DIR")
    if not arguments.crops:
        refuse(arguments, ("config", "phase"), "only used with --crops N")
    elif not arguments.out:
        raise ValueError("--crops N needs --out DIR to write the pictures into.")
    out = folder(arguments.out) if arguments.out else None
    if arguments.json:
        folder(arguments.json.parent)

    from dinojax.data import advice, report, sources, survey

    source = sources.open_source(arguments.spec)
    if arguments.crops:
        draw_crops(arguments, source, out)
    tally = survey.new_tally(len(source), arguments.limit)
    what = f"{arguments.spec} {len(source)} {arguments.limit}"
    if out:
        tally = survey.load_tally(tally, out / UNFINISHED, what)
    threads = arguments.threads or common.threads(arguments.spec)
    with Stop() as stop, progress("images", len(tally.chosen), tally.done) as told:
        survey.survey(source, tally, threads, told, stop)
    if tally.done < len(tally.chosen):
        if out:
            survey.save_tally(tally, out / UNFINISHED, what)
        on = "run the same command to go on" if out else "with --out DIR one could go on from there"
        tell(f"stopped after {tally.done:,} of {len(tally.chosen):,} images; {on}")
        return common.TRY_AGAIN
    figures = report.summarise(source, tally, arguments.spec)
    show(advice.table(figures))
    print("\n".join(["", *advice.advice(figures)]))
    if arguments.json:
        write(arguments.json, json.dumps(figures, indent=1) + "\n")
    if out:
        write_report(out, source, figures, tally.problems)
        (out / UNFINISHED).unlink(missing_ok=True)
    return 0


def refuse(arguments: argparse.Namespace, options: Sequence[str], why: str) -> None:
    """Raise ValueError if one of these options is given."""
    for option in options:
        if getattr(arguments, option):
            raise ValueError(f"--{option.replace('_', '-')} is {why}.")


def show(rows: Sequence[tuple[str, str]]) -> None:
    """A table of two columns on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    Console(highlight=False).print(table)


def write_report(
    out: Path, source: Any, figures: dict[str, Any], problems: Sequence[tuple[str, str]]
) -> None:
    """Everything that --out is for, but for the crops."""
    from dinojax import data_pictures, visualize
    from dinojax.data import sources

    write(out / "report.json", json.dumps(figures, indent=1) + "\n")
    write(out / "unreadable.txt", "".join(f"{name}\t{reason}\n" for name, reason in problems))
    spec, count = figures["spec"], min(data_pictures.SHOWN, len(source))
    if figures["range"] and figures["range"]["needed"]:  # there would be little to see without
        spec += ("&" if "?" in spec else "?") + figures["range"]["option"]
        source = sources.open_source(spec)
    title = f"{spec}   ({count} of {len(source):,} images)"
    visualize.save(data_pictures.contact(source, title), out / "contact.png")
    if figures["readable"]:
        visualize.save(data_pictures.sizes(figures), out / "sizes.png")
    if figures["labels"]:
        visualize.save(data_pictures.labels(figures), out / "labels.png")
    tell(f"wrote {out}/")


def draw_crops(arguments: argparse.Namespace, source: Any, out: Path) -> None:
    """All views of some images, one picture for each image."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a few crops; an accelerator may be in use
    from dinojax import crop_pictures, visualize

    if arguments.config:
        config = experiment(arguments.config)
        names = [phase.name for phase in config.phases]
        if arguments.phase and arguments.phase not in names:
            raise ValueError(f"no phase {arguments.phase!r}; there are {', '.join(names)}.")
        phase = names.index(arguments.phase) if arguments.phase else 0
        batches, policy = crop_pictures.of_phase(config, phase, source, arguments.crops)
    else:
        refuse(arguments, ("phase",), "only used with --config FILE")
        batches, policy = crop_pictures.of_defaults(source, arguments.crops)
    for number, picture in enumerate(crop_pictures.panels(batches, policy, arguments.crops)):
        visualize.save(picture, out / "crops" / f"{number:03d}.png")
    tell(f"wrote {number + 1} into {out}/crops/")


def experiment(given: str) -> Any:
    """The resolved config of FILE or FILE:VARIANT; ValueError whatever is wrong with it."""
    from dinojax import config as configs

    file, _, variant = given.partition(":")
    try:
        config = configs.resolve(configs.load_file(file, variant or None))
        configs.validate(config)
    except Exception as error:  # whatever the experiment file itself does
        reason = str(error) or type(error).__name__
        raise ValueError(reason if file in reason else f"{file}: {reason}") from error
    return config


def shard(arguments: argparse.Namespace) -> int:
    """Copy a source into ArrayRecord shards."""
    from dinojax.data import shards, sources

    source = sources.open_source(arguments.spec)
    with Stop() as stop, progress("images", len(source)) as told:

        def count(done: int, total: int) -> None:
            told(done)
            if stop():
                raise Stopped

        try:
            index = shards.write_shards(
                source,
                arguments.shard,
                spec=arguments.spec,
                shard_bytes=(arguments.shard_mb or 256) << 20,
                verify=arguments.verify,
                progress=count,
            )
        except Stopped:
            tell("stopped; finished shards are kept, run the same command to go on")
            return common.TRY_AGAIN
    left_out = len(json.loads(index.read_text())["skipped"])
    if left_out:
        print(f"left out: {left_out:,} that cannot be read (listed in {index})")
    print(f"wrote {index.parent}/; train on it with")
    print(f"  --config.data.source='array_record:{index.parent}/*.array_record'")
    return 0
