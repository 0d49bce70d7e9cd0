"""The tree as a whole: every command has help, examples that parse, and its place in the reference."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from typing import Any

import pytest

from cli.conftest import ROOT, Cli
from mist.cli.main import ALIASES, COMMANDS, EXIT_CODES, split_globals
from mist.cli.options import GlobalOptions
from mist.cli.wrap import load
from mist.errors import CODES

sys.path.insert(0, str(ROOT / "scripts"))
gen = importlib.import_module("gen_cli_docs")
sys.path.pop(0)

TREE = dict(gen.commands())
LEAVES = {name: c for name, c in TREE.items() if not hasattr(c, "commands")}
SPEC = [
    "version",
    "completion",
    "doctor",
    "demo",
    "up",
    "dev.nats",
    "dev.redis",
    "dev.ls",
    "dev.stop",
    "context.ls",
    "context.save",
    "context.select",
    "context.show",
    "context.rm",
    "config.show",
    "config.validate",
    "config.init",
    "stream.ls",
    "stream.info",
    "stream.create",
    "stream.rm",
    "stream.purge",
    "stream.erase",
    "stream.subjects",
    "stream.gaps",
    "stream.verify",
    "stream.sweep",
    "stream.compact",
    "tail",
    "get",
    "count",
    "pub",
    "sub",
    "ping",
    "validate",
    "relay",
    "consumer.ls",
    "consumer.info",
    "consumer.create",
    "consumer.rm",
    "consumer.lag",
    "consumer.next",
    "consumer.pending",
    "consumer.seek",
    "consumer.reset",
    "cursor.ls",
    "cursor.show",
    "cursor.set",
    "cursor.rm",
    "cursor.export",
    "cursor.import",
    "checkpoint.ls",
    "checkpoint.show",
    "checkpoint.rm",
    "dlq.ls",
    "dlq.show",
    "dlq.retry",
    "dlq.drop",
    "dlq.export",
    "copy",
    "mirror",
    "export",
    "import",
    "replay",
]


def test_the_tree_is_complete() -> None:
    """Every verb that was promised is there."""
    there = {name.removeprefix("mist ").replace(" ", ".") for name in LEAVES}
    assert sorted(set(SPEC) - there) == []
    assert set(ALIASES.values()) <= set(COMMANDS)


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_every_command_has_an_example_that_parses(name: str) -> None:
    """Help says what it does, gives an example, explains every option; and each example of ours is a valid command."""
    command = LEAVES[name]
    help = command.help or ""
    first = help.split("\n")[0]
    assert first.endswith("."), f"{name}: the first line of its help is a sentence"
    assert "Example" in help, f"{name} has no example"
    for p in command.params:
        if not getattr(p, "hidden", False):
            assert p.help, f"{name}: {p.name} has no help"
    lines = gen.split_help(help)[1].splitlines()
    assert any(f"{name} " in f"{line} " or "mist" in line for line in lines)
    for line in lines:
        for words in _commands_in(line):
            _parse(words)


def _commands_in(line: str) -> list[list[str]]:
    """The `mist …` commands in a line of shell."""
    found = []
    for part in re.split(r"\s[|]\s|\s[<>]\s|&&|;", line.strip()):
        part = re.sub(r"^(\w+=\S+\s+)+", "", part.strip())
        part = part.removeprefix('eval "$(').removesuffix(')"')
        if part.startswith("mist "):
            found.append(shlex.split(part)[1:])
    return found


def _parse(words: list[str]) -> None:
    """Parse a command's words without running it."""
    _, words = split_globals(words)
    name = ALIASES.get(words[0], words[0])
    target: Any = load(name)
    rest = words[1:]
    if hasattr(target, "commands"):
        assert rest, words
        assert rest[0] in target.commands, words
        target, rest = target.commands[rest[0]], rest[1:]
    target.make_context("mist", list(rest))


def test_every_command_accepts_the_global_options() -> None:
    """All of them, on every leaf, hidden from its own help."""
    names = {o for p in LEAVES["mist tail"].params if p.name.startswith("global_") for o in p.opts}
    assert len(names) == 14
    for name, command in LEAVES.items():
        assert names <= {o for p in command.params for o in p.opts}, name
    assert len(GlobalOptions.__struct_fields__) == 8


def test_the_reference_is_what_the_code_says() -> None:
    """docs/reference/cli.md and exit-codes.md are generated; run scripts/gen_cli_docs.py after a change."""
    assert gen.main(["--check"]) == 0


def test_every_command_is_in_the_reference() -> None:
    """Each name has its heading, and its examples stand there."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for name in TREE:
        assert f"# `{name}`\n" in page, name


def test_exit_codes_have_a_meaning() -> None:
    """Every exit code of the error table is in the list of the command line."""
    assert {info.exit for info in CODES.values()} <= set(EXIT_CODES)


def test_help_of_every_noun_lists_its_verbs(cli: Cli) -> None:
    """`mist NOUN --help` is success on stdout."""
    for name in (n for n, c in TREE.items() if hasattr(c, "commands")):
        result = cli.ok(*name.split()[1:], "--help")
        for verb in TREE[name].commands:
            assert f"\n  {verb} " in result.out
