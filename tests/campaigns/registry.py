"""The campaigns, in the order of docs/explanation/durability.md. A letter behind a number is a backend: n NATS, r Redis."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from . import bugbank, faults
from .adapters import c31b
from .blocks import fuzz_blocks
from .campaign import Campaign, Report, Run
from .checkpoints import c08
from .consumers import c12, c13, soak
from .evals import c34
from .failover import cluster, failover
from .full import c06
from .fuzzing import c19
from .model import c18
from .moving import c27
from .network import partitions, restarts
from .slow import c14
from .tracing import c32
from .writers import c01, c07, c15


def _simulated(function: Callable[..., dict[str, Any]], key: str) -> Run:
    """A campaign of faults.py, which raises what broke, as one that returns it."""

    def run(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
        out: dict[str, Any] = {"reached": 0, "failures": [], "kept": "", "notes": [], "counts": {}}
        try:
            result = function(budget_s, seed, report, cases=units)
        except Exception:
            out["failures"].append(traceback.format_exc(limit=-8))
            return out
        out["reached"] = result[key]
        out["whole"] = result.get("of")
        out["counts"] = {k: v for k, v in result.items() if isinstance(v, int)}
        return out

    return run


NATS, REDIS = ("nats",), ("redis",)


def _on(backend: str, run: Callable[..., dict[str, Any]]) -> Run:
    return partial(run, backend=backend)


CAMPAIGNS: tuple[Campaign, ...] = (
    Campaign("C01", "kill -9 of writers, 4 producers, group commit", "kills", 20, 1000, c01),
    Campaign("C02", "simulated power cuts", "crash states", 2000, 100_000, _simulated(faults.c02, "states")),
    Campaign("C03", "torn tail at every byte of 16 blocks", "cuts", 0, 0, _simulated(faults.c03, "cuts")),
    Campaign("C04", "every bit of a 64 KiB segment", "flips", 5000, 0, _simulated(faults.c04, "bits")),
    Campaign("C05", "the k-th operation fails", "faults", 0, 0, _simulated(faults.c05, "faults")),
    Campaign("C06", "really full file system", "rounds", 5, 100, c06),
    Campaign("C07", "16 processes, one stopped or killed", "rounds", 5, 200, c07),
    Campaign("C08", "kill while saving checkpoints", "kills", 50, 5000, c08),
    Campaign("C09", "NATS killed, restarted, stopped under load", "kills", 3, 100, _on("nats", restarts), needs=NATS),
    Campaign("C09c", "three NATS nodes lose one, R3", "nodes killed", 2, 100, cluster, needs=NATS),
    Campaign(
        "C10", "Redis killed, restarted, stopped under load", "kills", 3, 100, _on("redis", restarts), needs=REDIS
    ),
    Campaign("C10f", "Redis failover, with WAIT and without", "failovers", 2, 100, failover, needs=REDIS),
    Campaign("C11n", "partitions before NATS", "schedules", 3, 100, _on("nats", partitions), needs=NATS),
    Campaign("C11r", "partitions before Redis", "schedules", 3, 100, _on("redis", partitions), needs=REDIS),
    Campaign("C12", "8 consumers killed and paused", "kills", 20, 1000, c12),
    Campaign("C12n", "the same on NATS", "kills", 10, 1000, _on("nats", c12), needs=NATS),
    Campaign("C12r", "the same on Redis", "kills", 10, 1000, _on("redis", c12), needs=REDIS),
    Campaign("C13", "1 % poison", "messages", 10_000, 100_000, c13),
    Campaign("C13n", "the same on NATS", "messages", 3_000, 100_000, _on("nats", c13), needs=NATS),
    Campaign("C13r", "the same on Redis", "messages", 3_000, 100_000, _on("redis", c13), needs=REDIS),
    Campaign("C14", "one consumer 100 times slower", "s in one run", 15, 600, c14, longest=True),
    Campaign("C14n", "the same on NATS", "s in one run", 6, 600, _on("nats", c14), longest=True, needs=NATS),
    Campaign("C14r", "the same on Redis", "s in one run", 6, 600, _on("redis", c14), longest=True, needs=REDIS),
    Campaign("C15", "kill -9 while erasing", "kills", 20, 1000, c15),
    Campaign("C18", "state machine on log and memory", "examples", 200, 20_000, c18),
    Campaign("C18n", "state machine on NATS", "examples", 20, 20_000, _on("nats", c18), needs=NATS),
    Campaign("C18r", "state machine on Redis", "examples", 20, 20_000, _on("redis", c18), needs=REDIS),
    Campaign("C19", "fuzz: envelope, subjects, URLs, lines", "inputs", 200_000, 10_000_000, c19),
    Campaign("C19b", "fuzz: the log's bytes", "inputs", 24_000, 10_000_000, fuzz_blocks),
    Campaign("C27", "copy and mirror over every pair, both sides killed", "runs", 1, 50, c27, needs=NATS + REDIS),
    Campaign("C31", "bug bank", "bugs caught", 0, 0, _simulated(bugbank.c31, "caught")),
    Campaign("C31b", "bug bank of the adapters", "bugs caught", 0, 0, c31b, needs=("nats", "redis")),
    Campaign("C32", "kill -9 of TokenTrace's ingest", "kills", 5, 500, c32),
    Campaign("C34", "kill -9 of MatchSpec's runner", "kills", 6, 1000, c34),
    Campaign("C34n", "the same on NATS", "kills", 4, 200, _on("nats", c34), needs=NATS),
    Campaign("C34r", "the same on Redis", "kills", 4, 200, _on("redis", c34), needs=REDIS),
    Campaign("SOAK", "4 processes share a consumer", "records", 1, 1_000_000, soak),
)

BY_ID = {c.id: c for c in CAMPAIGNS}
