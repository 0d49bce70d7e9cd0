"""`make power-cut`: what a power cut takes from each backend, measured. `python -m tests.campaigns.power [--rounds N]`

The backend's directory lies on an ext4 file system on a device whose power is cut at a random instant (cutdisk.py says
what that means and why it is sound). A writer appends through the contract until then and notes what was acknowledged on
another disk. Afterwards everything is killed, what is left of the device is mounted elsewhere, the server (or the log,
as after a reboot) is started on it, and the history checker counts.

Every other round keeps each unflushed block by chance: a device may have written any of them. Exit code 1 when a
setting that promises `power` lost something, 77 when this machine cannot do it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mist.broker.registry import connect
from mist.errors import InvalidArgument, NotFound
from mist.kit.local import LocalServer, nats_server, redis_server
from mist.protocol.url import parse_url
from mist.testing.history import Checker, Recorder

from . import recording as rec
from .cutdisk import CutDisk, missing, private_mounts
from .processes import Nursery

CANNOT = 77
"""The exit code of automake's skipped tests."""
_LANES = 4
_BATCH = 250
_SIZE = (424, 424)


class Setting(NamedTuple):
    """`server` over a directory, or None where there is none to start; `power`: whether it promises to lose nothing."""

    backend: str
    setting: str
    power: bool
    server: Callable[[Path], LocalServer | None]
    config: dict[str, Any]
    url: str = ""
    """Of a backend without a server, with {} for the directory."""

    @property
    def name(self) -> str:
        return f"{self.backend}, {self.setting}"


SETTINGS = (
    Setting("log:", "power (default)", True, lambda d: None, {"durability": "power"}, "log:{}/log"),
    Setting("log:", "process", False, lambda d: None, {"durability": "process"}, "log:{}/log"),
    Setting("NATS", "sync_interval 2m (its default)", False, lambda d: nats_server(d, sync_interval='"2m"'), {}),
    Setting("NATS", "sync_interval always", True, lambda d: nats_server(d, sync_interval="always"), {}),
    Setting("Redis", "appendfsync everysec", False, lambda d: redis_server(d, appendfsync="everysec"), {}),
    Setting(
        "Redis",
        "everysec, stream asks for power (WAITAOF)",
        True,
        lambda d: redis_server(d, appendfsync="everysec"),
        {"durability": "power"},
    ),
    Setting("Redis", "appendfsync always", True, lambda d: redis_server(d, appendfsync="always"), {}),
)


class Refused(Exception):
    """The backend says that it cannot promise this."""


class Outcome(NamedTuple):
    """`other`: broken promises that are not lost records, in words."""

    acked: int
    lost: int
    flushes: int
    other: str


