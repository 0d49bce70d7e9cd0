"""MatchSpec: recorded answers from a file to durable results; Inspect AI beside it; memory over a million samples.

Each side is a process of its own with the same file: an id, a question, an expected number, a recorded answer of a few
sentences. Ours is read line by line, graded by the last number of the text, and every result is an envelope in the
embedded log, synced to the disk in batches; the clock runs from the manifest to the last result, and over reading all of
it back for the report. The suite's checks (one pass before it begins) are told apart. Inspect grades what stands where
a model's answer would (peers/inspect_peer.py) and writes its own log. It lives in a virtual environment of its own, made
here from peers/inspect.txt; where that cannot be done, the row says so. `python -m bench.matchspec ROLE …` is our process.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from bench.common import Board

GRADE = "MatchSpec: graded samples from recorded answers, durable"
MEMORY = "MatchSpec: resident memory of a run"
TARGET = 20_000.0
SAMPLES = 40_000
PEER_SAMPLES = 300
PEERS = Path(__file__).parent / "peers"
INSTALL_S = 600


def write_rows(path: Path, count: int) -> Path:
    """A file of samples with their recorded answers, two thirds of them right."""
    chance = random.Random(count)
    with path.open("w") as f:
        for i in range(count):
            a, b = chance.randrange(10_000), chance.randrange(10_000)
            said = a + b if i % 3 else a - b
            row = {
                "id": str(i), "input": f"A shop has {a} apples and buys {b} more. How many apples does it have then?",
                "expected": str(a + b), "target": str(a + b),
                "output": f"It begins with {a} apples. Then it buys {b}, so that the sum is {a} + {b}.\nA: {said}",
            }  # fmt: skip
            f.write(json.dumps(row) + "\n")
    return path


async def _grade(path: str, folder: str) -> dict[str, Any]:
    import mist
    from mist.tools.matchspec.data import Rows
    from mist.tools.matchspec.graders import grader
    from mist.tools.matchspec.run import run_suite
    from mist.tools.matchspec.suite import Harness, Recorded, suite_of

    began = time.perf_counter()
    samples = Rows(Path(path))
    known = Harness(
        name="known", samples=samples, model=Recorded(label="known"), graders=(grader({"type": "numeric"}),)
    )
    suite = suite_of("known", [known], where=path)
    loaded_s = time.perf_counter() - began
    async with mist.connect(f"log:{folder}") as broker:
        stream = await broker.open("eval")
        began, cpu = time.perf_counter(), time.process_time()
        done = await run_suite(broker, stream, suite, run="bench", collect=False)
        took, used = time.perf_counter() - began, time.process_time() - cpu
        durability = (await stream.info()).durability
    assert done.run.info.complete
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "samples": done.ran, "s": took, "cpu_s": used, "load_s": loaded_s, "mb": peak, "durability": durability,
    }  # fmt: skip


def _ours(path: Path, base: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=base) as folder:
        return _told([sys.executable, "-m", "bench.matchspec", "grade", str(path), folder])


def _told(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[-3:]} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peer(base: Path) -> tuple[Path | None, str]:
    """The Python of Inspect's environment, or why there is none."""
    place = base / "inspect"
    try:
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        command += ["-r", str(PEERS / "inspect.txt")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except (OSError, subprocess.SubprocessError) as exc:
        return None, str(exc)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1][:200] if lines else f"pip ended with {done.returncode}"
    return python, ""


def run(board: Board, base: Path, rounds: int, scale: float, memory_samples: int) -> None:
    board.head(GRADE)
    path = write_rows(base / "samples.jsonl", max(1000, int(SAMPLES * scale)))
    few = write_rows(base / "few.jsonl", max(100, int(PEER_SAMPLES * scale)))
    python, why = _peer(base)
    sides = {"ours": lambda: _ours(path, base)}
    if python is not None:
        sides["peer"] = lambda: _told([str(python), str(PEERS / "inspect_peer.py"), str(few)])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(min(rounds, 5)):
        for name, side in sides.items():
            found[name].append(side())
    ours = board.row(
        GRADE, f"results in the log ({found['ours'][0]['durability']}), read back", _rates(found["ours"]), "samples/s"
    )
    board.row(GRADE, "  processor time of a sample", _cpu_us(found["ours"]), "µs")
    board.row(
        GRADE, "  checks before the run, of a sample", [r["load_s"] / r["samples"] * 1e6 for r in found["ours"]], "µs"
    )
    board.verdict(GRADE, "graded samples a second", ours, TARGET, unit="/s")
    if python is None:
        print(f"  Inspect AI is not measured: it could not be installed ({why})", file=sys.stderr, flush=True)
    else:
        peer = board.row(GRADE, "Inspect AI, its log", _rates(found["peer"]), "samples/s")
        board.row(GRADE, "  processor time of a sample", _cpu_us(found["peer"]), "µs")
        board.verdict(GRADE, "over Inspect AI", ours / peer, 1.0)
    if memory_samples:
        board.head(MEMORY)
        sizes = [max(1000, memory_samples // 10), memory_samples]
        peaks = []
        for size in sizes:
            many = write_rows(base / "many.jsonl", size)
            peaks.append(board.row(MEMORY, f"peak after {size:,} samples", [_ours(many, base)["mb"]], "MiB"))
            many.unlink()
        board.verdict(MEMORY, f"{sizes[1]:,} samples over {sizes[0]:,}", peaks[1] / peaks[0], 1.25, at_least=False)


def _rates(found: list[dict[str, Any]]) -> list[float]:
    return [r["samples"] / r["s"] for r in found]


def _cpu_us(found: list[dict[str, Any]]) -> list[float]:
    return [r["cpu_s"] / r["samples"] * 1e6 for r in found]


if __name__ == "__main__":
    assert sys.argv[1] == "grade"
    print(json.dumps(asyncio.run(_grade(sys.argv[2], sys.argv[3]))))
