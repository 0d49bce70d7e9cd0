"""validate, config, context, doctor, version, completion: the verbs around the streams."""

from __future__ import annotations

import fcntl
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.conftest import ROOT, Cli, envelope, fill
from mist.broker.base import Fact
from mist.cli.completion import candidates
from mist.cli.validate import document_end, documents
from mist.config import Layer, MistConfig, env_layers, merge, unknown_variables
from mist.errors import InvalidArgument
from mist.protocol.codec import encode

ONE = encode(envelope(1))


# validate


@pytest.mark.parametrize(
    ("data", "valid", "invalid"),
    [
        (b"", 0, 0),
        (b"\n \n", 0, 0),
        (ONE, 1, 0),
        (ONE + ONE + b" " + ONE, 3, 0),
        (ONE + b"\n" + ONE + b"\n", 2, 0),
        (json.dumps(json.loads(ONE), indent=2).encode() + b"\n" + ONE, 2, 0),
        (b"]", 0, 1),
        (b"}", 0, 1),
        (b"garbage\n" + ONE, 1, 1),
        (b'{"version":"1",\n' + ONE + b"\n", 1, 1),
        (b'{"version":"1"', 0, 1),
        (b'{"open string\n' + ONE, 1, 1),
        (b"[1,2]\n" + ONE, 1, 1),
        (ONE.replace(b'"version":"1"', b'"version":"99"'), 0, 1),
        (ONE.replace(b'"id":"id-1"', b'"id":""'), 0, 1),
        (ONE.replace(b'"payload"', b'"checksum":1,"payload"'), 0, 1),
        (b"\xef\xbb\xbf" + ONE, 1, 0),
        (ONE + b"\n" + b"x" * (11 * 1024 * 1024) + b"\n" + ONE, 2, 1),
        (b'{"a":"\xff"}', 0, 1),
    ],
)
def test_validate_counts_every_document_once(cli: Cli, data: bytes, valid: int, invalid: int) -> None:
    """Lines, concatenated and spread documents; what is broken is one invalid document, never an endless loop."""
    result = cli("validate", stdin=data)
    assert result.raw == b'{"valid":%d,"invalid":%d}\n' % (valid, invalid)
    assert result.code == (10 if invalid else 0)
    assert result.err.count("line ") >= invalid


@given(
    st.lists(st.sampled_from([ONE, b"\n", b"{", b"}", b"[", b'"', b"\\", b" ", b"x", b'{"a":1}', b"\r\n"]), max_size=30)
)
def test_documents_always_end_and_lose_no_whole_line(parts: list[bytes]) -> None:
    """Any input is cut into documents in finite time, and every line that is a whole envelope is found."""
    data = b"".join(parts)
    found = [d for _, d in documents(io.BytesIO(data))]
    assert len(found) <= len(data)
    alone = data.split(b"\n").count(ONE)
    if b"{" not in data.replace(ONE, b"").replace(b'{"a":1}', b"") and b"[" not in data:
        assert found.count(ONE) >= alone


def test_document_end() -> None:
    """Brackets in strings do not count; what does not end has no end."""
    assert document_end(b'{"a":"}]\\"{"} rest') == 13
    assert document_end(b"[[1],[2]]x") == 9
    assert document_end(b'{"a":"\\') == 0
    assert document_end(b"1") == 0


# settings