def usable(setting: Setting) -> str:
    """Why a setting cannot be tried here, or ''."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            server = setting.server(Path(folder))
            url = server.url if server is not None else setting.url
        from mist.broker.registry import adapter

        adapter(parse_url(url.format(folder)).scheme)
    except (NotFound, InvalidArgument) as exc:
        return str(exc)
    return ""


def cut(setting: Setting, folder: Path, seconds: float, seed: int, *, share: float) -> Outcome:
    """One power cut. The caller has a mount namespace of its own."""
    folder.mkdir(parents=True)
    with CutDisk(folder / "device") as disk, Nursery(folder) as nursery:
        server, url = _start(setting, disk.path / "data")
        try:
            writer = nursery.start("writer", {
                "url": url, "config": setting.config, "label": "p", "history": str(folder / "p.jsonl"), "lanes": _LANES,
                "seed": seed, "size": _SIZE, "batch": _BATCH,
            })  # fmt: skip
            time.sleep(random.Random(seed).uniform(0.5, 1.5) * seconds)
            if not writer.alive:
                said = writer.output().strip().splitlines()[-1]
                raise (Refused if "InvalidArgument" in said else AssertionError)(said)
            happened = disk.cut(share=share, seed=seed)
            writer.kill()
        finally:
            if server is not None:
                server.kill()
        after = folder / "after"
        disk.remount(after)
        server, url = _start(setting, after / "data")
        try:
            asyncio.run(_read(url, folder / "end.jsonl"))
        finally:
            if server is not None:
                server.kill()
    checker = Checker(dense=setting.backend != "NATS")
    checker.add_files(sorted(folder.glob("*.jsonl")))
    verdict = checker.check()
    # a shorter end is what losing records looks like, and nobody reads a stream that is gone altogether
    other = {k: v for k, v in verdict.totals.items() if k not in ("lost", "stale")}
    if other == {"unread": 1} and not verdict.counts["records"]:
        other = {}
    acked = verdict.counts["acked"]
    lost = verdict.totals.get("lost", 0)
    return Outcome(acked, lost, happened["flushes"], str(other) if other else "")


def _start(setting: Setting, directory: Path) -> tuple[LocalServer | None, str]:
    server = setting.server(directory)
    if server is None:
        return None, setting.url.format(directory)
    server.start()
    return server, server.url


async def _read(url: str, history: Path) -> None:
    """Everything that is there, as after a reboot. A stream that is gone leaves an empty history."""
    recorder = Recorder(history)
    options = {"boot": secrets.token_bytes(16)} if url.startswith("log:") else {}
    try:
        async with asyncio.timeout(120), connect(url, **options) as broker:
            try:
                stream = await broker.open("s", create=False)
            except NotFound:
                return
            await rec.read_all(recorder, stream, "end")
    finally:
        recorder.close()


def table(settings: list[Setting], outcomes: dict[str, list[Outcome]], unusable: dict[str, str]) -> str:
    rows = [("backend", "setting", "cuts", "acknowledged", "lost", "other"), ("---",) * 6]
    for s in settings:
        if s.name in unusable:
            rows.append((s.backend, s.setting, "0", "", "", "not tried"))
            continue
        of = outcomes[s.name]
        other = "; ".join(o.other for o in of if o.other) or "nothing"
        rows.append(
            (s.backend, s.setting, str(len(of)), f"{sum(o.acked for o in of):,}", f"{sum(o.lost for o in of):,}", other)
        )
    wide = [max(len(r[i]) for r in rows) for i in range(6)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, wide, strict=True)) + " |" for r in rows]
    return "\n".join([*lines, *(f"{name}: not tried: {why}" for name, why in unusable.items())])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.power", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("--rounds", type=int, default=4, help="power cuts for each setting")
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long the writer writes before the cut")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--keep", action="store_true", help="keep the directories of all rounds")
    args = parser.parse_args(argv)
    why = missing()
    if why:
        print(f"no power cut can be made here: {why}", file=sys.stderr)
        return CANNOT
    private_mounts()
    seed = args.seed if args.seed is not None else random.SystemRandom().getrandbits(32)
    base = Path(tempfile.mkdtemp(prefix="mist-power-", dir=os.environ.get("MIST_CAMPAIGN_DIR")))
    print(f"seed {seed}, directories in {base}", flush=True)
    settings = [s for s in SETTINGS if args.only.lower() in s.name.lower()]
    outcomes: dict[str, list[Outcome]] = {s.name: [] for s in settings}
    unusable = {s.name: why for s in settings if (why := usable(s))}
    broken = False
    for i, s in enumerate(settings):
        for number in range(0 if s.name in unusable else args.rounds):
            folder = base / f"{i}-{number}"
            here = random.Random(f"{seed} {s.name} {number}").getrandbits(32)
            try:
                o = cut(s, folder, args.seconds, here, share=0.5 if number % 2 else 0.0)
            except Refused as exc:
                unusable[s.name] = f"refused: {exc}"
                break
            outcomes[s.name].append(o)
            bad = bool(o.other) or (s.power and o.lost > 0)
            broken = broken or bad
            print(f"{s.name}: {o.lost:,} of {o.acked:,} lost, {o.flushes} flushes. {o.other}", flush=True)
            if bad:
                print(f"BROKEN PROMISE, kept in {folder}", flush=True)
            elif not args.keep:
                shutil.rmtree(folder)
    print(table(settings, outcomes, unusable))
    if not args.keep and not broken:
        shutil.rmtree(base)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
