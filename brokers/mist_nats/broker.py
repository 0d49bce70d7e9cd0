"""One connection to NATS JetStream: opens, lists and deletes streams, and knows what their settings come to here."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Collection

import msgspec
from msgspec.structs import replace

from mist.broker.base import DEFAULTS, Broker, Capabilities, Durability, Fact, StreamConfig
from mist.broker.clock import SYSTEM, Clock
from mist.errors import Closed, InvalidArgument, NotFound, TimedOut, Unavailable
from mist.protocol.subject import check_stream
from mist.protocol.url import Url
from mist_nats import api as js
from mist_nats import wire
from mist_nats.api import Api, ApiError, translated
from mist_nats.checkpoints import NatsCheckpoints
from mist_nats.consumer import Deliveries
from mist_nats.durability import HOW, Sync, process_warning, server_facts, sync_fact, sync_of
from mist_nats.link import CALL_S, Link
from mist_nats.names import FORMAT, META, META_CONFIG, META_INCARNATION, candidates, prefix, shown
from mist_nats.publish import Window
from mist_nats.stream import NatsStream, Shared
from mist_nats.url import Options
from mist_nats.wire import Frame

CAPABILITIES = Capabilities(persistent=True, processes=True, threads=True, pending=False, erase=True, verify=False)
AGE_S_MIN = 0.1
"""JetStream's least max_age and duplicate window."""
REPLICATED = 3
LEVELS: tuple[Durability, ...] = ("memory", "process", "power", "replicated")


