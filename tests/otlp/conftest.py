"""The command line as a process, and a log of one's own: the fixtures of tests/cli."""

from __future__ import annotations

from cli.conftest import home, log, spawn

__all__ = ["home", "log", "spawn"]
