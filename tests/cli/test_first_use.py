"""What somebody meets in the first hour: closed and full outputs, wrong places, empty input, a copy onto itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import ROOT, Cli, fill, records
from mist.cli.main import COMMANDS
from mist.cli.render import joined

Spawn = Callable[..., subprocess.Popen[bytes]]


def shell(line: str, log: str) -> subprocess.CompletedProcess[str]:
    """One line of sh in which `mist` is ours."""
    run = f'mist() {{ PYTHONPATH="{ROOT}" "{sys.executable}" -m mist -u "{log}" "$@"; }}; {line}'
    return subprocess.run(["sh", "-c", run], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_bug(log: str, closed: str) -> None:
    """A command started with closed descriptors works, and no file of the log becomes one of them."""
    fill(log, "s", 3)
    done = shell(f"mist consumer create s c {closed} && mist stream verify s {closed}", log)
    assert done.returncode == 0, done
    assert "bug" not in done.stderr
    assert len(records(log, "s")) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error(log: str) -> None:
    """A full disk behind `>` is told as such, with its exit code."""
    fill(log, "s", 3)
    done = shell("mist tail s > /dev/full", log)
    assert done.returncode == 11
    assert done.stderr == "error: standard output: No space left on device. what was printed is not complete\n"


def test_empty_input_publishes_nothing(cli: Cli, log: str) -> None:
    """A pipe that brought nothing makes no record; an empty text is said with quotes."""
    refused = cli("-u", log, "pub", "notes", "-", stdin=b"")
    assert refused.code == 2
    assert "standard input is empty" in refused.err
    assert not Path(log.removeprefix("log:")).exists()
    assert cli.ok("-u", log, "pub", "notes", '""', "-j").json["sequence"] == 1


def test_what_was_stored_before_a_failure_is_told(cli: Cli, log: str) -> None:
    """A repeated publish that hits a limit says how many are there."""
    cli.ok("-u", log, "stream", "create", "s", "--records-max", "1500", "--full", "refuse")
    result = cli("-u", log, "pub", "s", "x", "--repeat", "3000")
    assert result.code == 11
    assert "1,000 of 3,000 were stored in s before that\n" in result.err
    assert len(records(log, "s")) == 1000


@pytest.mark.parametrize("verb", ["copy", "mirror"])
def test_a_stream_is_not_copied_onto_itself(cli: Cli, log: str, verb: str) -> None:
    """Past the dedupe window that would double it, and a mirror would never end."""
    fill(log, "s", 3)
    place = log.removeprefix("log:")
    for destination in ("s", f"{log}?stream=s", f"log:{place}/../{Path(place).name}"):
        result = cli("-u", log, verb, "s", destination)
        assert result.code == 2, result
        assert "the same stream" in result.err
    assert len(records(log, "s")) == 3


def test_a_file_in_place_of_a_log_is_named(cli: Cli, tmp_path: Path) -> None:
    """Neither reading nor publishing takes a file for an absent directory."""
    (tmp_path / "taken").write_text("x")
    for args in (["stream", "ls"], ["pub", "s", "x"]):
        assert cli("-u", f"log:{tmp_path}/taken", *args).err.endswith("taken is a file, not a directory\n")
    inside = cli("-u", f"log:{tmp_path}/taken/b", "pub", "s", "x")
    assert inside.code == 2
    assert "leads through a file" in inside.err


@pytest.mark.parametrize(
    ("url", "hint"), [("http://x/mist", "`mist relay`"), ("stdio:", "`mist relay`"), ("file:a.jsonl", "mist tail file:a.jsonl")]
)  # fmt: skip
def test_a_transport_in_place_of_a_broker_says_what_takes_it(cli: Cli, url: str, hint: str) -> None:
    """The next step is a command and not a Python call."""
    result = cli("-u", url, "stream", "ls")
    assert result.code == 2
    assert hint in result.err
    assert "dial" not in result.err


def test_memory_tells_that_it_ends(cli: Cli) -> None:
    """Who publishes to memory: on the command line is told that nobody will read it."""
    assert "memory: ends with this command" in cli.ok("-u", "memory:", "pub", "s", "x").err


def test_an_expired_position_has_no_resume_line(cli: Cli, log: str) -> None:
    """Going on from there would meet the same error; the way out is in the hint."""
    fill(log, "s", 3)
    cli.ok("-u", log, "stream", "purge", "s", "--keep", "1", "-y")
    result = cli("-u", log, "tail", "s", "--from", "1")
    assert result.code == 3
    assert "resume" not in result.err
    assert "--from start" in result.err


def test_a_resume_line_names_the_broker(cli: Cli, log: str) -> None:
    """What is printed can be pasted: with the -u that was given."""
    fill(log, "s", 3)
    result = cli("-u", log, "--timeout", "0.5", "tail", "s", "-f")
    assert result.code == 6
    assert f"resume with: mist -u {log} tail s --from +3\n" in result.err


@pytest.mark.parametrize(
    ("what", "next_step", "line"),
    [("a", "b", "a. b"), ("a.", "b.", "a. b"), ("did you mean a?", "see b", "did you mean a? see b"), ("a", "", "a"), ("", "b", "b")],
)  # fmt: skip
def test_sentences_are_joined_once(what: str, next_step: str, line: str) -> None:
    """One full stop between two sentences, none behind a question."""
    assert joined(what, next_step) == line


def test_consumer_info_shows_plain_values(cli: Cli, log: str) -> None:
    """Subjects are a list to read, not a Python tuple."""
    fill(log, "s", 1)
    cli.ok("-u", log, "consumer", "create", "s", "c", "--subject", "a.>", "--subject", "b")
    assert "subjects=a.>,b " in cli.ok("-u", log, "consumer", "info", "c").out


@pytest.mark.parametrize("name", [name for name, (place, _) in COMMANDS.items() if place.endswith(":app")])
def test_a_noun_shows_examples_and_whole_sentences(cli: Cli, name: str) -> None:
    """Its help is where a verb is looked for: nothing is cut off, and there are lines to paste."""
    text = cli.ok(name, "--help").out
    assert "..." not in text.partition("Commands:")[2]
    assert f"Examples:\n    mist {name} " in text


def test_what_was_done_is_an_object_with_json(cli: Cli, log: str) -> None:
    """No command that succeeds leaves a script with an empty output."""
    fill(log, "s", 3)
    cli.ok("-u", log, "consumer", "create", "s", "c")
    cli.ok("-u", log, "cursor", "set", "s", "r", "2")
    for args, code, dry in (
        (["stream", "purge", "s", "--keep", "1", "--dry-run"], 10, True),
        (["consumer", "rm", "s", "c", "--dry-run"], 10, True),
        (["copy", "s", f"{log}?stream=t", "--dry-run"], 10, True),
        (["consumer", "rm", "s", "c", "-y"], 0, False),
        (["cursor", "rm", "s", "r", "-y"], 0, False),
        (["stream", "rm", "s", "-y"], 0, False),
        (["context", "save", "a", log], 0, False),
        (["config", "init"], 0, False),
        (["config", "validate"], 0, False),
    ):
        result = cli("-u", log, "-j", *args)
        assert result.code == code, result
        assert result.json["dry_run"] is dry
        assert result.json["what"]
        assert result.err == ""
