"""Arguments and options that several commands share, each defined once.

An `OptionGroup` is a frozen Struct; as the annotation of a command's parameter its fields become options.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from msgspec import Struct

from mist.broker.base import Durability


class OptionGroup(Struct, frozen=True, kw_only=True):
    """A set of options; every field has a default."""


class GlobalOptions(OptionGroup, frozen=True, kw_only=True):
    """The options every command takes; hidden in a command's help, shown in `mist --help`."""

    url: Annotated[str | None, typer.Option("-u", "--url", hidden=True)] = None
    format: Annotated[str | None, typer.Option("-o", "--format", hidden=True)] = None
    json: Annotated[bool, typer.Option("-j", "--json", hidden=True)] = False
    yes: Annotated[bool, typer.Option("-y", "--yes", hidden=True)] = False
    no_input: Annotated[bool, typer.Option("--no-input", hidden=True)] = False
    quiet: Annotated[bool, typer.Option("-q", "--quiet", hidden=True)] = False
    verbose: Annotated[bool, typer.Option("-v", "--verbose", hidden=True)] = False
    timeout: Annotated[float | None, typer.Option("--timeout", hidden=True)] = None


StreamArg = Annotated[str, typer.Argument(metavar="STREAM", help="A stream's name, URL?stream=NAME, or file:PATH.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; exit 10 if there is something.")]
Count = Annotated[int | None, typer.Option("-n", "--count", min=1, metavar="N", help="How many records.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="At most N.")]
Rate = Annotated[float | None, typer.Option("--rate", min=0.001, metavar="N", help="At most N records a second.")]


class FilterOptions(OptionGroup, frozen=True, kw_only=True):
    """Which records. All given conditions hold at once; `--invert` turns the answer round."""

    subject: Annotated[
        list[str],
        typer.Option("--subject", metavar="PATTERN", help="Subject filter, * one token, > the rest. Repeatable."),
    ] = []
    type: Annotated[list[str], typer.Option("--type", metavar="TYPE", help="Envelope type. Repeatable.")] = []
    source: Annotated[list[str], typer.Option("--source", metavar="NAME", help="Envelope source. Repeatable.")] = []
    id: Annotated[list[str], typer.Option("--id", metavar="ID", help="Envelope id. Repeatable.")] = []
    trace_id: Annotated[
        str | None, typer.Option("--trace-id", metavar="HEX", help="Trace id in traceparent or payload.")
    ] = None
    grep: Annotated[str | None, typer.Option("--grep", metavar="RE", help="Regular expression over the data.")] = None
    where: Annotated[
        list[str],
        typer.Option("--where", metavar="EXPR", help="Condition, e.g. 'payload.attrs.latency_ms>500 and source=api'."),
    ] = []
    invert: Annotated[bool, typer.Option("--invert", help="The records that do not match.")] = False


class RangeOptions(OptionGroup, frozen=True, kw_only=True):
    """From where to where. Positions: start, end, N, +N, -N, @TIME, @-1h, cursor:NAME."""

    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="POS", help="First record: start, end, N, +N, -N, @TIME, cursor:NAME."),
    ] = None
    to: Annotated[str | None, typer.Option("--to", metavar="POS", help="Last record, inclusive.")] = None
    since: Annotated[
        str | None, typer.Option("--since", metavar="AGE", help="Records of the last 1h, 30m, 2d; or since a time.")
    ] = None
    until: Annotated[str | None, typer.Option("--until", metavar="AGE", help="Up to this long ago, or this time.")] = (
        None
    )


Select = Annotated[
    str | None,
    typer.Option("--select", metavar="A,B", help="Show only these fields, e.g. sequence,payload.attrs.model."),
]


class Level(StrEnum):
    memory = "memory"
    process = "process"
    power = "power"
    replicated = "replicated"


def durability_of(level: Level | None) -> Durability | None:
    """The contract's word for the option's value."""
    match level:
        case None:
            return None
        case Level.memory:
            return "memory"
        case Level.process:
            return "process"
        case Level.power:
            return "power"
        case Level.replicated:
            return "replicated"
