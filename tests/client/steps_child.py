"""A job of many steps: `python steps_child.py URL RUN JOURNAL COUNT LEASE_S STOP_AT`. It notes in JOURNAL what it did and what it
was told, each line before anything else happens, so that a judge can compare after kills."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import mist
from mist.client.steps import Run
from mist.errors import MistError

URL, NAME, JOURNAL = sys.argv[1:4]
COUNT, LEASE_S, STOP_AT = int(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6])
journal = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(what: str, n: int) -> None:
    os.write(journal, f"{what} {n}\n".encode())


async def main() -> None:
    async with mist.connect(URL) as broker, Run.open(broker, NAME, lease_s=LEASE_S, wait_s=60.0) as run:
        note("open", os.getpid())
        for n in range(COUNT):

            async def work(n: int = n) -> dict[str, int]:
                note("began", n)
                if n == STOP_AT:
                    os.kill(os.getpid(), signal.SIGSTOP)  # in a step nothing is being written
                await asyncio.sleep(0.001)
                return {"n": n, "big": 2**53 + n}

            if n % 2:
                got = await run.step(f"step {n}", work, type=dict[str, int])
            else:
                async with run.step(f"step {n}", type=dict[str, int]) as step:
                    if not step.done:
                        step.result = await work()
                got = step.result
            assert got == {"n": n, "big": 2**53 + n}
            note("told", n)
        note("finished", COUNT)


try:
    asyncio.run(main())
except MistError as exc:
    sys.stderr.write(f"{exc}\n")
    sys.exit(exc.exit_code)
