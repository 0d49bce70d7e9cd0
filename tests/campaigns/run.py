"""`python -m tests.campaigns.run --minutes M [--only C01,C07] [--seed N] [--state DIR] [--repeat C01:SEED]`

Runs the campaigns in slices, the one that had the least time first, until the time is used; those that reached their nightly
size wait until all have. `DIR/state.json` (default `.campaign`) keeps what was reached, so that the next run goes on
from there. Prints progress about every ten seconds and a table at the end. Exit code 1 when a promise broke: the table
names campaign, seed and the directory that was kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from .campaign import Campaign
from .registry import BY_ID, CAMPAIGNS
from .sites import lacking

ROOT = Path(__file__).resolve().parents[2]
_SAY_EVERY_S = 10.0
_SLICE_S = (10.0, 60.0)
_LONG_S = 600.0
_WHOLE_S = 1800.0


class State:
    """What all runs reached so far, in a file that is replaced as a whole."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "state.json"
        self.data: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {"campaigns": {}}

    def of(self, id: str) -> dict[str, Any]:
        empty = {
            "reached": 0,
            "whole": None,
            "complete": 0,
            "runs": 0,
            "seconds": 0.0,
            "failures": [],
            "notes": [],
            "counts": {},
        }
        found: dict[str, Any] = self.data["campaigns"].setdefault(id, empty)
        return found

    def add(self, campaign: Campaign, seed: int, seconds: float, result: dict[str, Any]) -> None:
        mine = self.of(campaign.id)
        reached = result["reached"]
        once = campaign.longest or not campaign.nightly
        mine["reached"] = max(mine["reached"], reached) if once else mine["reached"] + reached
        mine["whole"] = result.get("whole") or mine["whole"]
        mine["complete"] += bool(result.get("whole")) and reached >= result["whole"]
        mine["runs"] += 1
        mine["seconds"] += seconds
        mine["failures"] += [{"seed": seed, "text": f, "kept": result.get("kept", "")} for f in result["failures"]]
        mine["notes"] = sorted({*mine["notes"], *result.get("notes", [])})
        for key, value in result.get("counts", {}).items():
            mine["counts"][key] = mine["counts"].get(key, 0) + value
        self.save()

    def save(self) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1))
        os.replace(new, self._path)


def done(campaign: Campaign, mine: dict[str, Any]) -> bool:
    """Whether the nightly size is reached."""
    if not campaign.nightly:
        return bool(mine["complete"])
    return bool(mine["reached"] >= campaign.nightly)


def table(campaigns: list[Campaign], state: State) -> str:
    """What was reached, as lines of Markdown."""
    rows = [("id", "what", "reached", "target nightly", "failures"), ("---",) * 5]
    for c in campaigns:
        mine = state.of(c.id)
        target = f"{c.nightly:,} {c.unit}" if c.nightly else "all" + (f" ({mine['whole']:,})" if mine["whole"] else "")
        rows.append((c.id, c.what, f"{mine['reached']:,}", target, str(len(mine["failures"]))))
    wide = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(r, wide, strict=True)) + " |" for r in rows]
    minutes = sum(state.of(c.id)["seconds"] for c in campaigns) / 60
    lines.append(f"\n{minutes:.0f} minutes in all runs so far.")
    for c in campaigns:
        lines += [f"{c.id}: {note}" for note in state.of(c.id)["notes"]]
    return "\n".join(lines)


class Teller:
    """Prints at most one line every ten seconds, and every failure; and a sign of life where a campaign says nothing."""

    def __init__(self, minutes: float) -> None:
        self._begun = self._last = time.monotonic()
        self._minutes = minutes
        self._doing = ""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def __call__(self, text: str) -> None:
        with self._lock:
            self._doing = text
            if time.monotonic() - self._last >= _SAY_EVERY_S or "FAILED" in text:
                self._print(text)

    def _print(self, text: str) -> None:
        self._last = time.monotonic()
        print(f"[{(self._last - self._begun) / 60:5.1f} of {self._minutes:g} min] {text}", flush=True)

    def _live(self) -> None:
        while not self._ended.wait(1):
            with self._lock:
                if self._doing and time.monotonic() - self._last >= _SAY_EVERY_S + 1:
                    self._print(f"{self._doing} …")

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def run_slice(campaign: Campaign, budget_s: float, seed: int, tell: Teller) -> dict[str, Any]:
    try:
        return campaign.run(budget_s, seed, tell)
    except Exception:
        text = traceback.format_exc()
        tell(f"{campaign.id}: FAILED: {text}")
        return {"reached": 0, "failures": [text], "kept": "", "notes": [], "counts": {}}


