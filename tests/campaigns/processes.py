"""Starting, stopping and killing a campaign's processes.

One helper process imports everything once and forks a child per request: a killed writer is back in milliseconds. The
helper is the children's parent, so a pid stays theirs until it is reaped and no signal can hit a stranger. Everything dies
with the campaign: the helper when its input ends or its parent dies, the children when the helper dies.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]


class ChildFailed(AssertionError):
    """A child ended otherwise than it should have."""


class Child:
    """A process of a campaign, started by a Nursery."""

    def __init__(self, nursery: Nursery, role: str, pid: int, log: Path) -> None:
        self._nursery = nursery
        self.role = role
        self.pid = pid
        self.log = log
        self.status: int | None = None
        self._pidfd = os.pidfd_open(pid)

    @property
    def alive(self) -> bool:
        return self.status is None and not self._ended(0)

    def _ended(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def signal(self, number: int) -> None:
        """Does nothing when it has ended: a pid that was not reaped belongs to nobody else."""
        if self.status is None:
            os.kill(self.pid, number)

    def stopped(self) -> bool:
        """Whether it stands still (SIGSTOP)."""
        with open(f"/proc/{self.pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] in "Tt"

    def wait_stopped(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if not self.alive:
                return False
            if self.stopped():
                return True
            time.sleep(0.002)
        return False

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, negative for a signal; None when it still runs."""
        if self.status is None and self._ended(timeout_s):
            self.status = self._nursery.reap(self.pid)
            os.close(self._pidfd)
        return self.status

    def kill(self, timeout_s: float = 10.0) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        if self.wait(timeout_s) is None:
            raise ChildFailed(f"{self.role} ({self.pid}) did not die of SIGKILL in {timeout_s:g} s")

    def killed(self, timeout_s: float) -> bool:
        """Whether it dies of SIGKILL by itself within the time. Raises ChildFailed when it ends otherwise."""
        status = self.wait(timeout_s)
        if status is not None and status != -signal.SIGKILL:
            raise ChildFailed(f"{self.role} ended with {status}: {self.output()}")
        return status is not None

    def finish(self, timeout_s: float = 30.0, *, ask: bool = True) -> None:
        """Ask it to end (SIGTERM) and expect exit code 0."""
        if ask:
            self.signal(signal.SIGTERM)
        status = self.wait(timeout_s)
        if status is None:
            self.signal(signal.SIGABRT)  # faulthandler writes where it hangs
            self.wait(5)
            raise ChildFailed(f"{self.role} did not end in {timeout_s:g} s: {self.output()}")
        if status:
            raise ChildFailed(f"{self.role} ended with {status}: {self.output()}")

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


class Nursery:
    """`with Nursery(folder) as nursery: child = nursery.start("writer", {...})`. Leaves no process behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._children: list[Child] = []
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "1"}
        self._helper = subprocess.Popen(
            [sys.executable, "-m", "tests.campaigns.child", "helper"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT, text=True,
        )  # fmt: skip
        self._ask({"ping": 1})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        self._helper.stdin.write(json.dumps(request) + "\n")
        self._helper.stdin.flush()
        line = self._helper.stdout.readline()
        if not line:
            raise ChildFailed("the helper process is gone")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, role: str, args: dict[str, Any]) -> Child:
        """Fork a child that runs a role of child.py."""
        self._count += 1
        log = self.folder / f"{role}-{args.get('label', self._count)}.err"
        answer = self._ask({"role": role, "args": args, "log": str(log)})
        child = Child(self, role, answer["pid"], log)
        self._children = [c for c in self._children if c.status is None]
        self._children.append(child)
        return child

    def reap(self, pid: int) -> int:
        return int(self._ask({"reap": pid})["status"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            for child in self._children:
                if child.status is None:
                    child.kill()
        finally:
            assert self._helper.stdin is not None
            assert self._helper.stdout is not None
            self._helper.stdin.close()
            self._helper.stdout.close()
            self._helper.wait(10)
