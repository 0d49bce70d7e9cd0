"""A small mutation fuzzer: seeded, pure Python, no coverage guidance.

A target says what must hold for any bytes: its `check` raises nothing for good behaviour, and anything it raises is a
finding. Findings are written to `.campaign/fuzz/` with the input; the seed and number repeat them. An input that runs
longer than HANG_S ends the process with a traceback of where it hangs.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct, field

HANG_S = 30.0
INPUT_BYTES_MAX = 64 * 1024
FINDINGS_MAX = 20

# name -> module; add a line to add a target
TARGETS = {
    "config": "tests.fuzz.config",
    "envelope": "tests.fuzz.envelope",
    "http_answer": "tests.fuzz.http_answer",
    "lines": "tests.fuzz.lines",
    "msgpack": "tests.fuzz.msgpack",
    "nats_wire": "tests.fuzz.nats_wire",
    "otlp": "tests.fuzz.otlp",
    "otlp_json": "tests.fuzz.otlp_json",
    "position": "tests.fuzz.position",
    "redis_entry": "tests.fuzz.redis_entry",
    "subject": "tests.fuzz.subject",
    "url": "tests.fuzz.url",
    "where": "tests.fuzz.where",
}


class Target(NamedTuple):
    """`seeds` are good inputs, `words` are pieces worth inserting. `check` returns whether the input was accepted."""

    name: str
    seeds: Sequence[bytes]
    words: Sequence[bytes]
    check: Callable[[bytes], bool]


class Finding(Struct, frozen=True):
    """One input for which the check raised, and how to make it again."""

    target: str
    number: int
    data: bytes
    error: str


class Report(Struct):
    """What one run reached. `accepted` inputs passed all checks as good ones, the others were refused properly."""

    target: str
    seed: int
    inputs: int = 0
    accepted: int = 0
    slowest_s: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.target:10s} {self.inputs:>10,} inputs, {self.accepted:>9,} accepted, "
            f"slowest {self.slowest_s * 1000:.1f} ms, {len(self.findings)} findings (seed {self.seed})"
        )


def load(name: str) -> Target:
    """The registered target of that name."""
    target = importlib.import_module(TARGETS[name]).TARGET
    assert isinstance(target, Target)
    return target


def mutate(rng: random.Random, target: Target, corpus: Sequence[bytes]) -> bytes:
    """An input made from a known one by a few random changes."""
    data = bytearray(rng.choice(corpus))
    for _ in range(min(rng.getrandbits(3), rng.getrandbits(3)) + 1):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(9)
        if kind == 0 and data:
            data[at % len(data)] = rng.getrandbits(8)
        elif kind == 1 and data:
            data[at % len(data)] ^= 1 << rng.getrandbits(3)
        elif kind == 2:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            data[at:at] = rng.choice(target.words)
        elif kind == 4:
            word = rng.choice(target.words)
            data[at : at + len(word)] = word
        elif kind == 5:
            data[at:at] = data[at : at + rng.randrange(1, 64)] * rng.choice((1, 2, 3, 70))
        elif kind == 6:
            other = rng.choice(corpus)
            data[at:] = other[rng.randrange(len(other) + 1) :]
        elif kind == 7:
            del data[at:]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 5))
    return bytes(data[:INPUT_BYTES_MAX])


def run(target: Target, *, seconds: float = 0.0, inputs: int = 0, seed: int = 1) -> Report:
    """Fuzz until so many inputs were tried, or for so many seconds; the seeds themselves come first.

    The n-th input depends on the seed only, never on time, so a finding is repeated by its number.
    """
    rng = random.Random(f"{target.name}/{seed}")
    report = Report(target.name, seed)
    corpus = list(target.seeds)
    until = time.monotonic() + seconds
    faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
    try:
        while report.inputs < inputs or (not inputs and time.monotonic() < until):
            number = report.inputs
            data = target.seeds[number] if number < len(target.seeds) else mutate(rng, target, corpus)
            started = time.perf_counter()
            try:
                accepted = target.check(data)
            except Exception:
                report.findings.append(Finding(target.name, number, data, traceback.format_exc()))
                accepted = False
                if len(report.findings) >= FINDINGS_MAX:
                    break
            report.slowest_s = max(report.slowest_s, time.perf_counter() - started)
            report.inputs += 1
            if accepted:
                report.accepted += 1
                if number >= len(target.seeds) and rng.random() < 0.02:
                    # good inputs breed: keep a bounded, changing sample of them beside the seeds
                    if len(corpus) < len(target.seeds) + 200:
                        corpus.append(data)
                    else:
                        corpus[rng.randrange(len(target.seeds), len(corpus))] = data
            if number % 256 == 0:
                faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return report


def keep(finding: Finding, folder: Path) -> Path:
    """Write a finding's input to the folder; the name is the same for the same input."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{finding.target}-{hashlib.sha256(finding.data).hexdigest()[:16]}.bin"
    path.write_bytes(finding.data)
    return path


def main(default: Sequence[str] = (), argv: Sequence[str] | None = None) -> int:
    """The command line: prints one line for each target, ends with 1 when something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", default=list(default) or list(TARGETS), metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--inputs", type=int, default=0, help="for each target, instead of a time")
    parser.add_argument("--seed", type=int, default=None, help="repeats a run; default: a new one, printed")
    args = parser.parse_args(argv)
    for name in args.targets:
        if name not in TARGETS:
            parser.error(f"no target {name}; there are {', '.join(TARGETS)}")
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    found = 0
    for name in args.targets:
        report = run(load(name), seconds=args.seconds, inputs=args.inputs, seed=seed)
        print(report, flush=True)
        found += len(report.findings)
        for finding in report.findings:
            print(f"  input {finding.number}: {keep(finding, Path('.campaign') / 'fuzz')}\n{finding.error}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
