"""The command line inside the test process."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import msgspec
import pytest
from conftest import run

import mist
from mist.broker.base import Message
from mist.cli.main import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.out)


class Shell:
    """`shell("trace", "stats")` runs `mist trace stats -u URL`; exit code, stdout and stderr come back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
        self._monkeypatch = monkeypatch
        self.url = url

    def __call__(self, *args: str, url: str = "") -> Ran:
        return self.run(*args, "-u", url or self.url)

    def run(self, *args: str) -> Ran:
        """The command as it stands."""
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        with self._monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", err)
            code = main(list(args))
        out.flush()
        return Ran(code, out.buffer.getvalue().decode(), err.getvalue())  # type: ignore[attr-defined]


def publish(shell: Shell, *messages: Message) -> None:
    """To the stream `trace` of the shell's broker."""

    async def body() -> None:
        async with mist.connect(shell.url) as broker:
            await (await broker.open("trace")).append(messages)

    run(body())
