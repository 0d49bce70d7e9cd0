"""What we rely on in nats-py, by name: when it changes, this says what."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from importlib.metadata import version

import nats.aio.client
import pytest

from mist_nats.link import RELIED_ON, VERSIONS, Link, Socket, version_of
from tests.conftest import run


@pytest.mark.parametrize("place", sorted(RELIED_ON))
def test_what_we_use_of_nats_py_is_there(place: str) -> None:
    """Every attribute, public or private, that link.py uses."""
    module, _, name = place.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    there = {*dir(cls), *vars(cls() if name == "Client" else cls)}
    missing = [n for n in RELIED_ON[place] if n not in there]
    assert not missing, f"nats-py {version('nats-py')}: {place} has no {', '.join(missing)} any more"


def test_the_version_is_one_that_was_checked() -> None:
    """A new minor version of nats-py is looked at before it is trusted: then this range moves."""
    at = version_of(version("nats-py"))
    assert VERSIONS[0] <= at < VERSIONS[1], f"nats-py {at} was never checked with mist_nats.link"


def test_our_transport_is_a_whole_one() -> None:
    """It implements every method that nats-py's transport declares."""

    async def made() -> Socket:
        return Link("x", "y").socket

    socket = run(made())
    assert not getattr(type(socket), "__abstractmethods__", None)


def test_nats_py_takes_a_transport_that_is_there() -> None:
    """It makes one of its own only when it has none; and its handshake reads lines, then PONG."""
    source = inspect.getsource(nats.aio.client.Client._connect_to_server)
    assert "if not self._transport" in source, "nats-py chooses its transport in another way now"
    handshake = inspect.getsource(nats.aio.client.Client._process_connect_init)
    assert handshake.count("self._transport.readline()") >= 2, "nats-py's handshake reads in another way now"
    assert "self._transport.read(" in inspect.getsource(nats.aio.client.Client._read_loop)


def test_a_connection_belongs_to_its_loop() -> None:
    """Making a link outside a loop is a mistake of ours, and says so at once."""
    with pytest.raises(RuntimeError):
        Link("x", "y")
    assert asyncio.iscoroutinefunction(nats.aio.client.Client.connect)
