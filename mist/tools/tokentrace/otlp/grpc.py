"""OTLP over gRPC: `opentelemetry.proto.collector.trace.v1.TraceService/Export` on grpc.aio.

    async with GrpcServer(span_sink(stream), port=4317) as server: ...

The promises are those of `receive`; what differs is how refusals are said. What passes is UNAVAILABLE, RESOURCE_EXHAUSTED or
another of the codes that exporters repeat, with a RetryInfo in `grpc-status-details-bin` as OTLP wants it, and in
`google.rpc.retryinfo-bin`, where the Python exporter looks for it; what does not pass is none of these. Stopping takes no new
call and answers those under way.

A message is received whole before it is counted: the largest is `body_bytes_max`, after decompression, and there are at most
`inflight_requests_max` at a time. Does not: authenticate, speak TLS. Needs the extra `grpc`.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any, NoReturn, Self

from mist.errors import Closed, Internal, InvalidArgument, MistError, TransportError
from mist.kit.server import CLOSE_WAIT_S
from mist.tools.tokentrace.otlp import wire
from mist.tools.tokentrace.otlp.receive import RPC_CODES, Store, passes, response
from mist.transport.body import Intake, Limits
from mist.transport.server import Sink

_log = logging.getLogger("mist.tools.tokentrace.otlp")

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
REPEATED = frozenset({"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"})
"""What an exporter repeats; RESOURCE_EXHAUSTED only with a RetryInfo."""


def code_of(error: MistError) -> str:
    """The name of the status code that tells an exporter the right thing to do."""
    name = error.info.grpc
    if passes(error):
        return name if name in REPEATED or name == "RESOURCE_EXHAUSTED" else "UNAVAILABLE"
    if error.code == "too_large":
        return "INVALID_ARGUMENT"  # some exporters repeat RESOURCE_EXHAUSTED whatever comes with it
    return "FAILED_PRECONDITION" if name in REPEATED else name


class GrpcServer:
    """In the running event loop. Port 0 takes a free one; `address` (host:port) says which. `store` has the
    counters; one may be shared with a `Receiver`."""

    def __init__(
        self,
        sink: Sink,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | None = None,
        store: Store | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._intake = Intake(self._limits)
        self.store = store or Store(sink, self._limits)
        self.address = ""
        self._host = f"[{host}]" if ":" in host else host
        self._port = port
        self._server: Any = None
        self._closed = False

    async def start(self) -> None:
        """Raises TransportError when the address is taken."""
        if self._closed:
            raise Closed("the server is closed")
        if self._server is not None:
            return
        grpc = _grpc()
        most = self._limits.body_bytes_max
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", most),
                ("grpc.max_concurrent_streams", self._limits.inflight_requests_max),
                ("grpc.so_reuseport", 0),
            ]
        )
        # without serializers: our own view of the schema reads the bytes
        export = grpc.unary_unary_rpc_method_handler(self._export)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Export": export}),))
        where = f"{self._host}:{self._port}"
        try:
            port = server.add_insecure_port(where)
        except RuntimeError as exc:
            raise TransportError(f"cannot listen on {where}: {exc}") from exc
        await server.start()
        self._server = server
        self.address = f"{self._host}:{port}"

    async def close(self) -> None:
        """Idempotent. Takes no new call, answers those under way (10 s at most)."""
        self._closed = True
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(CLOSE_WAIT_S)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _export(self, body: bytes, context: Any) -> bytes:
        try:
            with self._intake.request() as request:
                request.take(len(body))
                return response(await self.store(body))
        except MistError as exc:
            error = exc
        except Exception as exc:
            _log.exception("the sink of %s failed", SERVICE)
            error = Internal(f"the server failed: {type(exc).__name__}")
        return await self._abort(context, error)

    async def _abort(self, context: Any, error: MistError) -> NoReturn:
        code = code_of(error)
        wait: float | None = None
        metadata: list[tuple[str, bytes]] = []
        if passes(error):
            wait = error.retry_after_s if error.retry_after_s is not None else float(self._limits.retry_after_s)
            metadata.append(("google.rpc.retryinfo-bin", wire.retry_info(wait)))
        metadata.append(("grpc-status-details-bin", wire.status(RPC_CODES[code], str(error), wait)))
        await context.abort(getattr(_grpc().StatusCode, code), str(error), tuple(metadata))
        raise Internal("abort returned")  # it raises, but its stubs do not say so


def _grpc() -> Any:
    try:
        import grpc
        import grpc.aio
    except ImportError as exc:
        raise InvalidArgument(
            "OTLP over gRPC needs a package that is not installed (grpcio)", hint="pip install 'mist-stack[grpc]'"
        ) from exc
    return grpc
