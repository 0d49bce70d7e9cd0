"""The model of the contract over a real server, with connecting again in between."""

from __future__ import annotations

import os

from hypothesis import settings

import mist
from mist.broker.base import Broker
from mist.testing.statemachine import state_machine
from tests.jetstream.server import shared_url


async def connect() -> Broker:
    return await mist.connect(shared_url())


TestNatsModel = state_machine(connect, connect).TestCase
# the campaign C18 runs thousands; every example here makes and deletes a stream and its consumers on a server
TestNatsModel.settings = settings(TestNatsModel.settings, max_examples=int(os.environ.get("MIST_EXAMPLES", "20")))
