"""The alerts at work, on a clock that the tests move: saved, appended, delivered, over restarts and failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from mist.errors import Internal, InvalidArgument, NotFound, RateLimited, Refused, StorageFull, TimedOut, Unavailable
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TraceAlert
from mist.testing.clock import FakeClock
from mist.tools.tokentrace.alerts import control, engine
from mist.tools.tokentrace.alerts.rules import Rule
from mist.tools.tokentrace.alerts.service import Alerts
from mist.tools.tokentrace.alerts.webhook import sign, verify
from mist.tools.tokentrace.stats import Metrics
from tests.tools.alerting import HOOK, FakeStore, Receiver, Stream, figures, rule, summary

BAD = [figures(spans=10, errors=9)]
GOOD = [figures(spans=10, errors=1)]
ENV = {"SECRET": "whsec_c2VjcmV0IGtleQ==", "TOKEN": "Bearer abc"}


class Scene:
    """One store, one stream, one receiver; `restart` is a new process on them."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules or (rule(delivery=HOOK),)
        self.store, self.stream, self.receiver, self.clock = FakeStore(), Stream(), Receiver(), FakeClock()
        self.clock.jump_wall(-(self.clock.time_ns() / 1e9 % 30))
        self.said: list[str] = []
        self.restart()

    def restart(self, *rules: Rule) -> None:
        self.rules = rules or self.rules
        self.alerts = Alerts(
            self.store, self.store.measure, self.stream, self.rules, post=self.receiver, clock=self.clock, draw=lambda: 0.0, env=ENV,
            on_event=self.said.append,
        )  # fmt: skip

    async def turn(self, figures: Sequence[Metrics] | None = None, seconds: float = 30) -> None:
        """Time passes, the figures are these, everything due is done."""
        self.clock.advance(seconds)
        if figures is not None:
            self.store.now = list(figures)
        await self.alerts.tick()
        await self.alerts.deliver()

    @property
    def hooks(self) -> list[str]:
        return [json.loads(body)["state"] for _, _, body in self.receiver.got]

    def alert(self, number: int = -1) -> TraceAlert:
        payload: TraceAlert = self.stream.envelopes[number].decode()
        return payload


