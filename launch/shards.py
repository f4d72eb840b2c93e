"""Make, index and check shards, and see what a run will read.

    python launch/shards.py demo data/photos                    the demo photographs, as training and validation shards
    python launch/shards.py digits data/digits                  scikit-learn's handwritten digits, as such shards, too
    python launch/shards.py emoji PACKAGE data/emoji            the emoji of npm's emoji-datasource-google, too
    python launch/shards.py prepare SRC --out DIR --val 0.1     shards for training and validation from your images
    python launch/shards.py index SRC --out DIR                 an index for webdataset shards that others made
    python launch/shards.py verify DIR                          read everything back
    python launch/shards.py order DIR --batch B --steps N       which rank and worker decodes which sample, step by step

Each command can be interrupted and run again, and continues where it stopped. Exit codes: 0 done, 1 damaged shards
found (verify), 2 something cannot be read.
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from vaescale.data.order import VERSIONS
from vaescale.data.parallel import processors


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    several = argparse.ArgumentParser(add_help=False)
    several.add_argument("--processes", type=positive, default=processors(), help="default: all cores")
    several.add_argument(
        "--max-megapixels",
        type=positive,
        default=100,
        help="leave out larger images (100); set data.max_megapixels to the same",
    )
    checking = argparse.ArgumentParser(add_help=False)
    checking.add_argument("--check", action="store_true", help="decode every image, not only its header")

    command = commands.add_parser("demo", help="write the demo photographs")
    command.add_argument("root", type=Path)
    command = commands.add_parser("digits", help="write the demo digits")
    command.add_argument("root", type=Path)
    command = commands.add_parser("emoji", help="write the demo emoji")
    command.add_argument("source", type=Path, metavar="PACKAGE", help="npm's emoji-datasource-google: .tgz or folder")
    command.add_argument("root", type=Path)
    add_prepare(commands.add_parser("prepare", help="write shuffled shards of images", parents=[several, checking]))
    add_index(commands.add_parser("index", help="index shards that others made", parents=[several, checking]))
    command = commands.add_parser("verify", help="read every shard back", parents=[several])
    command.add_argument("folder", type=Path, help="folder of the index")
    command.add_argument("--decode", action="store_true", help="decode every image, too: hours for ImageNet")
    add_order(commands.add_parser("order", help="print what a run reads: step rank worker key"))
    return parser.parse_args()


def add_prepare(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "source",
        type=Path,
        help="a tree or a tar of class folders, ILSVRC2012_img_train.tar, or images without class folders",
    )
    command.add_argument(
        "--out", type=Path, required=True, help="folder of the shards and their index; with --val of train/ and val/"
    )
    command.add_argument(
        "--val",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="put this share of the images, such as 0.1, into OUT/val and the others into OUT/train (default: all into "
        "OUT); an image's name decides, so an image never changes sides",
    )
    command.add_argument(
        "--convert",
        action="store_true",
        help="also take TIFF, BMP and GIF (the first frame), written as PNG, and HEIC with pillow-heif, as JPEG",
    )
    command.add_argument("--labels", type=Path, help="file of labels, for images that are not in class folders")
    command.add_argument("--unlabelled", action="store_true", help="the images have no classes: every label is 0")
    command.add_argument(
        "--classes",
        type=Path,
        help="classes.json of the training shards, for the same class numbers; default: that of train/ next to --out",
    )
    command.add_argument("--short-side", type=natural, default=0, help="pixels; default: the original bytes, untouched")
    command.add_argument(
        "--quality",
        type=int,
        choices=range(1, 101),
        metavar="1…100",
        default=95,
        help="JPEG quality with --short-side, and of HEIC with --convert (95)",
    )
    command.add_argument("--shard-mib", type=amount, default=128, help="size of a shard (128)")
    command.add_argument("--seed", type=natural, default=0, help="of the shuffle and of --val (0)")


def add_index(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="folder, or URL: http(s)://, s3://, gs://, hf://")
    command.add_argument("--out", type=Path, help="folder of the index; default: SOURCE")
    command.add_argument("--pattern", default="*.tar", help="which shards: 'train-*.tar', 'train-{0000..1023}.tar'")
    command.add_argument("--picture", help="extension of the image, where a sample has several")
    command.add_argument("--label-field", default="", help="field of the sample's JSON that holds the class number")
    command.add_argument("--unlabelled", action="store_true", help="the images have no classes: every label is 0")
    command.add_argument("--attributes", nargs="*", help="numbers of the JSON to keep; default: all")


def add_order(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, help="folder of the index")
    command.add_argument("--seed", type=natural, default=0)
    command.add_argument("--batch", type=positive, required=True, help="images per step, over all ranks")
    command.add_argument("--columns", type=positive, default=256, help="data.columns of the run (256)")
    command.add_argument("--accumulation", type=positive, default=1)
    command.add_argument("--world", type=positive, default=1, help="ranks")
    command.add_argument("--workers", type=natural, default=2, help="workers per rank (2)")
    command.add_argument("--from", dest="first", type=natural, default=0, metavar="STEP")
    command.add_argument("--steps", type=positive, default=1)
    command.add_argument(
        "--order-version",
        type=int,
        choices=VERSIONS,
        default=VERSIONS[-1],
        help="order.version in state.json of the run's checkpoints, 1 if there is none (default: that of new runs)",
    )
    command.add_argument("--cache", default="~/.cache/vaescale", help="data.cache, for shards behind a URL")
    command.add_argument("--cache-gib", type=amount, default=100.0, help="data.cache_gib (100)")


def natural(text: str) -> int:
    if text.isdecimal() and int(text) < 2**48:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")


def positive(text: str) -> int:
    if number := natural(text):
        return number
    raise argparse.ArgumentTypeError("it must be at least 1")


def share(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1, such as 0.1")


def amount(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < 2**30:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0")


if __name__ == "__main__":
    given = parse()  # before the other imports, which take seconds

import signal

from vaescale import process
from vaescale.data import DataError, demo, digits, emoji, names, places, prepare, shards, stream, tar
from vaescale.files import printable


def main(given: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if given.command == "order":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `order … | head` ends quietly
    else:
        process.forgive_output()  # what is made or found is worth more than the words about it
    try:
        return COMMANDS[given.command](given)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {printable(f'{where}{error.strerror or error}')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130


def demo_(arguments: argparse.Namespace) -> int:
    for split, count in demo.write_demo(arguments.root).items():
        print(f"{arguments.root / split}: {count} tiles of {demo.TILE} px")
    return 0


def digits_(arguments: argparse.Namespace) -> int:
    for split, count in digits.write_digits(arguments.root).items():
        print(f"{arguments.root / split}: {count} digits of {digits.SIDE} px")
    return 0


def emoji_(arguments: argparse.Namespace) -> int:
    for split, count in emoji.write_emoji(arguments.source, arguments.root).items():
        print(f"{arguments.root / split}: {count} emoji of {emoji.SIDE} px")
    return 0


def prepare_(arguments: argparse.Namespace) -> int:
    if arguments.unlabelled and (arguments.labels or arguments.classes):
        raise DataError("--unlabelled means that there are no classes: leave out --labels and --classes")
    name = arguments.out.absolute().name
    if arguments.val and name in ("train", "val"):
        raise DataError(
            f"--val makes train and val inside --out: give --out {arguments.out.parent}, or leave out --val"
        )
    known = arguments.classes
    if not known and not arguments.unlabelled and (known := prepare.sibling_classes(arguments.out)):
        print(f"classes are numbered as in {known}: give --classes to use another file")
    classes = shards.read_classes(known) if known else []
    if known and not classes:
        raise DataError(f"{known} contains no class names: give the classes.json of the training shards")
    settings = prepare.Settings(
        arguments.short_side,
        arguments.quality,
        arguments.shard_mib,
        arguments.seed,
        arguments.max_megapixels,
        arguments.check,
        arguments.convert,
        arguments.val,
    )
    for made in prepare.prepare(
        arguments.source, arguments.out, arguments.labels, classes, settings, arguments.processes, arguments.unlabelled
    ):
        named = f", {len(made.classes)} class{'' if len(made.classes) == 1 else 'es'}" if made.classes else ""
        held = f"{names.counted(len(made), 'sample')} in {names.counted(len(made.shards), 'shard')}{named}"
        print(f"{printable(made.folder)}: {held}")
    if arguments.val:
        print(f"train on them with data.root={printable(arguments.out)}")
    elif name not in names.SPLITS:
        print("training needs a folder with train and val: --val 0.1 makes both")
    return 0


def index_(arguments: argparse.Namespace) -> int:
    places.check_place(arguments.source)
    if arguments.out is None and places.is_url(arguments.source):
        raise DataError(f"give --out, the folder for the index of {arguments.source}")
    fields = tar.Fields(
        (arguments.picture.lower(),) if arguments.picture else names.PICTURES,
        arguments.label_field,
        arguments.unlabelled,
        None if arguments.attributes is None else tuple(arguments.attributes),
        arguments.max_megapixels,
        arguments.check,
    )
    folder = arguments.out or Path(arguments.source)
    made = shards.index(arguments.source, folder, arguments.pattern, fields, arguments.processes)
    labels = int(made.records["label"].max()) + 1
    print(f"{printable(folder)}: {len(made)} samples in {len(made.shards)} shards, labels 0 to {labels - 1}")
    if made.attribute_names:
        print(f"attributes: {', '.join(made.attribute_names)}")
    return 0


def verify_(arguments: argparse.Namespace) -> int:
    findings = []
    for finding in shards.verify(arguments.folder, arguments.decode, arguments.processes, arguments.max_megapixels):
        findings.append(finding)
        print(f"{finding.shard}: {finding.lost} of {finding.samples} samples lost: {finding.cause}", flush=True)
    lost = sum(finding.lost for finding in findings)
    where = printable(arguments.folder)
    print(f"{where}: {len(findings)} damaged shards, {lost} samples lost" if findings else "no damage found")
    return 1 if findings else 0


def order_(arguments: argparse.Namespace) -> int:
    samples = stream.Samples(arguments.folder, arguments.cache, arguments.cache_gib)
    samples.index.check()
    for line in stream.schedule(
        samples,
        arguments.seed,
        arguments.columns,
        arguments.batch,
        arguments.accumulation,
        arguments.world,
        arguments.workers,
        arguments.first,
        arguments.steps,
        arguments.order_version,
    ):
        print(*line)
    return 0


COMMANDS = {
    "demo": demo_,
    "digits": digits_,
    "emoji": emoji_,
    "prepare": prepare_,
    "index": index_,
    "verify": verify_,
    "order": order_,
}


if __name__ == "__main__":
    sys.exit(main(given))