def test_every_value_says_where_it_came_from(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File below context below environment below flags."""
    (home / "mist.toml").write_text('format = "csv"\ntimeout_s = 5.0\nurl = "memory:"\nno_input = true\n')
    monkeypatch.setenv("MIST_TIMEOUT_S", "7")
    rows = {r["key"]: r for r in cli.ok("config", "show", "--origin", "-j").json}
    assert (rows["format"]["value"], rows["format"]["origin"]) == ("json", "flag")
    assert (rows["timeout_s"]["value"], rows["timeout_s"]["origin"]) == (7.0, "MIST_TIMEOUT_S")
    assert (rows["url"]["value"], rows["url"]["origin"]) == ("memory:", "mist.toml")
    assert (rows["pager"]["value"], rows["pager"]["origin"]) == (True, "default")
    cli.ok("context", "save", "lab", "memory:lab", "--select")
    assert {r["key"]: r for r in cli.ok("config", "show", "--origin", "-j").json}["url"]["origin"] == "context lab"
    monkeypatch.setenv("MIST_URL", "memory:env")
    assert {r["key"]: r for r in cli.ok("config", "show", "--origin", "-j").json}["url"]["origin"] == "MIST_URL"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("formats = 'json'", "did you mean 'format'"),
        ("format = 'yaml'", "format"),
        ("timeout_s = 'soon'", "timeout_s"),
        ("quiet = 1", "quiet"),
        ("[url]\na = 1", "url"),
        ("format =", "not TOML"),
        ("timeout_s = -1.0", "negative"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(cli: Cli, home: Path, text: str, says: str) -> None:
    """Nothing in a configuration file is ignored."""
    (home / "mist.toml").write_text(text)
    result = cli("config", "show")
    assert result.code == 2
    assert "mist.toml" in result.err
    assert says in result.err


def test_a_wrong_variable_is_an_error_that_names_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed ignored what it could not read; here it is refused."""
    monkeypatch.setenv("MIST_TIMEOUT_S", "soon")
    result = cli("config", "show")
    assert result.code == 2
    assert "MIST_TIMEOUT_S" in result.err


def test_merging_is_a_function_over_values() -> None:
    """Later layers win, variables become typed, unknown ones are found."""
    env = {"MIST_FORMAT": "jsonl", "MIST_QUIET": "true", "MIST_FORMATS": "x", "OTHER": "y", "MIST_URL": ""}
    loaded = merge(MistConfig, [Layer("a", {"timeout_s": 1}), *env_layers(MistConfig, env)])
    assert (loaded.value.timeout_s, loaded.value.format, loaded.value.quiet) == (1.0, "jsonl", True)
    assert loaded.origins["url"] == "default"
    assert unknown_variables(MistConfig, env) == ["MIST_FORMATS"]
    with pytest.raises(InvalidArgument, match="b: unknown key 'nope'"):
        merge(MistConfig, [Layer("b", {"nope": 1})])


def test_config_init_and_validate(cli: Cli, home: Path) -> None:
    """The written file is valid, names every setting, and is not written over."""
    cli.ok("config", "init")
    assert "is fine" in cli.ok("config", "validate").err
    text = (home / "mist.toml").read_text()
    for field in MistConfig.__struct_fields__:
        assert f"# {field} = " in text
    assert cli("config", "init").code == 5
    assert cli("config", "validate", "absent.toml").code == 3


def test_contexts(cli: Cli, url: str, tmp_path: Path) -> None:
    """Saved, selected, used, shown, forgotten; the file is the user's alone and holds no secrets."""
    fill(url, "s", 1)
    cli.ok("context", "save", "lab", url, "--description", "the lab", "--select")
    assert cli.ok("stream", "ls", "-o", "raw").out == "s\n"
    row = cli.ok("context", "ls", "-j").json[0]
    assert (row["name"], row["url"], row["selected"], row["description"]) == ("lab", url, True, "the lab")
    assert cli.ok("context", "show", "-j").json["name"] == "lab"
    file = tmp_path / "config" / "mist" / "contexts.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert cli("context", "save", "x", "redis://u:secret@h").code == 2
    assert cli("context", "select", "none").code == 3
    cli.ok("context", "select")
    assert cli("stream", "ls").code == 3
    assert cli("context", "rm", "lab").code == 11
    cli.ok("context", "rm", "lab", "-y")
    assert cli("context", "show", "lab").code == 3
    file.write_text("{")
    assert "not a contexts file" in cli("context", "ls").err


# doctor and version


def test_doctor(cli: Cli, url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check is a row; an unreachable broker is 7, a log that is not there yet is only told."""
    fill(url, "s", 2)
    rows = cli.ok("-u", url, "doctor", "-j").json
    assert {"mist", "url", "connect", "round trip", "streams", "stream s"} <= {r["check"] for r in rows}
    assert any("durability" in r["detail"] for r in rows if r["check"] == "stream s")
    assert cli("-u", "log:nothing-here", "doctor").code == 0
    assert not (home / "nothing-here").exists()
    (home / "file").write_text("")
    monkeypatch.setenv("MIST_TYPO", "1")
    assert "MIST_TYPO" in cli("-u", url, "doctor").out


def test_doctor_prints_what_the_broker_says_of_its_backend(cli: Cli, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each fact; one with a warning says it, and is no failure."""
    from mist.broker.memory import MemoryBroker
    from mist.log.broker import LogBroker
    from mist_nats.broker import NatsBroker
    from mist_redis.broker import RedisBroker

    async def describe(self: object) -> list[Fact]:
        return [Fact("server", "test 1.0"), Fact("sync", "every 2 minutes", "set sync_interval: always")]

    for broker in (MemoryBroker, LogBroker, NatsBroker, RedisBroker):
        monkeypatch.setattr(broker, "describe", describe, raising=False)
    cli.ok("-u", url, "stream", "create", "s")
    rows = {r["check"]: r for r in cli.ok("-u", url, "doctor", "-j").json}
    assert (rows["server"]["state"], rows["server"]["detail"]) == ("ok", "test 1.0")
    assert (rows["sync"]["state"], rows["sync"]["detail"]) == ("warn", "every 2 minutes: set sync_interval: always")


def test_doctor_finds_a_held_lock(cli: Cli, log: str) -> None:
    """A lock that nobody lets go of is named, with exit code 10."""
    fill(log, "s", 1)
    lock = Path(log[4:]) / "streams" / "s" / "lock"
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = cli("-u", log, "doctor", "-j")
    assert result.code == 10
    assert any(r["check"] == "locks" and str(lock) in r["detail"] for r in result.json)
    assert cli("-u", log, "doctor").code == 0


def test_version(cli: Cli) -> None:
    """One line for people, everything for a bug report."""
    assert cli.ok("version").out == cli.ok("--version").out
    found = cli.ok("version", "-j").json
    assert found["protocol"] == "1"
    assert {"log", "memory"} <= set(found["brokers"])
    assert found["packages"]["msgspec"]


# completion


def test_completion_of_commands_options_and_names(cli: Cli, log: str) -> None:
    """Commands, verbs, options, their values, and names from the broker."""
    fill(log, "spans", 1)
    fill(log, "evals", 1)
    cli.ok("-u", log, "consumer", "create", "spans", "worker")
    cli.ok("-u", log, "cursor", "set", "spans", "mine", "end")
    assert candidates(["ta"]) == ["tail"]
    assert candidates(["-u", "x", "s", "ve"]) == ["verify"]
    assert candidates(["tail", "--save"]) == ["--save-cursor"]
    assert candidates(["tail", "s", "--format", "js"]) == ["json", "jsonl"]
    assert candidates(["count", "s", "--by", "s"]) == ["source", "subject"]
    assert candidates(["-u", log, "tail", ""]) == ["evals", "spans"]
    assert candidates(["tail", "-u", log, "sp"]) == ["spans"]
    assert candidates(["-u", log, "consumer", "info", "spans", ""]) == ["worker"]
    assert candidates(["-u", log, "cursor", "rm", "spans", "m"]) == ["mine"]
    assert candidates(["nonsense", ""]) == []


def test_completion_is_silent_about_everything(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No broker, no configuration, nonsense: no candidates, no message, exit 0, nothing made."""
    (home / "mist.toml").write_text("broken =")
    monkeypatch.chdir(home)
    for words in ([], ["tail", ""], ["-u"], ["-u", "nats://127.0.0.1:1", "tail", ""], ["tail", "--from", ""]):
        result = cli("__complete", *words)
        assert (result.code, result.err) == (0, "")
    assert os.listdir(home) == ["mist.toml"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_call_us_back(cli: Cli, shell: str) -> None:
    """Every script asks `mist __complete`."""
    assert "mist __complete" in cli.ok("completion", shell).out


def test_bash_completes_with_our_script(cli: Cli, log: str, tmp_path: Path) -> None:
    """The script works in a real bash: names of streams, verbs of a noun."""
    fill(log, "spans", 1)
    # with time enough for a broker on a busy machine: how long a prompt waits is not what this is about
    (tmp_path / "mist").write_text(
        f"#!{sys.executable}\nimport sys\nfrom mist.cli import completion, main\n"
        "completion.BUDGET_S = 30\nsys.exit(main.main())\n"
    )
    (tmp_path / "mist").chmod(0o755)
    (tmp_path / "script").write_text(cli.ok("completion", "bash").out)
    code = (
        f"source {tmp_path}/script; "
        'COMP_WORDS=(mist tail sp); COMP_CWORD=2; _mist_complete; echo "${COMPREPLY[@]}"; '
        'COMP_WORDS=(mist cursor ""); COMP_CWORD=2; _mist_complete; echo "${COMPREPLY[@]}"'
    )
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MIST_URL": log, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "spans\nexport import ls rm set show\n"