def scenario(play: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def test() -> None:
        asyncio.run(play())

    test.__name__, test.__doc__ = play.__name__, play.__doc__
    return test


@scenario
async def test_it_fires_as_envelope_and_webhook_and_resolves() -> None:
    """The whole way: a value beyond, one envelope and one webhook; a value back, one resolved each."""
    scene = Scene(rule(delivery={**HOOK, "secret_env": "SECRET", "headers_env": {"Authorization": "TOKEN"}}, env=ENV))
    await scene.turn(GOOD)
    assert scene.stream.said == []
    await scene.turn(BAD)
    await scene.turn(BAD)
    await scene.turn(GOOD)
    assert scene.stream.said == [("firing", "warning"), ("resolved", "warning")]
    fired, resolved = scene.alert(0), scene.alert(1)
    assert fired.message == "error_rate > 0.9 (threshold: 0.5)"
    assert resolved.message == "error_rate <= 0.1 (threshold: 0.5)"
    assert (fired.name, fired.value, fired.threshold, fired.samples, fired.window_s) == ("r", 0.9, 0.5, 10, 60)
    assert fired.dedup_key == resolved.dedup_key != ""
    assert fired.since_ns == resolved.since_ns > 0
    assert scene.stream.envelopes[0].type == "trace.alert"
    assert scene.hooks == ["firing", "resolved"]
    url, headers, body = scene.receiver.got[0]
    assert url == "http://hook.test/a"
    assert headers["Authorization"] == "Bearer abc"
    now_s = int(headers["webhook-timestamp"])
    assert verify(headers, body, ENV["SECRET"], now_s=now_s) == headers["webhook-id"]
    told = json.loads(body)
    assert {k: told[k] for k in ("alert", "metric", "op", "value", "threshold", "window", "span_count", "level")} == {
        "alert": "r", "metric": "error_rate", "op": ">", "value": 0.9, "threshold": 0.5, "window": "1m",
        "span_count": 10, "level": "warning",
    }  # fmt: skip
    assert told["id"] == scene.stream.envelopes[0].id
    facts = scene.alerts.facts()
    assert (facts["fired"], facts["resolved"], facts["webhooks_delivered"], facts["firing"]) == (1, 1, 2, 0)


@scenario
async def test_the_window_ends_at_the_period_and_a_period_is_evaluated_once() -> None:
    """Asked for the last minute up to a multiple of 30 s, however often the loop turns."""
    scene = Scene()
    await scene.turn(GOOD)
    await scene.alerts.tick()
    await scene.turn(seconds=29)
    await scene.turn(seconds=32)
    starts = [(since, until) for _, since, until in scene.store.asked]
    assert [until - since for since, until in starts] == [60_000_000_000] * 2
    assert all(until % 30_000_000_000 == 0 for _, until in starts)
    assert starts[1][1] - starts[0][1] == 60_000_000_000


@scenario
async def test_it_is_silent_while_silenced_and_speaks_afterwards() -> None:
    """By API, in another process's hands, over a restart; the rule's own silence works the same."""
    scene = Scene()
    until = control.silence(scene.store, scene.rules, "r", 100, now_ns=scene.clock.time_ns())
    await scene.turn(BAD)
    scene.restart()
    await scene.turn(BAD)
    assert (scene.stream.said, scene.hooks) == ([], [])
    assert control.status(scene.store, scene.rules, "r", now_ns=scene.clock.time_ns()).silenced_until_ns == until
    await scene.turn(BAD, seconds=60)
    assert scene.stream.said == [("firing", "warning")]
    control.silence(scene.store, scene.rules, "r", 3600, now_ns=scene.clock.time_ns())
    await scene.turn(GOOD)
    assert scene.stream.said[1:] == [("resolved", "warning")]
    await scene.turn(BAD)
    assert control.silence(scene.store, scene.rules, "r", 0, now_ns=scene.clock.time_ns()) == 0
    assert len(scene.stream.said) == 2
    await scene.turn(BAD)
    assert len(scene.stream.said) == 3


@scenario
async def test_a_restart_neither_fires_again_nor_forgets() -> None:
    """Firing before, firing after: said once. Resolved after: said."""
    scene = Scene()
    await scene.turn(BAD)
    scene.restart()
    await scene.alerts.tick()
    await scene.turn(BAD)
    scene.restart()
    await scene.turn(GOOD)
    assert scene.stream.said == [("firing", "warning"), ("resolved", "warning")]
    assert scene.hooks == ["firing", "resolved"]


@scenario
async def test_a_crash_between_append_and_save_says_it_once() -> None:
    """The envelope is appended again with the same id and bytes; the stream keeps one."""
    scene = Scene()
    scene.clock.advance(30)
    scene.store.now = BAD
    save, saves = scene.store.save, []

    def crash_at_the_second(name: str, data: bytes) -> None:
        saves.append(name)
        if len(saves) == 2:
            raise Internal("killed here")
        save(name, data)

    scene.store.save = crash_at_the_second  # type: ignore[method-assign]
    with pytest.raises(Internal):
        await scene.alerts.tick()
    assert scene.stream.said == [("firing", "warning")]
    first = scene.stream.envelopes[0]
    scene.store.save = save  # type: ignore[method-assign]
    scene.restart()
    appended = []
    scene.alerts._append = lambda envelopes: _also(appended, scene.stream, envelopes)
    await scene.turn(GOOD)
    assert appended[0] == first
    assert scene.stream.said == [("firing", "warning"), ("resolved", "warning")]
    assert scene.hooks == ["firing", "resolved"]


async def _also(appended: list[Any], stream: Stream, envelopes: list[Any]) -> None:
    appended.extend(envelopes)
    await stream(envelopes)


@scenario
async def test_a_stream_that_is_away_delays_envelopes_and_not_webhooks() -> None:
    """The decision is saved; the webhook of the saved decision goes; the envelope goes when the stream is back."""
    scene = Scene()
    scene.stream.fail = Unavailable("away")
    scene.clock.advance(30)
    scene.store.now = BAD
    with pytest.raises(Unavailable):
        await scene.alerts.tick()
    await scene.alerts.deliver()
    assert scene.hooks == ["firing"]
    scene.clock.advance(30)
    scene.store.now = GOOD
    with pytest.raises(Unavailable):
        await scene.alerts.tick()
    await scene.alerts.deliver()
    assert scene.hooks == ["firing", "resolved"]
    scene.restart()
    scene.stream.fail = None
    await scene.turn(GOOD)
    assert scene.stream.said == [("firing", "warning"), ("resolved", "warning")]
    assert scene.hooks == ["firing", "resolved"]


@scenario
async def test_no_more_is_decided_than_can_wait() -> None:
    """With a thousand envelopes waiting for their stream, rules wait too, and go on when it is back."""
    scene = Scene()
    scene.stream.fail = Unavailable("away")
    waiting = [Envelope.new("trace.alert", {}, source="s") for _ in range(engine.UNSENT_MAX)]
    scene.store.save(engine.STATE, engine.encode(engine.Saved(unsent=waiting)))
    scene.clock.advance(30)
    scene.store.now = BAD
    with pytest.raises(Unavailable):
        await scene.alerts.tick()
    assert scene.store.asked == []
    scene.stream.fail = None
    await scene.turn(BAD)
    await scene.turn(BAD)
    assert scene.alert().name == "r"
    assert len(scene.stream.envelopes) == engine.UNSENT_MAX + 1


@scenario
async def test_a_store_that_refuses_leaves_nothing_half_done() -> None:
    """Nothing is said that could not be saved."""
    scene = Scene()
    scene.clock.advance(30)
    scene.store.now = BAD
    save = scene.store.save

    def refuse(name: str, data: bytes) -> None:
        raise StorageFull("no room")

    scene.store.save = refuse  # type: ignore[method-assign]
    with pytest.raises(StorageFull):
        await scene.alerts.tick()
    assert (scene.stream.said, scene.hooks) == ([], [])
    scene.store.save = save  # type: ignore[method-assign]
    await scene.turn(BAD, seconds=0)
    assert scene.stream.said == [("firing", "warning")]


@scenario
async def test_webhooks_are_tried_again_in_order_and_over_restarts() -> None:
    """Away twice: waits grow; the resolved waits behind its firing; a restart forgets neither."""
    scene = Scene()
    scene.receiver.answers = [Unavailable("away"), TimedOut("slow")]
    await scene.turn(BAD)
    await scene.turn(GOOD, seconds=30)
    assert scene.hooks == []
    assert scene.alerts.facts()["webhooks_waiting"] == 2
    scene.restart()
    await scene.turn(GOOD)
    assert scene.hooks == ["firing", "resolved"]
    assert scene.alerts.facts()["webhooks_waiting"] == 0


@scenario
async def test_retry_after_is_obeyed_up_to_an_hour() -> None:
    """A receiver that asks for 90 seconds gets them; one that asks for a year does not."""
    scene = Scene()
    scene.receiver.answers = [RateLimited("slow down", retry_after_s=90), RateLimited("x", retry_after_s=1e9)]
    await scene.turn(BAD)
    await scene.turn(seconds=60)
    assert len(scene.receiver.answers) == 1
    await scene.turn(seconds=60)
    assert scene.receiver.answers == []
    await scene.turn(seconds=3500)
    assert scene.hooks == []
    await scene.turn(seconds=101)
    assert scene.hooks == ["firing"]


@scenario
async def test_a_refusal_for_good_is_given_up_and_counted() -> None:
    """403 once: gone, said, counted; the next one is delivered."""
    scene = Scene()
    scene.receiver.answers = [Refused("403")]
    await scene.turn(BAD)
    await scene.turn(GOOD)
    assert scene.hooks == ["resolved"]
    assert scene.alerts.facts()["webhooks_failed"] == 1
    assert "given up after 1 attempt" in scene.said[0]


@scenario
async def test_a_receiver_that_never_answers_is_given_up_after_thirty_attempts() -> None:
    """The outbox does not grow old for ever."""
    scene = Scene()
    scene.receiver.answers = [Unavailable("away")] * 30
    await scene.turn(BAD)
    for _ in range(40):
        await scene.turn(BAD, seconds=400)
    assert scene.receiver.answers == []
    assert (scene.alerts.delivery_failed, scene.alerts.delivery_retried) == (1, 29)
    assert scene.alerts.facts()["webhooks_waiting"] == 0


@scenario
async def test_one_dead_target_does_not_hold_up_another() -> None:
    """Each target has its own queue."""
    scene = Scene(rule(delivery=[{"url": "http://dead.test"}, {"url": "http://live.test"}]))
    inner = scene.receiver

    async def post(url: str, headers: Any, body: bytes, timeout_s: float) -> None:
        if "dead" in url:
            raise Unavailable("dead")
        await inner(url, headers, body, timeout_s)

    scene.alerts._post = post
    await scene.turn(BAD)
    await scene.turn(GOOD)
    assert scene.hooks == ["firing", "resolved"]
    assert scene.alerts.facts()["webhooks_waiting"] == 2


@scenario
async def test_the_outbox_is_bounded() -> None:
    """Beyond the bound the oldest go, counted."""
    scene = Scene()
    scene.receiver.answers = [Unavailable("away")] * 100_000
    key = engine.target_key(scene.rules[0].targets[0])
    webhooks = [engine.Webhook(id=str(n), rule="r", target=key, body="{}") for n in range(engine.OUTBOX_MAX)]
    scene.store.save(engine.STATE, engine.encode(engine.Saved(outbox=webhooks)))
    await scene.turn(BAD)
    saved = engine.decode(scene.store.load(engine.STATE))
    assert len(saved.outbox) == engine.OUTBOX_MAX
    assert scene.alerts.told.webhooks_dropped == 1


@scenario
async def test_groups_have_their_own_states() -> None:
    """One model fires, the other does not; a model without spans is forgotten, a firing one is resolved first."""
    scene = Scene(rule(group_by=["model"], no_data="ok"))
    bad, good = figures(group={"model": "m1"}, spans=4, errors=4), figures(group={"model": "m2"}, spans=4)
    await scene.turn([bad, good])
    assert [(a.group, a.state) for a in map(scene.alert, range(1))] == [({"model": "m1"}, "firing")]
    (status,) = control.list_alerts(scene.store, scene.rules, now_ns=scene.clock.time_ns())
    assert [(g.group, g.state) for g in status.groups] == [({"model": "m1"}, "firing"), ({"model": "m2"}, "ok")]
    assert status.state == "firing"
    await scene.turn([])
    assert scene.alert().message == "error_rate: no data for 1m (threshold: 0.5)"
    assert scene.alert().value is None
    (status,) = control.list_alerts(scene.store, scene.rules, now_ns=scene.clock.time_ns())
    assert (status.groups, status.state) == ([], "ok")


@scenario
async def test_a_group_that_disappears_counts_zero_spans() -> None:
    """`span_count < 1` by model: known once, missed later. Nobody can miss what was never seen."""
    scene = Scene(rule(metric="span_count", op="<", threshold=1, group_by=["model"]))
    await scene.turn([])
    await scene.turn([figures(group={"model": "m1"}, spans=4)])
    assert scene.stream.said == []
    await scene.turn([])
    await scene.turn([figures(group={"model": "m1"}, spans=1)])
    assert scene.stream.said == [("firing", "warning"), ("resolved", "warning")]
    assert scene.alert(0).value == 0


@scenario
async def test_groups_are_bounded() -> None:
    """A thousand groups, the largest first; the rest is counted."""
    scene = Scene(rule(group_by=["model"], no_data="alert"))
    await scene.turn([figures(group={"model": f"m{n}"}, spans=n + 1) for n in range(engine.GROUPS_MAX + 3)])
    (status,) = control.list_alerts(scene.store, scene.rules, now_ns=scene.clock.time_ns())
    assert len(status.groups) == engine.GROUPS_MAX
    assert {"model": "m0"} not in [g.group for g in status.groups]
    assert scene.alerts.told.groups_over == 3


@scenario
async def test_cost_is_of_the_window_and_unknown_is_no_data() -> None:
    """Spans without a known cost do not resolve an alert with `keep`; and never count as free."""
    scene = Scene(rule(metric="total_cost_usd", threshold=1, no_data="keep"))
    await scene.turn([figures(spans=5, cost_usd=summary(known=5, total=2.0))])
    await scene.turn([figures(spans=5)])
    assert scene.stream.said == [("firing", "warning")]
    cheap = Scene(rule(metric="total_cost_usd", op="<", threshold=1))
    await cheap.turn([figures(spans=5)])
    assert cheap.stream.said == []


@scenario
async def test_a_rule_that_is_gone_is_resolved() -> None:
    """Taken out of the file, or deleted by API: the episode ends, also for webhooks where the rule is still known."""
    for deleted in (False, True):
        scene = Scene(rule(), rule(name="other"))
        await scene.turn(BAD)
        if deleted:
            control.delete(scene.store, scene.rules, "r")
        else:
            scene.restart(scene.rules[1])
        await scene.turn(BAD)
        assert scene.stream.said == [("firing", "warning")] * 2 + [("resolved", "warning")]
        assert (scene.alert().name, scene.alert().message) == ("r", "error_rate: the alert is no more (threshold: 0.5)")
        names = [s.name for s in control.list_alerts(scene.store, scene.rules, now_ns=0)]
        assert names == ["other"]
        with pytest.raises(NotFound):
            control.status(scene.store, scene.rules, "r", now_ns=0)
    scene.restart(rule(threshold=0.6), scene.rules[1])
    await scene.turn(BAD)
    assert scene.stream.said[-1] == ("firing", "warning")


@scenario
async def test_a_rule_that_cannot_be_measured_does_not_stop_the_others() -> None:
    """Too many groups for the store: said and counted, the next rule is evaluated."""
    scene = Scene(rule(), rule(name="other"))
    measure = scene.store.measure

    def refuse(asked: Rule, since_ns: int, until_ns: int) -> Sequence[Metrics]:
        if asked.name == "r":
            raise InvalidArgument("more than 10000 groups")
        return measure(asked, since_ns, until_ns)

    scene.alerts._measure = refuse
    await scene.turn(BAD)
    assert [scene.alert(n).name for n in range(len(scene.stream.said))] == ["other"]
    assert scene.alerts.facts()["failed"] == 1
    assert "alert 'r': cannot be measured" in scene.said[0]


@scenario
async def test_another_group_by_ends_the_old_groups() -> None:
    """They cannot come back; their resolved names them as they were."""
    scene = Scene(rule(group_by=["model"]))
    await scene.turn([figures(group={"model": "m1"}, spans=4, errors=4)])
    scene.restart(rule(group_by=["provider"]))
    await scene.turn([figures(group={"provider": "p1"}, spans=4)])
    assert scene.stream.said == [("firing", "warning"), ("resolved", "warning")]
    assert scene.alert().group == {"model": "m1"}


@scenario
async def test_a_state_that_cannot_be_read_is_an_error_and_not_a_fresh_start() -> None:
    """Forgetting would fire everything again."""
    for data in (b"[]", b'{"version":2}'):
        scene = Scene()
        scene.store.states[engine.STATE] = data
        with pytest.raises(Internal, match="saved state of the alerts"):
            await scene.turn(BAD)


@scenario
async def test_silences_have_limits() -> None:
    """Unknown alert, a negative time, more than a year."""
    scene = Scene()
    with pytest.raises(NotFound, match="no alert 'x'"):
        control.silence(scene.store, scene.rules, "x", 1, now_ns=0)
    for seconds in (-1.0, control.SILENCE_S_MAX + 1, float("nan")):
        with pytest.raises(InvalidArgument):
            control.silence(scene.store, scene.rules, "r", seconds, now_ns=0)


@scenario
async def test_the_loop_waits_out_what_is_worth_it_and_raises_the_rest() -> None:
    """Unavailable costs a period; an error for good ends the service."""
    store, stop = FakeStore(), asyncio.Event()
    store.fail = Unavailable("locked")
    said: list[str] = []

    def hear(text: str) -> None:
        said.append(text)
        store.fail = None if len(said) == 1 else store.fail
        if len(said) == 1:
            asyncio.get_running_loop().call_soon(stop.set)

    def alerts() -> Alerts:
        return Alerts(store, store.measure, Stream(), [rule()], on_event=hear)

    await alerts().run(stop)
    assert "locked; trying again" in said[0]
    store.fail = Internal("broken")
    with pytest.raises(Internal, match="broken"):
        await alerts().run(asyncio.Event())


def test_a_signature_is_checked_with_its_time() -> None:
    """Genuine and fresh passes; another body, secret, id, a replay after the tolerance do not."""
    body, headers = b'{"a":1}', {"Webhook-Id": "i", "Webhook-Timestamp": "1000"}
    headers["Webhook-Signature"] = f"v1,b3RoZXI= {sign('i', 1000, body, 'k')}"
    assert verify(headers, body, "k", now_s=1300) == "i"
    for changed, data, secret, now in (
        ({}, b'{"a":2}', "k", 1000), ({}, body, "K", 1000), ({}, body, "k", 1301), ({}, body, "k", 699),
        ({"Webhook-Id": "j"}, body, "k", 1000), ({"Webhook-Timestamp": "1001"}, body, "k", 1000),
        ({"Webhook-Signature": ""}, body, "k", 1000), ({"Webhook-Timestamp": ""}, body, "k", 1000),
    ):  # fmt: skip
        with pytest.raises(Refused):
            verify({**headers, **changed}, data, secret, now_s=now)


def test_a_signature_is_the_specifications() -> None:
    """The example of the Standard Webhooks specification's own kind: base64 secret, id.timestamp.body."""
    import base64
    import hashlib
    import hmac

    key = b"secret key"
    expected = base64.b64encode(hmac.new(key, b"msg_1.1674087231.{}", hashlib.sha256).digest()).decode()
    assert sign("msg_1", 1674087231, b"{}", "whsec_" + base64.b64encode(key).decode()) == f"v1,{expected}"
    with pytest.raises(InvalidArgument):
        sign("i", 1, b"", "whsec_***")