class NatsBroker(Broker):
    backend = "nats"
    capabilities = CAPABILITIES

    def __init__(self, url: Url, options: Options, link: Link, clock: Clock = SYSTEM) -> None:
        self.url = url.redacted()
        self.options = options
        self.link = link
        self.clock = clock
        self.api = Api(link, options.domain)
        self.window = Window(link)
        self.sync = Sync(False)
        self.closed = False
        self.shared: dict[str, Shared] = {}
        """Streams that were opened, by the server's name."""
        self.deliveries: dict[tuple[str, str, str], Deliveries] = {}
        self._checkpoints = NatsCheckpoints(self)
        link.subscribe(b"$JS.EVENT.ADVISORY.STREAM.DELETED.*", self._deleted_somewhere)
        link.subscribe(b"$JS.EVENT.ADVISORY.CONSUMER.DELETED.*.*", self._deleted_somewhere)

    def check_open(self) -> None:
        if self.closed:
            raise Closed("the broker is closed")

    def _deleted_somewhere(self, frames: list[Frame]) -> None:
        """Somebody deleted a stream or a consumer: its handles look before their next call."""
        for subject, _, _, _ in frames:
            parts = subject.decode(errors="replace").split(".")
            stream = parts[5] if len(parts) > 5 else ""
            if parts[3] == "STREAM" and stream in self.shared:
                self.shared[stream].doubt = 0
                self.shared[stream].forget()
            for (name, _, consumer), found in list(self.deliveries.items()):
                if name == stream and (len(parts) < 7 or parts[6] == consumer):
                    found.suspect()

    def forget(self, raw: str, sequences: Collection[int]) -> None:
        """Records were erased: nothing of them that this connection read ahead is handed out any more."""
        for (stream, _, _), found in list(self.deliveries.items()):
            if stream == raw:
                found.forget(sequences)

    def wake(self, raw: str) -> None:
        """Records went: fetches that wait because of pending_max ask again (the server does not wake them by itself
        before their next heartbeat)."""
        for (stream, _, _), found in list(self.deliveries.items()):
            if stream == raw:
                found.wake()

    async def ask_sync(self) -> None:
        self.sync = await sync_of(self.options.monitor, self.options.sync, str(self.link.info.get("server_id", "")))

    # --- streams ---

    async def open(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> NatsStream:
        self.check_open()
        check_stream(name)
        asked = (config or StreamConfig()).validate()
        self._check_config(asked)
        info = await self._find(name)
        if info is None:
            if not create:
                raise NotFound(f"no stream {name} in {self.url}")
            info = await self._create(name, asked)
        raw = info.config.name
        shared = self.shared.get(raw)
        if shared is not None and not shared.deleted:
            meta = self.meta_of(info.config)
            fresh = (
                Shared(self, raw, info)
                if meta.get(META_INCARNATION, "") != (shared.incarnation if shared.ours else "")
                or (not shared.ours and shared.info.created != info.created)
                else None
            )
            if fresh is None:
                shared.update(info)
            else:
                shared.gone()
                shared = fresh
        else:
            shared = Shared(self, raw, info)
        asked.check_fits(shared.config, name)
        self.check_open()
        self.shared[raw] = shared
        return NatsStream(self, name, shared)

    async def _find(self, name: str) -> js.StreamInfo | None:
        for raw in candidates(name):
            try:
                return await self.api.call(f"STREAM.INFO.{raw}", type=js.StreamInfo)
            except ApiError as exc:
                if exc.err_code != js.STREAM_NOT_FOUND:
                    raise translated(exc, f"stream {name}") from exc
        return None

    def _check_config(self, asked: StreamConfig) -> None:
        """Raise InvalidArgument for what JetStream cannot give."""
        if asked.dedupe_ids_max not in (None, 0, DEFAULTS.dedupe_ids_max):
            raise InvalidArgument(
                f"nats: dedupe_ids_max={asked.dedupe_ids_max}: JetStream's window is one of time only",
                hint="set dedupe_window_s; every id within it is known, however many there are",
            )
        window, age = asked.dedupe_window_s, asked.age_s_max
        if age and age < AGE_S_MIN:
            raise InvalidArgument(f"nats: age_s_max={age} is below JetStream's least, {AGE_S_MIN} s")
        if window and window < AGE_S_MIN:
            raise InvalidArgument(f"nats: dedupe_window_s={window} is below JetStream's least, {AGE_S_MIN} s")
        if window and age and window > age:
            raise InvalidArgument(
                f"nats: dedupe_window_s={window} is longer than age_s_max={age}, which JetStream refuses",
                hint="ids are forgotten with their records",
            )

    def _settings(self, asked: StreamConfig) -> tuple[StreamConfig, int]:
        """What a new stream gets, with nothing left open, and its replicas. Raises InvalidArgument."""
        replicas = self.options.replicas or (REPLICATED if asked.durability == "replicated" else 1)
        level = asked.durability
        given: Durability = "replicated" if replicas > 1 else "power" if self.sync.always else "process"
        if level == "memory":
            replicas = 1
        elif level is None:
            level = given
        elif level == "replicated" and replicas == 1:
            raise InvalidArgument("nats: durability 'replicated' and replicas=1", hint="leave out ?replicas, or say 3")
        elif LEVELS.index(level) > LEVELS.index(given):
            why = f" ({self.sync.warning})" if self.sync.warning else ""
            raise InvalidArgument(f"nats: cannot give or confirm durability {level!r} here{why}", hint=HOW)
        full = asked.or_defaults(replace(DEFAULTS, durability=level))
        if asked.dedupe_window_s is None and full.age_s_max and full.age_s_max < (full.dedupe_window_s or 0):
            full = replace(full, dedupe_window_s=full.age_s_max)
        return full, replicas

    async def _create(self, name: str, asked: StreamConfig) -> js.StreamInfo:
        if self.options.replicas <= 1 and asked.durability in (None, "power"):
            await self.ask_sync()  # it may have been configured anew since we connected
        config, replicas = self._settings(asked)
        incarnation = secrets.token_hex(8)
        version = self.link.version
        meta = {
            META: FORMAT, META_INCARNATION: incarnation, META_CONFIG: msgspec.json.encode(config).decode(),
        }  # fmt: skip
        window = config.dedupe_window_s or AGE_S_MIN
        body: dict[str, object] = {
            "name": name, "subjects": [f"{prefix(name)}>"], "retention": "limits",
            "storage": "memory" if config.durability == "memory" else "file", "num_replicas": replicas,
            "discard": "new" if config.full == "refuse" else "old",
            "max_msgs": config.records_max or -1, "max_bytes": config.bytes_max or -1,
            "max_age": int((config.age_s_max or 0) * 1e9), "duplicate_window": int(window * 1e9),
            "allow_direct": True,
        }  # fmt: skip
        if version >= (2, 12):
            body["allow_atomic"] = True
        if version >= (2, 10):
            body["metadata"] = meta
        else:
            body["description"] = json.dumps(meta)
        try:
            return await self.api.call(f"STREAM.CREATE.{name}", body, js.StreamInfo)
        except ApiError as exc:
            if exc.err_code == js.STREAM_EXISTS and (found := await self._find(name)) is not None:
                return found  # somebody else was faster
            if replicas > 1 and exc.err_code in (10074, 10005):
                raise InvalidArgument(
                    f"nats: {replicas} replicas cannot be had here ({exc.description})", hint="a cluster of that size"
                ) from exc
            raise translated(exc, f"stream {name}: making it") from exc

    @staticmethod
    def meta_of(conf: js.StreamConf) -> dict[str, str]:
        """Our metadata of a stream, from its description where the server (before 2.10) keeps none; else nothing."""
        if META_INCARNATION in conf.metadata:
            return conf.metadata
        try:
            found = json.loads(conf.description)
        except ValueError:
            return {}
        return found if isinstance(found, dict) and META_INCARNATION in found else {}

    def in_force(
        self, info: js.StreamInfo, meta: dict[str, str] | None
    ) -> tuple[StreamConfig, Durability, tuple[str, ...]]:
        """Configuration, durability and warnings of a stream, from what the server says of it now."""
        c = info.config
        actual: Durability = (
            "memory" if c.storage == "memory" else "replicated" if c.num_replicas > 1
            else "power" if self.sync.always and self._ours_leads(info) else "process"
        )  # fmt: skip
        kept = StreamConfig()
        if meta is not None:
            try:
                kept = msgspec.json.decode(meta.get(META_CONFIG, "{}"), type=StreamConfig)
            except msgspec.MsgspecError:
                kept = StreamConfig()
        level: Durability = actual
        warnings: list[str] = []
        if kept.durability is not None:
            level = min(kept.durability, actual, key=LEVELS.index)
            if level != kept.durability:
                warnings.append(f"made with durability {kept.durability}, the server gives {actual}")
        if c.persist_mode == "async":
            level = "memory" if actual != "replicated" else actual
            warnings.append("persist_mode async: the server acknowledges before it writes")
        if level == "process" and actual == "process":
            warnings.append(process_warning(self.sync))
        elif level == "power" and self.sync.warning:
            warnings.append(self.sync.warning)
        if meta is None and c.retention != "limits":
            warnings.append(f"retention {c.retention}: records go when consumers ack them, positions may expire early")
        config = StreamConfig(
            durability=level,
            age_s_max=c.max_age / 1e9 if c.max_age > 0 else 0,
            bytes_max=max(c.max_bytes, 0),
            records_max=max(c.max_msgs, 0),
            full="refuse" if c.discard == "new" else "drop_oldest",
            dedupe_window_s=0 if kept.dedupe_window_s == 0 else c.duplicate_window / 1e9,
            dedupe_ids_max=DEFAULTS.dedupe_ids_max if kept.dedupe_ids_max is None else kept.dedupe_ids_max,
            segment_bytes=DEFAULTS.segment_bytes if kept.segment_bytes is None else kept.segment_bytes,
            segment_age_s=DEFAULTS.segment_age_s if kept.segment_age_s is None else kept.segment_age_s,
        )
        return config, level, tuple(warnings)

    def _ours_leads(self, info: js.StreamInfo) -> bool:
        """Whether the server that was asked about its syncing is the one that stores this stream."""
        return (
            info.cluster is None
            or not info.cluster.leader
            or not self.sync.asked
            or (info.cluster.leader == self.link.info.get("server_name"))
        )

    async def streams(self) -> list[str]:
        self.check_open()
        found: list[str] = []
        while True:
            try:
                page = await self.api.call("STREAM.NAMES", {"offset": len(found)}, js.Names)
            except ApiError as exc:
                raise translated(exc, "listing streams") from exc
            found += page.streams or []
            if not page.streams or len(found) >= page.total:
                return sorted({n for raw in found if (n := shown(raw)) is not None})

    async def delete(self, name: str) -> None:
        self.check_open()
        check_stream(name)
        info = await self._find(name)
        if info is None:
            raise NotFound(f"no stream {name} in {self.url}")
        raw = info.config.name
        await self._checkpoints.forget(name)
        try:
            await self.api.call(f"STREAM.DELETE.{raw}")
        except ApiError as exc:
            if exc.err_code == js.STREAM_NOT_FOUND:
                raise NotFound(f"no stream {name} in {self.url}") from exc
            raise translated(exc, f"stream {name}: deleting it") from exc
        shared = self.shared.pop(raw, None)
        if shared is not None:
            shared.gone()
        for (stream, _, _), found in list(self.deliveries.items()):
            if stream == raw:
                found.gone()

    async def ping(self) -> float:
        self.check_open()
        loop = asyncio.get_running_loop()
        until = loop.time() + CALL_S
        await self.link.ready(until)
        began = loop.time()
        reply, token, answer = self.link.expect()
        # a publish to our own inbox: there and back through the server
        self.link.send(wire.pub(reply, b""))
        try:
            async with asyncio.timeout_at(until):
                await answer
        except TimeoutError as exc:
            raise TimedOut(f"{self.url}: no answer within {CALL_S:g} s") from exc
        except Exception as exc:
            self.check_open()
            raise Unavailable(f"{self.url}: the connection was lost") from exc
        finally:
            self.link.forget(token)
        return loop.time() - began

    async def describe(self) -> list[Fact]:
        self.check_open()
        await self.ask_sync()
        link = self.link
        facts = server_facts(link.info, link.version, link.max_payload, self.options.replicas)
        return [*facts, sync_fact(self.sync)]

    @property
    def checkpoints(self) -> NatsCheckpoints:
        return self._checkpoints

    async def aclose(self) -> None:
        if self.closed:
            return
        self.closed = True
        publishers = [s.publisher for s in self.shared.values()]
        try:
            async with asyncio.timeout(CALL_S):
                for publisher in publishers:
                    await publisher.finish()
                await self.window.finish()
        except TimeoutError:
            pass  # what is unanswered by then ends as Ambiguous, below
        for shared in self.shared.values():
            shared.forget()
        await self.link.aclose()
