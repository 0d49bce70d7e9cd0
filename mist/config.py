"""Settings: mist.toml < selected context < environment < flags, merged into frozen Structs, each value with its origin.

Promises: an unknown key, a value of the wrong type or an unreadable file is an error that names the place; nothing is
ignored. Environment variables are `MIST_` and the key in capitals, `__` between levels (`MIST_A__B` is `b` in `[a]`); a single `_`
does where it names one key only. Durations and sizes are text with units (see quantities.py). Tools have tables: a schema
that knows them extends MistConfig, and whoever composes the tools (the command line) gives it to `load_config`. Reading creates nothing. Secrets do not belong here: they come from the environment or a token file at the point of use.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_origin, overload

import msgspec
from msgspec import Struct
from msgspec.structs import FieldInfo
from msgspec.structs import fields as read_fields

from mist.errors import InvalidArgument, NotFound
from mist.quantities import Duration, Size, read_quantity

T = TypeVar("T", bound=Struct)
C = TypeVar("C", bound="MistConfig")
Format = Literal["table", "json", "jsonl", "csv", "raw"]

DEFAULT_URL = "log:.mist"
FILE = "mist.toml"
PREFIX = "MIST_"
NOT_SETTINGS = frozenset({"MIST_CONFIG", "MIST_CONTEXT", "MIST_TEST_DATA"})
"""Variables with our prefix that are not values of MistConfig."""


class MistConfig(Struct, frozen=True, kw_only=True):
    """What the command line can be told once instead of every time."""

    url: str = DEFAULT_URL
    """The broker, when -u does not say."""
    format: Format = "table"
    timeout_s: float = 0.0
    """Give up a command after this long; 0 = never."""
    no_input: bool = False
    quiet: bool = False
    verbose: bool = False
    pager: bool = True
    """Page a table that is taller than the terminal."""
    spool: str = ""
    """Where the spools of spool+URL lie when the URL does not say; empty = the user's state directory."""


# A table's class may say ALIASES (another name of a key) and GONE (what to write instead of a key that is no longer one).


class Layer(Struct, frozen=True):
    """One source of values: nested plain values and the name it is reported under."""

    origin: str
    values: dict[str, Any]


class Loaded(Struct, Generic[T], frozen=True):
    """`origins` has one entry per leaf, by dotted key."""

    value: T
    origins: dict[str, str]


