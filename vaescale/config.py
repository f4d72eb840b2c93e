"""From YAML and `key=value` overrides to one frozen dataclass. This is the only module that imports OmegaConf.

Each class defines its Config next to itself. The type of a setting decides how its text is read. Names are kept as they
are typed (007, on, 1e5, null; but null is "" where the default is ""). Numbers are decimal: 010 is ten, and 1e5 and
128.0 are whole numbers, too. Other numbers of YAML (0x10, 1_000, 1:30) are refused.
"""

import os
import re
from dataclasses import is_dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .files import MOST_DEPTH, atomically, is_plain, printable
from .hints import known_keys, nearest_file, unknown_key
from .ranges import require

T = TypeVar("T")
FILE = "config.yaml"  # in the run directory

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,6})?")
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NOTHING = ("", "~", "null", "Null", "NULL")
TEXT = "tag:yaml.org,2002:str"
TAGS = (TEXT, "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


class ConfigError(ValueError):
    """The user's settings are wrong. The text is one sentence: what, where, and what to do.

    The text may quote untrusted files, so the constructor makes it printable.
    """

    exit_code = 2

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class UnknownKey(ConfigError):
    """A setting does not exist. `key` is its dotted name."""

    def __init__(self, text: str, key: str) -> None:
        super().__init__(text)
        self.key = key


class _Unknown(Exception):
    """args: the unknown key, its value, the names in its section."""


class Plain(str):
    """A text without quotes: a name, a number, true or false, nothing or, in an override, a list or a section."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (every scalar remains a text)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file. Returns sections, lists and texts, not yet typed. Raises ConfigError."""
    try:
        raw = _parsed(Path(path).read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, IsADirectoryError):
        near = nearest_file(Path(path))
        hint = f"did you mean {printable(near)}?" if near else "the ready ones are in configs/"
        raise ConfigError(f"there is no config file {printable(path)}: {hint}") from None
    except OSError as error:
        raise ConfigError(f"{printable(path)} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{printable(path)} is not valid YAML: {_flat(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{printable(path)} holds no settings: it must be a mapping of key: value")
    return raw


def override(raw: dict[str, Any], overrides: list[str]) -> None:
    """Merges `key=value` overrides over the settings `raw`, in place.

    `${other.key}` is the only interpolation. A resolver such as `${oc.env:…}` is refused, because it would let a file
    read any environment variable. Raises ConfigError.
    """
    for given in overrides:
        key, equals, value = given.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(f"'{printable(given)}' is not an override: write key=value, as in steps=100")
        _put(raw, names, _override(key, value))
    _refuse_resolvers(raw, "")


def as_written(value: Any, key: str) -> str | None:
    """Returns the text of the setting `key` (dotted) in `value` before interpolation, or None if it is not given."""
    for name in key.split("."):
        section = _opened(value, key)
        value = section.get(name) if isinstance(section, dict) else None
    return str(value) if isinstance(value, str) else None


def typed(schema: T, raw: dict[str, Any], source: str | Path) -> T:
    """Merges `raw` over the defaults `schema` (a dataclass instance). Returns a frozen object of the schema's type.

    source: the file, for messages. Raises UnknownKey for an unknown key, and ConfigError for a value that is missing,
    of the wrong type or out of range.
    """
    try:
        typed = OmegaConf.structured(schema)
        _writable(typed)
        merged = OmegaConf.merge(typed, _section(raw, schema, ""))
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise ConfigError(f"{source}: {', '.join(sorted(missing))} must be given, as in {min(missing)}=…")
        config: T = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except _Unknown as unknown:
        key, value, siblings = unknown.args
        where = key.rpartition(".")[0]
        known = [*known_keys(schema), *(f"{where}.{name}" for name in siblings if where)]  # it may be inside a list
        raise UnknownKey(unknown_key(key, value, known, siblings), key) from None
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        key = str(getattr(error, "full_key", None) or "")
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(printable(f"{source}: {f'{key}: ' if key else ''}{text}")) from None
    try:
        require(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return config


def expanded(key: str, text: str) -> str:
    """Expands `~`, `~user` and `$NAME` at the beginning of the path `text`, and `$USER` anywhere.

    `$NAME` must be an absolute path of an existing folder. No other variable is read, because the file may be
    untrusted and paths appear in logs. key: the setting, for messages. Raises ConfigError for anything else.
    """
    front = re.match(r"\$([A-Za-z_]\w*)(?=/|$)", text)
    if front and front[1] != "USER":
        folder = os.environ.get(front[1], "")
        if not (Path(folder).is_absolute() and Path(folder).is_dir()):
            raise ConfigError(
                f"{key}={printable(text)}: ${front[1]} is unset or not an existing absolute folder: set it, or write "
                f"the path out"
            )
        text = folder + text[front.end() :]
    if text.startswith("~"):
        try:
            text = str(Path(text).expanduser())
        except RuntimeError:
            whose = printable(text.split("/")[0])
            raise ConfigError(f"{key}={printable(text)}: there is no home directory {whose}: write it out") from None
    if "USER" in os.environ:
        text = re.sub(r"\$USER(?!\w)", lambda _: os.environ["USER"], text)
    if other := re.search(r"\$[A-Za-z_]\w*", text):
        if other[0] == "$USER":
            raise ConfigError(f"{key}={printable(text)}: the variable USER is not set: write the path out")
        raise ConfigError(
            f"{key}={printable(text)}: {other[0]} is not expanded here. Only $USER, and at the start of the path any "
            f"variable that holds a folder, are: write the path out"
        )
    return text


def save(config: Any, path: Path) -> None:
    """Writes the config atomically, unless the file already has this content. Raises OSError."""
    data = to_yaml(config).encode()
    if not path.is_file() or path.read_bytes() != data:
        with atomically(path) as partial:
            partial.write_bytes(data)


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _parsed(text: str, where: str) -> Any:
    """Parses YAML into dicts, lists, str (quoted texts) and Plain (other texts)."""
    depth = 0
    for event in yaml.parse(text):  # check events first: composing deep nodes takes long
        if isinstance(event, yaml.AliasEvent):  # a few nested aliases can expand beyond any memory
            raise ConfigError(
                f"{_line(where, event)}: aliases such as *{event.anchor} are not supported: write ${{other.key}}"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise ConfigError(f"{_line(where, event)}: there are more than {MOST_DEPTH} levels of sections and lists")
    return _tree(yaml.compose(text, _Loader), where)


def _tree(node: Any, where: str) -> Any:
    if node is None:
        return Plain()
    if node.tag not in TAGS:
        tag = printable(node.tag.replace("tag:yaml.org,2002:", "!!"), 60)
        raise ConfigError(f"{_line(where, node)}: tags such as {tag} are not supported: remove it")
    if isinstance(node, yaml.ScalarNode):
        return str(node.value) if node.style else Plain(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_tree(one, where) for one in node.value]
    result: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{_line(where, key)}: the name of a setting must be a word")
        if key.value in result:
            raise ConfigError(f"{_line(where, key)}: {printable(key.value, 60)} is given twice: leave one out")
        result[key.value] = _tree(value, where)
    return result


def _line(where: str, place: Any) -> str:
    return f"{printable(where)}, line {place.start_mark.line + 1}"


def _flat(error: Exception) -> str:
    return printable(" ".join(str(error).split()))


def _override(key: str, value: str) -> str:
    """Returns the text of an override: a str without quotes if it was quoted, else a Plain."""
    if value[:1] in ("'", '"'):
        try:
            quoted = _parsed(value, key)
        except yaml.YAMLError:
            return Plain(value)
        if isinstance(quoted, str) and not isinstance(quoted, Plain):
            return quoted
    return Plain(value)


def _opened(value: Any, key: str) -> Any:
    """Parses a Plain text that is a section or a list; {} if it is empty or null. Other values are returned as is."""
    if not isinstance(value, Plain):
        return value
    if value in NOTHING:
        return {}
    if value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return _parsed(value, key)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{key}={printable(value, 60)} cannot be read: {_flat(error)}") from None


def _put(raw: dict[str, Any], names: list[str], value: Any) -> None:
    node = raw
    for depth, name in enumerate(names[:-1], start=1):
        key = ".".join(names[:depth])
        inner = _opened(node.get(name, {}), key)
        if not isinstance(inner, dict):
            raise ConfigError(f"{printable(key)} is a value, not a section: {printable(names[depth])} cannot be set")
        node[name] = inner
        node = inner
    old = node.get(names[-1])
    new = _opened(value, ".".join(names)) if isinstance(old, dict) else value
    if isinstance(old, dict) and isinstance(new, dict):
        for name, one in new.items():
            _put(old, [name], one)
    else:
        node[names[-1]] = new


def _refuse_resolvers(node: Any, where: str) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_resolvers(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for item in node:
            _refuse_resolvers(item, where)
    elif isinstance(node, str) and re.search(r"\$\{[^}]*:", node):
        raise ConfigError(
            f"{printable(where)}: resolvers such as {printable(node)} are not supported; give the value as "
            f"{printable(where)}=… instead"
        )


def _section(given: Any, schema: Any, where: str) -> dict[str, Any]:
    """Converts the values of a section. schema: a dataclass, or an instance of one, whose values are the defaults."""
    given = _opened(given, where)
    if not isinstance(given, dict):
        raise ConfigError(f"{where} is a section, not a value: give its settings, as in {where}.name=…")
    hints = get_type_hints(schema if isinstance(schema, type) else type(schema))
    typed = {}
    for name, value in given.items():
        key = f"{where}.{name}" if where else name
        if name not in hints:
            raise _Unknown(key, value, list(hints))
        typed[name] = _typed(value, hints[name], getattr(schema, name, None), key)
    return typed


def _typed(given: Any, hint: Any, default: Any, key: str) -> Any:
    """Converts the text `given` to the type `hint`. Interpolations are left to OmegaConf."""
    if isinstance(given, str) and ("${" in given or given == "???"):
        return str(given)
    origin = get_origin(hint)
    if is_dataclass(default) or is_dataclass(hint):
        return _section(given, default if is_dataclass(default) else hint, key)
    if origin is dict:
        return _mapping(given, key)
    if origin in (list, tuple):
        return _list(given, origin, get_args(hint), key)
    if not isinstance(given, str):
        raise ConfigError(f"{key} must be one value, not {'a section' if isinstance(given, dict) else 'a list'}")
    nothing = not given or (isinstance(given, Plain) and given in NOTHING)
    if nothing and default == "":
        return ""
    if nothing and (hint is not str or not given):
        raise ConfigError(f"{key}={given} has no value: give it one, or leave it out")
    if origin is Literal:
        return _choice(given, get_args(hint), key)
    if hint is str and not is_plain(given):
        raise ConfigError(f"{key}={printable(given)} holds control characters or bytes that are not UTF-8")
    readers: dict[Any, Any] = {int: _whole, float: _float, bool: _bool, str: lambda text, _: str(text)}
    return readers[hint](given, key)


def _list(given: Any, origin: Any, arguments: tuple[Any, ...], key: str) -> list[Any]:
    opened = _opened(given, key)
    if not isinstance(opened, list) or (origin is tuple and len(opened) != len(arguments)):
        count = f" of {len(arguments)} values" if origin is tuple else ""
        example = "[" + ", ".join("…" for _ in arguments) + "]"
        raise ConfigError(f"{key}={printable(given, 60)} must be a list{count}, as in {key}={example}")
    return [_typed(one, arguments[0], None, key) for one in opened]


def _decimal(text: str, key: str, kind: str) -> Decimal:
    if not NUMBER.fullmatch(text.strip()):
        raise ConfigError(f"{key}={printable(text, 60)} must be a {kind}, in decimal digits")
    return Decimal(text.strip())


def _whole(text: str, key: str) -> int:
    value = _decimal(text, key, "whole number")
    if value.adjusted() > 20:
        raise ConfigError(f"{key}={printable(text, 60)} is too large")
    if value != value.to_integral_value():
        raise ConfigError(f"{key}={printable(text, 60)} must be a whole number")
    return int(value)


def _float(text: str, key: str) -> float:
    value = float(_decimal(text, key, "number"))
    if value in (float("inf"), -float("inf")):
        raise ConfigError(f"{key}={printable(text, 60)} is too large")
    return value


def _bool(text: str, key: str) -> bool:
    if text.strip().lower() not in WORDS:
        raise ConfigError(f"{key}={printable(text, 60)} must be true or false")
    return WORDS[text.strip().lower()]


def _choice(text: str, choices: tuple[Any, ...], key: str) -> Any:
    for one in choices:
        same = text == one if isinstance(one, str) else NUMBER.fullmatch(text.strip()) and Decimal(text.strip()) == one
        if same:
            return one
    raise ConfigError(f"{key}={printable(text, 60)} must be one of {', '.join(map(str, choices))}")


def _mapping(given: Any, key: str) -> dict[str, Any]:
    opened = _opened(given, key)
    if not isinstance(opened, dict):
        raise ConfigError(f"{key} is a section, not a value: give its settings, as in {key}.name=…")
    return {name: _natural(one, f"{key}.{name}") for name, one in opened.items()}


def _natural(given: Any, key: str) -> Any:
    """Converts a value that is passed to a library: texts without quotes become the types of JSON."""
    if isinstance(given, Plain) and given not in NOTHING:
        given = _opened(given, key)
    if isinstance(given, dict):
        return _mapping(given, key)
    if isinstance(given, list):
        return [_natural(one, key) for one in given]
    if not isinstance(given, Plain):
        return given
    if given in NOTHING:
        return None
    if given.lower() in ("true", "false"):
        return given.lower() == "true"
    if NUMBER.fullmatch(given):
        return _whole(given, key) if given.lstrip("+-").isdigit() else _float(given, key)
    return str(given)


def _writable(node: Any) -> None:
    """Makes a config writable at every level. OmegaConf makes those of frozen dataclasses read-only."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _writable(child)
