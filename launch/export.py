"""Write what a trained run makes of its data, codes and their images, or its weights for another library.

    python launch/export.py codes --run runs/vqvae_digits --out data/digits_codes [key=value …]
    python launch/export.py codes --run RUN --out DIR --crops ten         ten crops of each training image
    python launch/export.py codes --run RUN --out DIR --crops random:4    each training image augmented four times
    python launch/export.py decode DIR --run RUN --out IMAGES             images from exported codes
    torchrun --nproc-per-node 8 -- launch/export.py codes --run …         without the --, torchrun reads --run itself
    python launch/export.py diffusers RUN DIR                             a VQModel or an AutoencoderKL
    python launch/export.py taming RUN FILE.safetensors                   for taming-transformers, latent diffusion
    python launch/export.py llamagen RUN FILE.safetensors                 a tokenizer of LlamaGen
    python launch/export.py onnx RUN DIR                                  encoder.onnx and decoder.onnx
    python launch/export.py torch RUN DIR                                 encoder.pt2 and decoder.pt2 of torch.export
    python launch/export.py hub RUN DIR --license mit --push NAME/MODEL   for the Hugging Face Hub and vaescale.load

`codes` encodes the images of the run's data (or of data.root=…) with the averaged weights, and writes shards of
`key.codes.npy`, which training and plain webdataset read, with the classes and attributes of the images. DIR is a
data.root. Validation images are always encoded as validation sees them.

Any number of ranks writes the same files. An export of codes that was interrupted continues where it stopped.

The other commands write the averaged weights, see vaescale/formats/README.md, and a critic's next to them; for other
libraries those of a vqvae or kl run with model.network.kind=vqgan. They write all files or none, and replace only an
earlier export.

Exit code 2: the run has no codes, its model does not fit the other library, or something cannot be read or written, or
belongs to another export.
"""

import argparse
import sys
from pathlib import Path

from vaescale import arguments, process

SPLITS = ["train", "val"]
PROGRAMS = ("onnx", "torch")
LIBRARIES = ("diffusers", "taming", "llamagen")


def parse() -> argparse.Namespace:
    parsers = {"codes": codes_parser, "decode": decode_parser, **dict.fromkeys(LIBRARIES, library_parser)}
    parsers |= {"hub": hub_parser, **dict.fromkeys(PROGRAMS, program_parser)}
    return arguments.parse_command(__doc__, parsers, arguments.parse_apart)


def codes_parser() -> argparse.ArgumentParser:
    parser = arguments.command("Encode the images of a run's data as codes.")
    parser.prog = "export.py codes"
    add_common(parser, "the run that encodes, or a checkpoint of one", 10_000)
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=SPLITS, help="which images (both)")
    parser.add_argument(
        "--crops",
        default="center",
        metavar="center|ten|random:V",
        help="of training images: as validation sees them (default); the centre and the corners of the square, and "
        "these five flipped; or as training sees them, V times",
    )
    return parser


def decode_parser() -> argparse.ArgumentParser:
    parser = arguments.command("Decode exported codes to images: shards of PNG.")
    parser.prog = "export.py decode"
    parser.add_argument("codes", type=Path, metavar="DIR", help="folder of the exported codes")
    add_common(parser, "the run that encoded them, or a checkpoint of it", 1000)
    parser.add_argument("--split", nargs="+", choices=SPLITS, help="which codes (those that DIR has)")
    return parser


def library_parser() -> argparse.ArgumentParser:
    parser = arguments.command("Write the averaged weights of a run for another library.")
    parser.prog = "export.py diffusers|taming|llamagen"
    add_weights(parser, "diffusers: a folder; taming, llamagen: FILE.safetensors")
    return parser


def hub_parser() -> argparse.ArgumentParser:
    parser = arguments.command("Write a folder with the averaged weights of a run, its settings and a model card.")
    parser.prog = "export.py hub"
    add_weights(parser, "the folder")
    parser.add_argument("--license", default="unknown", metavar="ID", help="in the card, such as apache-2.0 (unknown)")
    parser.add_argument("--push", metavar="NAME/MODEL", help="then upload it to this repository of the Hub")
    return parser


def program_parser() -> argparse.ArgumentParser:
    parser = arguments.command("Write encoder and decoder of a run as programs that need no vaescale.")
    parser.prog = "export.py onnx|torch"
    add_weights(parser, "the folder")
    return parser


