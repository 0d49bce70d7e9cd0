"""Run the benchmarks: `python -m bench [--only NAME,…] [--rounds N] [--scale F] [--dir DIR] [--format json]`.

Parts: append, replay, follow, consume, start (the embedded log), http (its door), tokentrace (the trace
store), matchspec (evals), nats, redis, latency, memory, copy (the servers). Not by default: scale (minutes, and gigabytes on
the disk), infermux (installs LiteLLM's proxy beside the environment, once).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from bench import (
    appending,
    consuming,
    following,
    http,
    infermux,
    matchspec,
    replaying,
    scaling,
    servers,
    starting,
    tokentrace,
)
from bench.common import Board

PARTS = (
    "append", "replay", "follow", "consume", "start", "http", "tokentrace", "matchspec", "nats", "redis", "latency", "memory", "copy",
)  # fmt: skip
EXTRA = ("scale", "infermux")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio", help="for the parts of the servers")
    parser.add_argument("--scale", type=float, default=1.0, help="0.1 for a quick look")
    parser.add_argument(
        "--dir", type=Path, help="where to write (a real disk, not tmpfs); default: the temporary directory"
    )
    parser.add_argument(
        "--memory-spans", type=int, default=1_000_000, help="how many spans (tokentrace) or samples (matchspec) memory is"
        " looked at for; 0 = not; 5000000 takes minutes",
    )  # fmt: skip
    parser.add_argument("--format", choices=["text", "json"], default="text")
    args = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="mist-bench-", dir=args.dir))
    board = Board(args.format == "json")
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS + EXTRA):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS + EXTRA)}")
    if args.dir is not None:
        tempfile.tempdir = str(args.dir)  # the servers' directories too
    try:
        if "append" in parts:
            appending.run(board, base, args.rounds, args.scale)
        if "replay" in parts:
            replaying.run(board, base, args.rounds, args.scale)
        if "follow" in parts:
            following.run(board, base, args.rounds, args.scale)
        if "consume" in parts:
            consuming.run(board, base, args.rounds, args.scale)
        if "start" in parts:
            starting.run(board, args.rounds)
        if "http" in parts:
            http.run(board, base, args.rounds, args.scale)
        if "tokentrace" in parts:
            tokentrace.run(board, base, args.rounds, args.scale, args.memory_spans)
        if "infermux" in parts:
            infermux.run(board, base, args.rounds, args.scale)
        if "matchspec" in parts:
            matchspec.run(board, base, args.rounds, args.scale, args.memory_spans)
        if "scale" in parts:
            scaling.run(board, base, args.scale)
        servers.run(board, parts, args.rounds, args.scale, args.loop)
        board.finish()
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
