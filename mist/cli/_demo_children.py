"""The demo's child processes: started with their talk in a log file, waited for, and never left behind.

The broker's URL goes to them in the environment (MIST_URL): what stands in their arguments is seen by everybody who can
run `ps`, and a URL may hold a password.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Self, TypeVar

from mist.errors import Internal

T = TypeVar("T")
POLL_S = 0.01
LOG_TAIL_CHARS = 600


class Child:
    """One process. Its exit code is what the demo is about: a surprising one is an error with the end of its log."""

    def __init__(self, name: str, process: Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process
        self._output = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, name: str, args: list[str], log: Path, url: str, env: Mapping[str, str]) -> Self:
        """`python -P args…`: the interpreter that runs us, nothing from the current directory."""
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", *args, stdin=PIPE, stdout=PIPE, stderr=stderr,
                env={**os.environ, "MIST_URL": url, **env},
            )  # fmt: skip
        return cls(name, process, log)

    async def _read(self) -> bytes:
        stream = self._process.stdout
        return await stream.read() if stream is not None else b""

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    def tell(self, line: bytes) -> None:
        """One line to its standard input."""
        if self._process.stdin is not None:
            self._process.stdin.write(line)

    def terminate(self) -> None:
        if self.running:
            self._process.terminate()

    def kill(self) -> None:
        if self.running:
            self._process.kill()

    async def ended(self, *codes: int) -> bytes:
        """What it wrote to standard output, when it has ended with one of these codes. Raises Internal otherwise."""
        output = await self._output
        code = await self._process.wait()
        if code not in codes:
            raise Internal(
                f"the demo's {self.name} ended with {code}: {self.last_words()}", hint=f"its log: {self.log}"
            )
        return output

    def last_words(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return text[-LOG_TAIL_CHARS:].strip() or "it said nothing"

    async def reap(self) -> None:
        """Kill it if it still runs, and wait for its end."""
        self.kill()
        await self._process.wait()
        with contextlib.suppress(asyncio.CancelledError):
            await self._output
        if self._process.stdin is not None:
            self._process.stdin.close()


class Nursery:
    """Starts children and reaps every one of them at the end, whatever happened."""

    def __init__(self, logs: Path, url: str) -> None:
        self._logs = logs
        self._url = url
        self._children: list[Child] = []

    async def start(self, name: str, *args: str, env: Mapping[str, str] | None = None) -> Child:
        child = await Child.start(name, list(args), self._logs / f"{name}.log", self._url, env or {})
        self._children.append(child)
        return child

    async def reap(self) -> None:
        for child in self._children:
            await child.reap()


@contextlib.asynccontextmanager
async def nursery(logs: Path, url: str) -> AsyncIterator[Nursery]:
    """Children of this block do not outlive it. `url` is their broker."""
    found = Nursery(logs, url)
    try:
        yield found
    finally:
        await asyncio.shield(found.reap())


async def until(look: Callable[[], T | None], *children: Child) -> T:
    """Poll until `look` finds something. Raises Internal when one of the children ends before."""
    while True:
        found = look()
        if found is not None:
            return found
        for child in children:
            if not child.running:
                raise Internal(
                    f"the demo's {child.name} ended too early: {child.last_words()}", hint=f"its log: {child.log}"
                )
        await asyncio.sleep(POLL_S)
