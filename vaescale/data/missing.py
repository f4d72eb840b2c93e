"""Messages for a missing index: what is wrong, and which command or setting helps, with the user's own paths."""

import difflib
import os
import shlex
from contextlib import suppress
from itertools import islice
from pathlib import Path

from .names import CONVERTIBLE_EXTENSIONS, HEIF, SPLITS, STORED, ending, is_hidden

COMMAND = "python launch/shards.py"
# data.root in the demos' configs → the command that makes it
DEMOS = {"data/photos": "demo", "data/digits": "digits", "data/emoji": "emoji PACKAGE"}
EXPORT = "export.json"  # says what launch/export.py made the shards of a folder of
LOOKED = 10_000  # files examined at most: a tree of pictures may be huge and on a slow disk
SHOWN = 3  # folders named in one sentence


def how_to_index(folder: Path) -> str:
    if (folder / EXPORT).exists():
        return "run the `launch/export.py` command that made its shards again"
    place = _quoted(folder) if _has_tars(folder) else f"SHARDS --out {_quoted(folder)}"
    return f"run `{COMMAND} index {place}`"


def missing(folder: Path) -> str:
    """Returns one sentence about the index missing in `folder` (data.root/train, data.root/val or any other)."""
    if _has_tars(folder):
        return f"{folder} contains shards but no index: {how_to_index(folder)}"
    if folder.name in ("train", "val"):
        return f"there are no shards in {folder}: {_in_root(folder.parent, folder)}"
    inside = [folder / split for split in ("train", "val") if _has_index(folder / split)]
    way = f"use {inside[0]}" if inside else f"run `{COMMAND} prepare FOLDER --out {_quoted(folder)}`"
    return f"there are no shards in {folder}: {way}"


def _in_root(root: Path, folder: Path) -> str:
    """Returns what to do about data.root=`root`, whose subfolder `folder` holds no index."""
    if _has_index(root / "train"):
        return (
            f"run `{COMMAND} prepare FOLDER --out {_quoted(folder)}` with the validation images in FOLDER; to split "
            f"one folder of images, `{COMMAND} prepare FOLDER --out DIR --val 0.1` makes DIR/train and DIR/val"
        )
    if _has_index(root):
        if _is_root(root.parent):
            return f"data.root={root} is one level too low, so set {_setting(root.parent)}"
        return (
            f"the shards in {root} itself are not split: run `{COMMAND} prepare FOLDER --out {_quoted(root)} "
            f"--val 0.1`, which makes {root}/train and {root}/val"
        )
    if below := [one for one in _folders(root) if _is_root(one)]:
        return f"data.root={root} is one level too high, so set {_settings(below)}"
    if root.is_file():
        return _prepare(root, ()) if root.suffix == ".tar" else f"{root} is not a folder"
    if found := _first_picture(root):
        return _prepare(root, found)
    if _has_tars(root):
        return (
            f"if the tars in {root} are webdataset shards, run `{COMMAND} index {_quoted(root)} --out DIR/train`, do "
            f"the same for the validation shards with --out DIR/val, and set data.root=DIR"
        )
    if demo := DEMOS.get("/".join(root.parts[-2:])):
        return f"run `{COMMAND} {demo} {_quoted(root)}` to write the demo data"
    near = {one.name: one for one in _folders(root.parent) if _is_root(one)}
    if names := difflib.get_close_matches(root.name, near, SHOWN):
        return f"did you mean {_settings([near[name] for name in names])}?"
    return f"run `{COMMAND} prepare FOLDER --out {_quoted(root)} --val 0.1` with your images in FOLDER"


def _prepare(root: Path, picture: tuple[str, ...]) -> str:
    """Returns the command for the pictures in `root`, a folder or a tar. picture: path parts of one; () for a tar."""
    folders = _folders(root)
    splits = folders if all(one.name.casefold() in SPLITS for one in folders) and len(picture) > 1 else []
    source = next((one for one in splits if one.name.casefold().startswith("train")), splits[0] if splits else root)
    base = root if root.name not in ("", "..") else root.resolve()
    out = base.with_name(f"{base.name.removesuffix('.tar')}-shards")
    command = f"{COMMAND} prepare {_quoted(source)}{_options(picture[1:] if splits else picture)} --out"
    begin = f"{root} contains images, not shards" if picture else f"{root} is a tar"
    if len(splits) > 1:
        return (
            f"{begin}, so prepare each split: run `{command} {_quoted(out / 'train')}`, do the same for the other "
            f"split with --out {_quoted(out / 'val')}, and set {_setting(out)}"
        )
    return f"{begin}, so run `{command} {_quoted(out)} --val 0.1` and set {_setting(out)}"


def _options(picture: tuple[str, ...]) -> str:
    flat = " --unlabelled" if len(picture) == 1 else ""
    return f"{flat} --convert" if picture and ending(picture[-1]) in {**CONVERTIBLE_EXTENSIONS, **HEIF} else flat


def _first_picture(root: Path) -> tuple[str, ...]:
    """Returns the path parts of a picture, relative to `root`, or (). A picture in `root` itself comes first."""
    looked = 0
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(one for one in folders if not is_hidden(one) and not _has_index(Path(folder, one)))
        for name in files:
            if ending(name) in STORED and not is_hidden(name):
                return (*Path(folder).relative_to(root).parts, name)
        looked += len(files) + 1
        if looked > LOOKED:
            break
    return ()


def _settings(roots: list[Path]) -> str:
    more = ", …" if len(roots) > SHOWN else ""
    return " or ".join(map(_setting, sorted(roots)[:SHOWN])) + more


def _setting(root: Path) -> str:
    return shlex.quote(f"data.root={root}")


def _is_root(folder: Path) -> bool:
    return _has_index(folder / "train") or _has_index(folder / "val")


def _has_index(folder: Path) -> bool:
    with suppress(OSError):
        return (folder / "index.json").is_file()
    return False


def _has_tars(folder: Path) -> bool:
    with suppress(OSError):
        return any(folder.glob("*.tar"))
    return False


def _folders(folder: Path) -> list[Path]:
    with suppress(OSError), os.scandir(folder) as entries:
        found = [one.name for one in islice(entries, LOOKED) if not is_hidden(one.name) and one.is_dir()]
        return [folder / name for name in sorted(found)]
    return []


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
