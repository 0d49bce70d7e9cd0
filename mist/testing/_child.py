"""What a child process of the conformance suite does: connect by URL, one action, one JSON answer on standard output.

Lies outside of the suite, whose package imports pytest, so that a child starts fast. Run by conformance/sharing.py.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import mist
from mist.broker.base import Broker, Checkpoint, Message
from mist.errors import CheckpointRegression, WrongSequence


def say(text: Any) -> None:
    sys.stdout.write(json.dumps(text) + "\n")
    sys.stdout.flush()


async def save_all(broker: Broker, stream: str, incarnation: str, sequences: list[int]) -> None:
    """Save these positions in order; being too late for one is fine."""
    for sequence in sequences:
        try:
            await broker.checkpoints.save(
                Checkpoint(stream=stream, name="c", incarnation=incarnation, sequence=sequence)
            )
        except CheckpointRegression:
            continue


async def act(broker: Broker, action: str, a: dict[str, Any]) -> Any:
    """Do one action and give its answer."""
    stream = await broker.open(a["stream"], create=False)
    if action == "append":
        sequences: list[int] = []
        for batch in range(a["batches"]):
            numbers = range(batch * a["size"], (batch + 1) * a["size"])
            sequences += await stream.append(
                [Message(a["subject"], b"%d" % n, f"{a['ids']}{n}" if a["ids"] else "") for n in numbers]
            )
        return sequences
    if action == "read":
        reading = asyncio.create_task(stream.read(after=a["after"], wait_s=a["wait_s"]))
        await asyncio.sleep(0.05)
        say("ready")
        return [r.data.decode() for r in (await reading).records]
    if action == "count":
        won = 0
        while won < a["steps"]:
            last = (await stream.info()).last
            try:
                await stream.append([Message("count", b"")], expected_last=last)
                won += 1
            except WrongSequence:
                continue
        return won
    if action == "save":
        await save_all(broker, a["stream"], a["incarnation"], a["sequences"])
        return None
    consumer = await stream.consumer(a["consumer"], create=False)
    if action == "hold":
        held = await consumer.fetch(limit=a["limit"], wait_s=20)
        while len(held) < a["limit"]:
            held += await consumer.fetch(limit=a["limit"] - len(held), wait_s=20)
        say("ready")
        await asyncio.sleep(600)
        return None
    if action == "consume":
        say("ready")
        seen: list[int] = []
        while True:
            got = await consumer.fetch(limit=a["limit"], wait_s=20)
            stops = [d for d in got if d.record.subject == "stop"]
            seen += [d.record.sequence for d in got if d.record.subject != "stop"]
            if await consumer.ack([d for d in got if d not in stops]) != len(got) - len(stops):
                raise RuntimeError("a delivery was not ours any more")
            if stops:
                await consumer.ack(stops[:1])
                await consumer.nak(stops[1:])  # one each: the others are for the other processes
                return seen
    raise ValueError(action)


async def run(a: dict[str, Any]) -> Any:
    async with mist.connect(a["url"]) as broker:
        return await act(broker, a["action"], a)


def main() -> None:
    say(asyncio.run(run(json.loads(sys.argv[1]))))
