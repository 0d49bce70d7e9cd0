"""Start-up: `import mist` and `mist --help`, as whole processes beside a bare interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from bench.common import Board, interleaved

SUBJECT = "start-up"


def _run(*args: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1000


def run(board: Board, rounds: int) -> None:
    board.head(SUBJECT)
    got = interleaved({
        "python -c pass": lambda: _run("-c", "pass"),
        "import mist": lambda: _run("-c", "import mist"),
        "mist --help": lambda: _run("-m", "mist", "--help"),
    }, max(rounds, 7))  # fmt: skip
    for name, values in got.items():
        board.row(SUBJECT, name, values, "ms")
    bare, imported, helped = got.values()
    extra = statistics.median(b - a for a, b in zip(bare, imported, strict=True))
    board.verdict(SUBJECT, "import mist, above the interpreter", extra, 80.0, at_least=False, unit=" ms")
    board.verdict(SUBJECT, "mist --help, whole process", statistics.median(helped), 200.0, at_least=False, unit=" ms")
