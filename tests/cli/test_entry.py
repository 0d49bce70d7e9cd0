"""The entry point: help without imports, global options, exit codes, the error boundary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import fields

from cli.conftest import ROOT, Cli, fill
from mist.cli import main as entry
from mist.cli.options import GlobalOptions
from mist.errors import InvalidArgument


def test_help_and_version_import_no_command_and_no_parser() -> None:
    """`mist --help` answers from the table: typer, rich, asyncio and the command modules stay out."""
    code = (
        "import sys; from mist.cli.main import main; main(['--help']); main(['--version']);"
        "bad = {'typer', 'rich', 'pydantic', 'mist.cli.tail', 'mist.cli.wrap', 'mist.log', 'sqlite3'} & set(sys.modules);"
        "sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in entry.COMMANDS:
        assert f"\n  {name} " in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("mist ")


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_is_success_on_stdout(cli: Cli, args: list[str]) -> None:
    """Asking for help is not an error, so that it can be piped."""
    result = cli.ok(*args)
    assert "Usage: mist" in result.out
    assert result.err == ""


def test_help_of_a_command_by_both_spellings(cli: Cli) -> None:
    """`mist help tail` is `mist tail --help`."""
    assert cli.ok("help", "tail").out == cli.ok("tail", "--help").out
    assert "Usage: mist tail" in cli.ok("tail", "-h").out


def test_unknown_command_suggests_the_near_one(cli: Cli) -> None:
    """A typing error is told with what was probably meant, and exit code 2."""
    result = cli("tial", "s")
    assert result.code == 2
    assert result.err == "error: no such command: tial. did you mean `mist tail`?\n"


def test_unknown_option_is_a_usage_error_not_a_zero_value(cli: Cli) -> None:
    """The seed read a mistyped flag as its zero value; here it ends with 2 and says so."""
    result = cli("tail", "s", "--folow")
    assert result.code == 2
    assert "--folow" in result.err
    assert "--follow" in result.err


def test_a_noun_without_a_verb_shows_its_verbs(cli: Cli) -> None:
    """`mist stream` alone is a usage error that lists what there is."""
    result = cli("stream")
    assert result.code == 2
    for verb in ("ls", "info", "purge", "verify"):
        assert f"\n  {verb} " in result.err


@pytest.mark.parametrize(
    "args",
    [
        ["-u", "{url}", "stream", "ls", "-o", "raw"],
        ["stream", "-u", "{url}", "ls", "--format=raw"],
        ["stream", "ls", "-u", "{url}", "-oraw"],
        ["-o", "csv", "stream", "ls", "--url", "{url}", "--format", "raw"],
        ["s", "ls", "--url={url}", "-qo", "raw"],
    ],
)
def test_global_options_before_between_and_after(cli: Cli, url: str, args: list[str]) -> None:
    """Global options mean the same wherever they stand; the last one wins."""
    fill(url, "s", 1)
    assert cli.ok(*[a.format(url=url) for a in args]).out == "s\n"


def test_the_table_of_global_options_is_the_group(cli: Cli) -> None:
    """What the dispatcher accepts before a command is what every command accepts after it."""
    assert {name for name, _ in entry.GLOBALS.values()} == {f.name for f in fields(GlobalOptions)}


def test_split_globals_stops_at_the_first_other_word() -> None:
    """Only what stands before the command is taken; a missing value is refused."""
    assert entry.split_globals(["-qy", "-u", "memory:", "tail", "-j"]) == (
        {"quiet": True, "yes": True, "url": "memory:"},
        ["tail", "-j"],
    )
    assert entry.split_globals(["--format=json", "--unknown"]) == ({"format": "json"}, ["--unknown"])
    with pytest.raises(InvalidArgument, match="needs a value"):
        entry.split_globals(["-u"])


def test_an_error_is_one_line_or_one_object(cli: Cli) -> None:
    """`error: what. why. next step` on stderr; with a JSON format {"error":{…}}; stdout stays empty."""
    text = cli("-u", "memory:", "tail", "nothing")
    assert text.code == 3
    assert text.out == ""
    assert text.err.startswith("error: no stream nothing in memory:")
    assert text.err.count("\n") == 1
    for where in (["-j", "tail", "nothing"], ["tail", "nothing", "-o", "jsonl"]):
        found = cli("-u", "memory:", *where)
        assert found.code == 3
        error = __import__("msgspec").json.decode(found.err)["error"]
        assert set(error) == {"code", "message", "hint", "retryable"}
        assert error["code"] == "not_found"
        assert error["retryable"] is False


def test_a_format_from_the_environment_shapes_errors_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """MIST_FORMAT=json gives JSON errors without a flag."""
    monkeypatch.setenv("MIST_FORMAT", "json")
    assert cli("-u", "memory:", "tail", "nothing").err.startswith('{"error":')


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["tail"], 2),
        (["-o", "yaml", "stream", "ls"], 2),
        (["--timeout", "-1", "stream", "ls"], 2),
        (["-u", "nope", "stream", "ls"], 2),
        (["-u", "kafka:", "stream", "ls"], 2),
        (["-u", "http://localhost:1", "stream", "ls"], 2),
        (["-u", "log:absent", "stream", "ls"], 3),
        (["tail", "file:absent.jsonl"], 3),
        (["-u", "memory:", "pub", "bad name!", "x"], 2),
        (["stream", "purge", "file:x.jsonl"], 3),
    ],
)
def test_exit_codes_of_refusals(cli: Cli, args: list[str], code: int) -> None:
    """Usage is 2, not found is 3, and each comes with one line."""
    result = cli(*args)
    assert result.code == code, result
    assert result.err.startswith("error: ")


def test_read_verbs_create_nothing(cli: Cli, home: Path) -> None:
    """Looking where nothing is leaves nothing behind."""
    for args in (["stream", "ls"], ["tail", "s"], ["count", "s"], ["consumer", "lag"], ["cursor", "ls"], ["doctor"]):
        cli(*args)
    assert list(home.iterdir()) == []
    (home / "empty").mkdir()
    assert cli("-u", "log:empty", "tail", "s").code == 3
    assert list((home / "empty").iterdir()) == []


def test_a_bug_is_one_line_and_a_traceback_only_on_request(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception nobody expected ends with 1 and asks for a report."""

    def broken(name: str, verb: str) -> None:
        raise RuntimeError("boom\x1b[31m")

    monkeypatch.setattr("mist.cli.wrap.load", broken)
    result = cli("tail", "s")
    assert result.code == 1
    assert result.err.startswith("error: RuntimeError: boom\\x1b[31m. A bug of ours")
    assert "Traceback" not in result.err
    assert "Traceback" in cli("-v", "tail", "s").err


def test_timeout_ends_with_six_and_says_how_to_go_on(cli: Cli, url: str) -> None:
    """--timeout bounds the command; a follower tells where it was."""
    fill(url, "s", 2)
    result = cli("-u", url, "tail", "s", "-f", "--timeout", "0.2")
    assert result.code == 6
    assert "--from +2" in result.err
    assert "not done after 0.2 s" in result.err


def test_passwords_are_never_printed(cli: Cli) -> None:
    """A URL in an error or a listing has *** for its secrets."""
    result = cli("-u", "nats://me:hunter2@localhost:1", "config", "show", "-v")
    assert "hunter2" not in result.out + result.err
    assert "***" in result.out
