"""The model of the contract over a real server, with connecting again in between."""

from __future__ import annotations

import mist
from mist.broker.base import Broker
from mist.testing.statemachine import state_machine
from tests.jetstream.server import shared_url


async def connect() -> Broker:
    return await mist.connect(shared_url())


TestNatsModel = state_machine(connect, connect).TestCase