def run(campaigns: list[Campaign], minutes: float, seed: int, state: State) -> int:
    """Until the time is used. Returns how many slices failed."""
    tell = Teller(minutes)
    until = time.monotonic() + minutes * 60
    slice_s = min(max(minutes * 60 / len(campaigns) / 3, _SLICE_S[0]), _SLICE_S[1])
    failed = 0
    try:
        while (left := until - time.monotonic()) > 1:
            c = min(campaigns, key=lambda c: (done(c, state.of(c.id)), state.of(c.id)["seconds"]))
            budget = slice_s
            if (c.longest or not c.nightly) and not done(c, state.of(c.id)):
                # what counts is one whole run: those that have an end stop there by themselves
                budget = float(c.nightly or _WHOLE_S) if minutes * 60 >= 4 * _LONG_S else 3 * slice_s
            here = random.Random(f"{seed} {c.id} {state.of(c.id)['runs']}").getrandbits(32)
            tell(f"{c.id}: {c.what}, seed {here}")
            start = time.monotonic()
            result = run_slice(c, min(budget, left), here, tell)
            state.add(c, here, time.monotonic() - start, result)
            failed += bool(result["failures"])
    except KeyboardInterrupt:
        print("stopped; what was reached is kept")
    finally:
        tell.end()
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.run", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", default="", help="ids, with commas between them")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--state", type=Path, default=ROOT / ".campaign")
    parser.add_argument(
        "--repeat", default="", metavar="ID:SEED", help="one slice again, with the seed the table names"
    )
    parser.add_argument("--table", action="store_true", help="print what was reached so far, and run nothing")
    args = parser.parse_args(argv)
    unknown = [i for i in args.only.split(",") if i and i not in BY_ID]
    if unknown:
        parser.error(f"no campaign {', '.join(unknown)}; there are {', '.join(BY_ID)}")
    chosen = [c for c in CAMPAIGNS if not args.only or c.id in args.only.split(",")]
    for c in [c for c in chosen if any(map(lacking, c.needs))]:
        print(f"{c.id}: not run: {'; '.join(filter(None, map(lacking, c.needs)))}")
        chosen.remove(c)
    if not chosen:
        return 1
    state = State(args.state)
    if args.table:
        print(table(chosen, state))
        return 0
    if not sys.platform.startswith("linux"):
        parser.error("campaigns need Linux: they use pidfd, mount namespaces and /proc")
    work = args.state / "work"
    os.environ["MIST_CAMPAIGN_DIR"] = str(work.resolve())
    seed = args.seed if args.seed is not None else random.SystemRandom().getrandbits(32)
    if args.repeat:
        id, _, number = args.repeat.partition(":")
        if id not in BY_ID or not number.isdigit():
            parser.error("--repeat wants ID:SEED, as the failures name them")
        tell = Teller(args.minutes)
        result = run_slice(BY_ID[id], args.minutes * 60, int(number), tell)
        tell.end()
        print(json.dumps(result, indent=1))
        return 1 if result["failures"] else 0
    print(f"{args.minutes:g} minutes, {len(chosen)} campaigns, seed {seed}, state in {args.state}", flush=True)
    failed = run(chosen, args.minutes, seed, state)
    print(table(chosen, state))
    for c in chosen:
        for f in state.of(c.id)["failures"]:
            print(
                f"\n{c.id} FAILED with seed {f['seed']}, kept {f['kept'] or 'nothing'}; again: --repeat {c.id}:{f['seed']}\n{f['text']}"
            )
    if work.exists() and not any(work.iterdir()):
        shutil.rmtree(work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