class Context(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A named broker URL."""

    url: str
    description: str = ""


class Contexts(Struct, frozen=True, kw_only=True):
    """The contexts file."""

    selected: str = ""
    contexts: dict[str, Context] = {}


@cache
def fields(schema: type[Struct]) -> tuple[FieldInfo, ...]:
    """Its fields; every command asks for those of every table several times, and msgspec evaluates the annotations anew."""
    return read_fields(schema)


def merge(schema: type[T], layers: Sequence[Layer]) -> Loaded[T]:
    """The layers on top of the schema's defaults, later ones winning. Raises InvalidArgument naming layer and key."""
    merged: dict[str, Any] = {}
    origins = dict.fromkeys(_leaves(schema), "default")
    for layer in layers:
        _overlay(schema, merged, layer.values, layer.origin, origins, "")
    return Loaded(msgspec.convert(merged, schema, strict=False, dec_hook=read_quantity), origins)


def _overlay(
    schema: type[Struct], into: dict[str, Any], values: Mapping[str, Any], origin: str, origins: dict[str, str], at: str
) -> None:
    known = {f.encode_name: f for f in fields(schema)}
    aliases: Mapping[str, str] = getattr(schema, "ALIASES", {})
    for written, value in values.items():
        key = aliases.get(written, written)
        dotted = f"{at}{key}"
        if key != written and key in values:
            raise InvalidArgument(f"{origin}: {at}{written} and {dotted} are the same setting", hint="keep one of them")
        if key not in known:
            near = get_close_matches(key, known, n=1)
            gone = getattr(schema, "GONE", {}).get(key)
            raise InvalidArgument(
                f"{origin}: unknown key {dotted[:80]!r}",
                hint=gone or (f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"),
            )
        kind = known[key].type
        if isinstance(kind, type) and issubclass(kind, Struct):
            if not isinstance(value, Mapping):
                raise InvalidArgument(f"{origin}: {dotted} is a table, not {str(value)[:40]!r}")
            _overlay(kind, into.setdefault(key, {}), value, origin, origins, f"{dotted}.")
            continue
        if isinstance(value, str) and get_origin(kind) is tuple:
            value = [part.strip() for part in value.split(",") if part.strip()]  # a variable: a list with commas
        try:
            into[key] = msgspec.convert(value, kind, strict=not isinstance(value, str), dec_hook=read_quantity)
        except msgspec.ValidationError as exc:
            raise InvalidArgument(f"{origin}: {dotted} = {str(value)[:40]!r}: {str(exc)[:200]}") from exc
        origins[dotted] = origin


def _leaves(schema: type[Struct], at: str = "") -> list[str]:
    out: list[str] = []
    for f in fields(schema):
        nested = isinstance(f.type, type) and issubclass(f.type, Struct)
        out.extend(_leaves(f.type, f"{at}{f.encode_name}.") if nested else [f"{at}{f.encode_name}"])
    return out


def file_layer(path: Path) -> Layer:
    """A TOML file as a layer. Raises InvalidArgument with the line when it is not TOML, NotFound when absent."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise NotFound(f"no configuration file {path}", hint="`mist config init` writes one") from exc
    except OSError as exc:
        raise InvalidArgument(f"{path}: cannot be read: {exc.strerror}") from exc
    return toml_layer(data, str(path))


def toml_layer(data: bytes, origin: str) -> Layer:
    """The bytes of a TOML document as a layer. Raises InvalidArgument with the line."""
    try:
        return Layer(origin, tomllib.loads(data.decode("utf-8-sig")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InvalidArgument(f"{origin}: not TOML: {str(exc)[:200]}") from exc
    except (RecursionError, ValueError) as exc:  # nested too deeply, or a number too long for Python to read
        raise InvalidArgument(f"{origin}: cannot be read as TOML: {exc}") from exc


def env_layers(schema: type[Struct], env: Mapping[str, str], prefix: str = PREFIX) -> list[Layer]:
    """One layer per variable that names a key of the schema, so that every origin is the variable's name. Raises
    InvalidArgument for one key named by two variables, and for a variable that could mean several keys."""
    out: list[Layer] = []
    said: dict[str, str] = {}
    for name, keys in _variables(schema, prefix).items():
        if env.get(name, "") == "":
            continue
        if len(keys) > 1:
            raise InvalidArgument(
                f"{name} could mean {' or '.join(keys)}",
                hint=f"write {prefix}{keys[0].replace('.', '__').upper()}",
            )
        if keys[0] in said:
            raise InvalidArgument(f"{said[keys[0]]} and {name} both set {keys[0]}", hint="keep one of them")
        said[keys[0]] = name
        nested: Any = env[name]
        for key in reversed(keys[0].split(".")):
            nested = {key: nested}
        out.append(Layer(name, nested))
    return out


def _variables(schema: type[Struct], prefix: str) -> dict[str, list[str]]:
    """The names a variable may have, and the keys each could mean. The name with `__` always means its own."""
    leaves = _leaves(schema)
    exact = {prefix + dotted.replace(".", "__").upper(): [dotted] for dotted in leaves}
    loose: dict[str, list[str]] = {}
    for dotted in leaves:
        name = prefix + dotted.replace(".", "_").upper()
        if name not in exact:
            loose.setdefault(name, []).append(dotted)
    return exact | loose


def unknown_variables(schema: type[Struct], env: Mapping[str, str], prefix: str = PREFIX) -> list[str]:
    """Variables with the prefix that name nothing we know: probably typing errors."""
    known = _variables(schema, prefix).keys() | NOT_SETTINGS
    return sorted(k for k in env if k.startswith(prefix) and k not in known)


def setting(config: Struct, dotted: str) -> Any:
    """The value under a dotted key."""
    value: Any = config
    for key in dotted.split("."):
        value = getattr(value, key)
    return value


def shown(value: Any) -> Any:
    """A setting as it may be printed as JSON: quantities as the text they are written as."""
    if isinstance(value, Duration | Size):
        return str(value)
    if isinstance(value, Struct):
        return {f.encode_name: shown(getattr(value, f.name)) for f in fields(type(value))}
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    return value


def config_dir(env: Mapping[str, str] = os.environ) -> Path:
    """The user's configuration directory (XDG)."""
    base = env.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base else Path(env.get("HOME", "~")).expanduser() / ".config") / "mist"


def config_file(env: Mapping[str, str] = os.environ, cwd: Path | None = None) -> Path | None:
    """The file in force: MIST_CONFIG, ./mist.toml, the user's; None when there is none."""
    named = env.get("MIST_CONFIG", "")
    if named:
        return Path(named)
    for path in ((cwd or Path()) / FILE, config_dir(env) / FILE):
        if path.is_file():
            return path
    return None


def contexts_file(env: Mapping[str, str] = os.environ) -> Path:
    return config_dir(env) / "contexts.json"


def load_contexts(env: Mapping[str, str] = os.environ) -> Contexts:
    """The saved contexts; an absent file is an empty set."""
    path = contexts_file(env)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Contexts)
    except FileNotFoundError:
        return Contexts()
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidArgument(f"{path}: not a contexts file: {exc}", hint="mend it or delete it") from exc
    except OSError as exc:
        raise InvalidArgument(f"{path}: cannot be read: {exc.strerror}") from exc


