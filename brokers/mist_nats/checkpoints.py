"""Checkpoints in the key-value bucket `mist_checkpoints`: one key per position, `<stream>.<name>`, saved by
compare-and-set on the key's revision, so that of two savers the later position stays.

Any KV client reads it (`nats kv get mist_checkpoints trace.worker`). Values are asked of the stream's leader.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from mist.broker.base import Checkpoint, Checkpoints
from mist.broker.checkpoint import check_advance, check_key, check_save
from mist.errors import Locked, Unavailable
from mist.protocol.subject import check_stream
from mist_nats import api as js
from mist_nats import wire
from mist_nats.api import ApiError, translated
from mist_nats.link import CALL_S, Lost
from mist_nats.names import BUCKET

if TYPE_CHECKING:
    from mist_nats.broker import NatsBroker

STREAM = f"KV_{BUCKET}"
PREFIX = f"$KV.{BUCKET}."
TRIES = 64
"""Savers of one name that may be faster, one after another, before a save gives up."""
AT_ONCE = 64


class _Value(Struct):
    incarnation: str
    sequence: int
    time_ns: int = 0


class NatsCheckpoints(Checkpoints):
    def __init__(self, broker: NatsBroker) -> None:
        self._broker = broker
        self._made = False

    async def save(self, checkpoint: Checkpoint, *, force: bool = False) -> Checkpoint:
        self._broker.check_open()
        check_save(checkpoint)
        api = self._broker.api
        key = f"{checkpoint.stream}.{checkpoint.name}"
        for _ in range(TRIES):
            if not self._made:
                await self._make()
            stored, revision = await self._get(checkpoint.stream, checkpoint.name)
            if stored is not None and not force:
                check_advance(stored, checkpoint)
            saved = replace(checkpoint, time_ns=self._broker.clock.time_ns())
            value = msgspec.json.encode(_Value(saved.incarnation, saved.sequence, saved.time_ns))
            lines = b"Nats-Expected-Last-Subject-Sequence: %d\r\n" % revision
            subject = (PREFIX + key).encode()
            loop = asyncio.get_running_loop()
            try:
                frame = await api.link.request(
                    lambda reply, s=subject, li=lines, v=value: wire.hpub(s, li, v, reply),  # type: ignore[misc]
                    loop.time() + CALL_S,
                )
            except (TimeoutError, Lost) as exc:
                self._broker.check_open()
                # the same position again is fine, so that the caller may repeat it
                raise Unavailable(f"saving checkpoint {key}: {exc or 'no answer in time'}") from exc
            if wire.status(frame[2]) == 503:
                self._made = False
                continue
            ack = js.ack_of(frame[3])
            if ack.error is None:
                return saved
            if ack.error.err_code not in js.WRONG_LAST:
                raise translated(
                    ApiError(ack.error.code, ack.error.err_code, ack.error.description), f"saving checkpoint {key}"
                )
        raise Locked(f"saving checkpoint {key}: {TRIES} other savers were faster")

    async def load(self, stream: str, name: str) -> Checkpoint | None:
        self._broker.check_open()
        check_key(stream, name)
        return (await self._get(stream, name))[0]

    async def delete(self, stream: str, name: str) -> bool:
        self._broker.check_open()
        check_key(stream, name)
        found, _ = await self._get(stream, name)
        return await self._purge(f"{stream}.{name}") > 0 and found is not None

    async def list(self, stream: str = "") -> list[Checkpoint]:
        self._broker.check_open()
        if stream:
            check_stream(stream)
        keys: list[tuple[str, str]] = []
        seen = 0
        while True:
            try:
                info = await self._broker.api.call(
                    f"STREAM.INFO.{STREAM}",
                    {"subjects_filter": f"{PREFIX}{stream or '*'}.*", "offset": seen}, js.StreamInfo,
                )  # fmt: skip
            except ApiError as exc:
                if exc.err_code == js.STREAM_NOT_FOUND:
                    return []
                raise translated(exc, "listing checkpoints") from exc
            seen += len(info.state.subjects)
            keys += [(p[0], p[2]) for s in info.state.subjects if (p := s.removeprefix(PREFIX).partition("."))[2]]
            if len(info.state.subjects) < 100_000:
                break
        out: list[Checkpoint] = []
        for start in range(0, len(keys), AT_ONCE):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._get(s, n)) for s, n in keys[start : start + AT_ONCE]]
            out += [c for t in tasks if (c := t.result()[0]) is not None]
        return sorted(out, key=lambda c: (c.stream, c.name))

    async def forget(self, stream: str) -> None:
        """Remove all of one stream's."""
        await self._purge(f"{stream}.>")

    async def _purge(self, key: str) -> int:
        try:
            done = await self._broker.api.call(f"STREAM.PURGE.{STREAM}", {"filter": PREFIX + key}, js.Purged)
        except ApiError as exc:
            if exc.err_code == js.STREAM_NOT_FOUND:
                return 0
            raise translated(exc, f"deleting checkpoint {key}") from exc
        return done.purged

    async def _get(self, stream: str, name: str) -> tuple[Checkpoint | None, int]:
        """The stored one, and the key's revision (0: none)."""
        try:
            got = await self._broker.api.call(
                f"STREAM.MSG.GET.{STREAM}", {"last_by_subj": f"{PREFIX}{stream}.{name}"}, js.Got
            )
        except ApiError as exc:
            if exc.code == 404:
                return None, 0
            raise translated(exc, f"loading checkpoint {name} of {stream}") from exc
        message = got.message
        if b"KV-Operation: " in message.hdrs:  # deleted by a KV client
            return None, message.seq
        try:
            value = msgspec.json.decode(message.data, type=_Value)
        except msgspec.MsgspecError:
            return None, message.seq  # not ours: a save replaces it
        return Checkpoint(
            stream=stream, name=name, incarnation=value.incarnation, sequence=value.sequence, time_ns=value.time_ns
        ), message.seq

    async def _make(self) -> None:
        """The bucket, when it is not there."""
        api = self._broker.api
        replicas = self._broker.options.replicas or 1
        body = {
            "name": STREAM, "subjects": [f"{PREFIX}>"], "storage": "file", "num_replicas": replicas,
            "max_msgs_per_subject": 1, "discard": "new", "allow_rollup_hdrs": True, "deny_delete": True,
            "allow_direct": True, "max_msgs": -1, "max_bytes": -1, "max_age": 0,
            "duplicate_window": 120_000_000_000, "description": "positions of mist readers",
        }  # fmt: skip
        try:
            await api.call(f"STREAM.INFO.{STREAM}")
        except ApiError as exc:
            if exc.err_code != js.STREAM_NOT_FOUND:
                raise translated(exc, "the bucket of checkpoints") from exc
            try:
                await api.call(f"STREAM.CREATE.{STREAM}", body)
            except ApiError as other:
                if other.err_code != js.STREAM_EXISTS:
                    raise translated(other, "making the bucket of checkpoints") from other
        self._made = True
