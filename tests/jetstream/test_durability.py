"""What `info` states is what the server does; what cannot be given or confirmed is refused."""

from __future__ import annotations

import secrets

import pytest

import mist
from mist.broker.base import StreamConfig, StreamInfo
from mist.errors import Conflict, InvalidArgument
from mist.kit.local import NatsServer, free_port
from mist.testing.servers import run_nats
from tests.conftest import run
from tests.jetstream.server import shared_url


async def made(url: str, config: StreamConfig | None = None, name: str = "") -> StreamInfo:
    name = name or f"dur-{secrets.token_hex(4)}"
    async with mist.connect(url) as broker:
        return await (await broker.open(name, config=config)).info()


def test_a_server_with_the_usual_settings_gives_process() -> None:
    """And says what a power cut may take; `power` is refused, unless the operator vouches for it, which is told."""
    with run_nats(own_process=True, sync_interval="90s") as server:
        assert isinstance(server, NatsServer)
        info = run(made(server.url))
        assert info.durability == info.config.durability == "process"
        assert "90 s" in info.warnings[0]
        assert "sync_interval: always" in info.warnings[0]
        with pytest.raises(InvalidArgument, match="'power'"):
            run(made(server.url, StreamConfig(durability="power")))
        unasked = f"nats://127.0.0.1:{server.port}?monitor={free_port()}"
        info = run(made(unasked))
        assert info.durability == "process"
        assert "monitoring endpoint does not answer" in info.warnings[0]
        info = run(made(f"{unasked}&sync=always", StreamConfig(durability="power")))
        assert info.durability == "power"
        assert "operator's word" in info.warnings[0]
        # the server's own word counts more than the operator's
        with pytest.raises(InvalidArgument):
            run(made(f"{server.url}&sync=always", StreamConfig(durability="power")))
        # another server's endpoint says nothing about this one
        other = shared_url().partition("monitor=")[2]
        info = run(made(f"nats://127.0.0.1:{server.port}?monitor={other}"))
        assert (info.durability, "is another server's" in info.warnings[0]) == ("process", True)


def test_a_server_that_syncs_always_gives_power() -> None:
    """Without a warning; less may be asked for, more may not."""
    info = run(made(shared_url()))
    assert (info.durability, info.warnings) == ("power", ())
    for level in ("memory", "process", "power"):
        assert run(made(shared_url(), StreamConfig(durability=level))).durability == level  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="replicas"):
        run(made(shared_url(), StreamConfig(durability="replicated")))
    name = f"dur-{secrets.token_hex(4)}"
    run(made(shared_url(), StreamConfig(durability="process"), name))
    with pytest.raises(Conflict):
        run(made(shared_url(), StreamConfig(durability="power"), name))


def test_a_stream_whose_server_was_configured_anew_says_so() -> None:
    """Made with `power`, now on a server that does not sync always: `process`, and why."""
    with run_nats(own_process=True) as server:
        assert isinstance(server, NatsServer)
        assert run(made(server.url, name="s")).durability == "power"
        config = server.directory / "nats.conf"
        config.write_text(config.read_text().replace("sync_interval: always", "sync_interval: 60s"))
        server.restart()
        info = run(made(server.url, name="s"))
        assert info.durability == info.config.durability == "process"
        assert any("made with durability power" in w for w in info.warnings)


@pytest.mark.parametrize(
    "config",
    [
        StreamConfig(dedupe_ids_max=8), StreamConfig(dedupe_window_s=0.01), StreamConfig(age_s_max=0.01),
        StreamConfig(age_s_max=10, dedupe_window_s=60),
    ],
)  # fmt: skip
def test_settings_that_jetstream_cannot_give(config: StreamConfig) -> None:
    with pytest.raises(InvalidArgument):
        run(made(shared_url(), config))


def test_the_window_is_not_longer_than_the_age() -> None:
    """The default is cut to it, because JetStream refuses the contradiction; no window is no window."""
    assert run(made(shared_url(), StreamConfig(age_s_max=10))).config.dedupe_window_s == 10
    assert run(made(shared_url(), StreamConfig(dedupe_window_s=0))).config.dedupe_window_s == 0