def save_contexts(contexts: Contexts, env: Mapping[str, str] = os.environ) -> Path:
    """Write the contexts file atomically, readable by its owner only."""
    path = contexts_file(env)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(msgspec.to_builtins(contexts), indent=2, sort_keys=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def context_layer(env: Mapping[str, str] = os.environ) -> Layer | None:
    """The selected context (or MIST_CONTEXT) as a layer."""
    contexts = load_contexts(env)
    name = env.get("MIST_CONTEXT", "") or contexts.selected
    if not name:
        return None
    context = contexts.contexts.get(name)
    if context is None:
        raise NotFound(f"no context {name}", hint="`mist context ls` shows them")
    return Layer(f"context {name}", {"url": context.url})


@overload
def load_config(
    flags: Mapping[str, Any] | None = None, *, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> Loaded[MistConfig]: ...
@overload
def load_config(
    flags: Mapping[str, Any] | None = None, *, schema: type[C], env: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
) -> Loaded[C]: ...  # fmt: skip
def load_config(
    flags: Mapping[str, Any] | None = None,
    *,
    schema: type[Any] | None = None,
    env: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
) -> Loaded[Any]:
    """The settings in force, by a schema that is MistConfig or extends it. `flags` may be nested. The contexts file is not
    looked at when the URL is given by flag or variable."""
    schema = schema or MistConfig
    layers: list[Layer] = []
    path = config_file(env, cwd)
    if path is not None:
        layers.append(file_layer(path))
    if not (flags or {}).get("url") and not env.get("MIST_URL"):
        context = context_layer(env)
        if context is not None:
            layers.append(context)
    layers.extend(env_layers(schema, env))
    layers.extend(Layer("flag", {k: v}) for k, v in (flags or {}).items())
    loaded = merge(schema, layers)
    if loaded.value.timeout_s < 0:
        raise InvalidArgument(f"{loaded.origins['timeout_s']}: timeout_s is negative")
    return loaded


TEMPLATE = """\
# Settings of the mist command line. Later sources win: this file, the selected context, MIST_* variables, flags.

# url = "log:.mist"       # which broker; MIST_URL, -u
# format = "table"        # table, json, jsonl, csv, raw; MIST_FORMAT, -o
# timeout_s = 0.0         # give up after this long, 0 = never; MIST_TIMEOUT_S, --timeout
# no_input = false        # never ask; MIST_NO_INPUT, --no-input
# quiet = false           # values and errors only; MIST_QUIET, -q
# verbose = false         # more on stderr; MIST_VERBOSE, -v
# pager = true            # page a table taller than the terminal; MIST_PAGER
# spool = ""              # folder for the spools of spool+URL; empty = the user's state directory; MIST_SPOOL
"""