def add_weights(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run, or a checkpoint of one")
    parser.add_argument("out", type=Path, metavar="OUT", help=out)
    arguments.add_plugin(parser)


def add_common(parser: argparse.ArgumentParser, run: str, per_shard: int) -> None:
    parser.add_argument("--run", type=Path, required=True, help=run)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="write train/ and val/ there")
    parser.add_argument(
        "--per-shard", type=int, default=per_shard, metavar="N", help=f"samples in a shard ({per_shard})"
    )
    arguments.add_plugin(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the run's")


if __name__ == "__main__":  # before the other imports, which take seconds
    process.forgive_output()  # what is written is worth more than the words about it
    given = parse()


import torch

from vaescale import distributed, numerics, plugins, trained
from vaescale.config import ConfigError
from vaescale.data import DataError, index
from vaescale.data.codes import views_of
from vaescale.data.names import counted
from vaescale.export import jobs
from vaescale.export.write import Job, write
from vaescale.files import printable, readable_size
from vaescale.formats import hub
from vaescale.formats.export import export_diffusers, export_file
from vaescale.formats.program import export_program
from vaescale.interfaces import Model
from vaescale.lifecycle.checkpoint import CheckpointError
from vaescale.settings import Config


def main(given: argparse.Namespace) -> int:
    try:
        plugins.load(given.plugin)
        (export_shards if given.command in ("codes", "decode") else export_weights)(given)
    except (ConfigError, DataError, CheckpointError, distributed.Misplaced) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {printable(error.filename or given.out)}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def export_weights(given: argparse.Namespace) -> None:
    if given.overrides:
        raise ConfigError(f"{given.overrides[0]}: an export of weights takes no settings, it has those of the run")
    if distributed.place().world > 1:
        raise ConfigError("weights are exported by one process: start the command with python")
    for file in written(given):
        print(f"{printable(file)}: {readable_size(file.stat().st_size)}")
    if given.command == "hub" and given.push:
        print(hub.push(given.out, given.push))


def written(given: argparse.Namespace) -> list[Path]:
    """Writes the export. Returns its files."""
    if given.command == "diffusers":
        return export_diffusers(given.run, given.out)
    if given.command == "hub":
        if given.push:
            hub.require_push()
        return hub.export_hub(given.run, given.out, given.license)
    if given.command in PROGRAMS:
        return export_program(given.run, given.out, given.command)
    return export_file(given.run, given.out, given.command)


def export_shards(given: argparse.Namespace) -> None:
    """Collective."""
    check(given)
    config = trained.read_config(given.run, given.overrides)
    device = distributed.init()
    numerics.choose(tf32=False, deterministic=False)
    model, _ = trained.read_model(given.run, config, device)
    for split in given.split:
        export(given, split, job_of(given, split, model, config, device), device)


def check(given: argparse.Namespace) -> None:
    if given.per_shard < 1:
        raise ConfigError(f"--per-shard {given.per_shard} must be at least 1")
    if given.command == "codes":
        try:
            views_of(given.crops)
        except ValueError as error:
            raise ConfigError(f"--{error}") from None
    elif not given.split:
        given.split = [split for split in SPLITS if (given.codes / split / "index.json").exists()]
        if not given.split:
            raise DataError(f"{given.codes} holds no codes: give the --out of `export.py codes`")


def job_of(given: argparse.Namespace, split: str, model: Model, config: Config, device: torch.device) -> Job:
    out = given.out / split
    if given.command == "codes":
        return jobs.of_codes(model, given.run, config, split, given.crops, out, given.per_shard, device)
    return jobs.of_pictures(model, given.run, config, split, given.codes, out, given.per_shard)


def export(given: argparse.Namespace, split: str, job: Job, device: torch.device) -> None:
    """Collective."""
    index.check_files(*job.parts.slices.indexes)
    count = counted(len(job.names), "shard")
    if distributed.rank() == 0 and len(job.names) < distributed.world():
        print(f"{split} has only {count} for {distributed.world()} ranks: a lower --per-shard shares the work")
    made = write(job, device)
    if distributed.rank() == 0:
        lost = f", {made.damaged} damaged ones left out" if made.damaged else ""
        print(f"{printable(job.out)}: {counted(made.samples, 'sample')} in {count}{lost}", flush=True)


if __name__ == "__main__":
    code = main(given)
    distributed.leave(code, together=code == 0)
