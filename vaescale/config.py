"""YAML and `key=value` overrides → one frozen dataclass. The only importer of OmegaConf.

This file is the mechanics; each class's Config stands beside the class.
"""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """The user's settings are wrong; the text is one sentence: what, where, what to do."""

    exit_code = 2


def read(path: str | Path, overrides: list[str]) -> DictConfig:
    """The YAML file with the overrides merged over it, not yet checked against a schema.

    Only `${other.key}` may interpolate: a resolver such as `${oc.env:…}` would let a file read any variable of this
    process, and is refused.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"'{override}' is not an override: write key=value, as in steps=100")
    try:
        text = Path(path).read_text()
        _refuse_aliases(text, path)
        raw = OmegaConf.create(text)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}: the ready ones are in configs/") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, DictConfig):
        raise ConfigError(f"{path} holds no settings: it must be a mapping of key: value")
    try:
        merged = OmegaConf.merge(raw, OmegaConf.from_dotlist(overrides))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"the overrides {overrides} cannot be read: {_one_line(error)}") from None
    assert isinstance(merged, DictConfig)
    _refuse_resolvers(OmegaConf.to_container(merged), "")
    return merged


def as_written(raw: DictConfig, section: str, key: str) -> Any:
    """raw.section.key before any interpolation; None where there is none."""
    given = OmegaConf.to_container(raw).get(section)  # type: ignore[union-attr]
    return given.get(key) if isinstance(given, dict) else None


def check(schema: T, raw: DictConfig, source: str | Path) -> T:
    """Merge `raw` over the defaults `schema` (a dataclass instance) and return a frozen object of its type.

    An unknown key, a wrong type or a missing value raises ConfigError.
    """
    try:
        typed = OmegaConf.structured(schema)
        _writable(typed)
        _require_sections(typed, raw, "")
        merged = OmegaConf.merge(typed, raw)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise ConfigError(f"{source}: {', '.join(sorted(missing))} must be given, as in {min(missing)}=…")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: {_one_line(error)}") from None


def save(config: Any, path: Path) -> None:
    path.write_text(to_yaml(config))


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _one_line(error: Exception) -> str:
    """What is wrong with which key, in one sentence; for an unknown key the nearest right one."""
    key = str(getattr(error, "full_key", None) or "")
    if isinstance(error, ConfigKeyError):
        parent, _, name = key.rpartition(".")
        known = list(getattr(getattr(error, "object_type", None), "__dataclass_fields__", {}))
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {f'{parent}.{near[0]}' if parent else near[0]}?" if near else f"known are {', '.join(known)}"
        )
        return f"unknown key {key}: {hint}"
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{key}: {text}" if key else text


def _refuse_aliases(text: str, path: str | Path) -> None:
    """A few lines of them would be copied out to more than any memory holds, one of itself without end."""
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise ConfigError(
                f"{path}, line {line}: aliases such as *{event.anchor} are not read: write ${{other.key}} instead"
            )


def _refuse_resolvers(node: Any, where: str) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_resolvers(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for item in node:
            _refuse_resolvers(item, where)
    elif isinstance(node, str) and re.search(r"\$\{[^}]*:", node):
        raise ConfigError(f"{where}: resolvers such as {node} are not read; give the value as {where}=… instead")


def _require_sections(schema: DictConfig, raw: DictConfig, where: str) -> None:
    """OmegaConf's own message for a plain value in a section's place names no key."""
    for key in map(str, schema):
        section = schema._get_node(key)
        if isinstance(section, DictConfig) and key in raw:
            path = f"{where}.{key}" if where else key
            given = raw._get_node(key)
            if not isinstance(given, DictConfig):
                raise ConfigError(f"{path} is a section, not a value: give its settings, as in {path}.name=…")
            _require_sections(section, given, path)


def _writable(node: Any) -> None:
    """Frozen dataclasses come read-only, at every level, and must take the user's values once."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _writable(child)
