"""Make and index shards.

python launch/shards.py demo data/photos            the demo photographs, as training and validation shards
python launch/shards.py index DIR                   an index for webdataset shards that others made
python launch/shards.py index DIR --shards SRC --pattern 'imagenet1k-train-*.tar'
                                                    the index in DIR, the shards where they are
"""

import argparse
import sys
from pathlib import Path

from vaescale.data import DataError, demo, shards


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("demo", help="write the demo photographs")
    command.add_argument("root", type=Path)
    command = commands.add_parser("index", help="index shards that others made")
    command.add_argument("folder", type=Path, help="where the index goes")
    command.add_argument("--shards", type=Path, help="where the tars are, if not in FOLDER")
    command.add_argument("--pattern", default="*.tar")
    arguments = parser.parse_args()
    try:
        if arguments.command == "demo":
            for split, count in demo.write_demo(arguments.root).items():
                print(f"{arguments.root / split}: {count} tiles of {demo.TILE} px")
        else:
            made = shards.index(arguments.folder, arguments.shards, arguments.pattern)
            print(f"{arguments.folder}: {len(made)} samples in {len(made.shards)} shards, {len(made.classes)} classes")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
