"""`dinojax features`: features of a data set to disk, as an embedding set."""

import argparse
import contextlib
import re
from pathlib import Path
from typing import Any

from dinojax.verbs import common
from dinojax.verbs.common import Stop, Stopped, folder, positive, progress, tell

EXAMPLES = """\
examples:
  dinojax features --weights runs/a --data folder:/images --out features
  dinojax features --weights runs/a@5000 --data scenes:2000 --size 64 --limit 500 --out features
  dinojax features --weights W --data tar:'/d/*.tar' --out features --part 0/4    and 1/4, 2/4, 3/4

DIR becomes an embedding set: manifest.json, and Parquet shards with the columns id, row, label and
embedding. Run the same command again to go on after a stop. Then, for example:
  python -m data_curation run --config photos embed.source= embeddings=DIR
  dinojax data curated:DIR/emb-00000.parquet             the images of a shard

"""


def add_parser(verbs: Any) -> None:
    """What the verb takes."""
    parser = verbs.add_parser(
        "features",
        help="features of a data set to disk",
        description="Computes one vector for every image and writes them in shards. Images are "
        "resized as for evaluation: shorter side to --size, then the centre crop. Those that "
        "cannot be read are left out and listed.",
        epilog=EXAMPLES + common.SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=run)
    add = parser.add_argument
    add("--weights", metavar="W", required=True, help="a run, RUN@STEP or a weights file")
    add("--data", metavar="SPEC", required=True, help="where the images are, see below")
    add("--out", metavar="DIR", required=True, help="write the embedding set here")
    tokens = ("cls", "mean", "cls+mean")
    add("--tokens", choices=tokens, default="cls", help="class token, mean of patches, or both")
    add("--size", metavar="N", type=positive, default=224, help="image side in pixels (224)")
    add("--dtype", choices=("float16", "float32"), default="float16", help="stored (float16)")
    add("--limit", metavar="N", type=positive, help="use N images, evenly spread")
    add("--batch", metavar="N", type=positive, default=64, help="images at a time (64)")
    add("--threads", metavar="N", type=positive, help="that read images (default: one a core)")
    add("--shard-rows", metavar="N", type=positive, default=4096, help="images of a shard (4,096)")
    add("--part", metavar="I/N", type=part, default=(0, 1), help="of N machines, this is the I-th")


def part(text: str) -> tuple[int, int]:
    """An argument such as 0/4."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1, such as 0/4")
    return int(found[1]), int(found[2])


def run(arguments: argparse.Namespace) -> int:
    """Compute, or go on."""
    from dinojax import backbone, features
    from dinojax.data import sources, storage

    if storage.local(arguments.out):
        folder(Path(arguments.out))

    recipe = features.Recipe(arguments.tokens, arguments.size, arguments.dtype)
    source = sources.open_source(arguments.data)
    network = backbone.load(arguments.weights)
    with Stop() as stop, contextlib.ExitStack() as bars:
        told = None

        def count(done: int, total: int) -> None:
            nonlocal told
            told = told or bars.enter_context(progress("images", total, done))
            told(done)
            if stop():
                raise Stopped

        try:
            summary = features.write_features(
                network,
                source,
                arguments.out,
                recipe,
                spec=arguments.data,
                weights=arguments.weights,
                batch=arguments.batch,
                limit=arguments.limit,
                shard_rows=arguments.shard_rows,
                threads=arguments.threads or common.threads(arguments.data),
                part=arguments.part,
                progress=count,
            )
        except Stopped:
            tell("stopped; finished shards are kept, run the same command to go on")
            return common.TRY_AGAIN
    report(arguments.out, summary)
    return 0


def report(out: str, summary: Any) -> None:
    """What was done, on stdout."""
    if summary.computed:
        rate, idle = summary.computed / summary.seconds, summary.waiting / summary.seconds
        print(
            f"{summary.computed:,} images in {summary.seconds:,.0f} s, {rate:,.0f} a second; "
            f"{idle:.0%} of the time went into waiting for images"
        )
    if summary.rows is None:
        print(f"{out}/ waits for its other parts")
        return
    if summary.left_out:
        print(f"left out: {summary.left_out:,} that cannot be read ({out}/unreadable.txt)")
    print(f"{out}/manifest.json: {summary.rows:,} rows")
