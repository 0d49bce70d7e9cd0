"""`TraceService/Export` over gRPC: answers, codes with RetryInfo, limits, the way down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from conftest import run
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

import mist
from mist.errors import (
    Ambiguous,
    Closed,
    DataLoss,
    Internal,
    MistError,
    Overloaded,
    RateLimited,
    StorageFull,
    TooLarge,
    TransportError,
    Unavailable,
)
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.otlp.grpc import REPEATED, GrpcServer, code_of
from mist.tools.tokentrace.otlp.receive import passes, span_sink
from mist.transport.server import Limits
from otlp.test_mapping import request
from otlp.test_receive import nowhere, spans

Export = Callable[..., Awaitable[ExportTraceServiceResponse]]


def served(sink: Any, work: Callable[[Export, GrpcServer], Awaitable[None]], limits: Limits | None = None) -> None:
    async def body() -> None:
        async with GrpcServer(sink, limits=limits) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub = TraceServiceStub(channel)

            async def export(data: bytes, **options: Any) -> ExportTraceServiceResponse:
                answer: ExportTraceServiceResponse = await stub.Export(
                    ExportTraceServiceRequest.FromString(data), timeout=20, **options
                )
                return answer

            await work(export, server)

    run(body())


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_stored_before_the_answer(compression: grpc.Compression) -> None:
    """With what was rejected, and why."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")

            async with GrpcServer(span_sink(stream)) as server, grpc.aio.insecure_channel(server.address) as channel:
                out = ExportTraceServiceRequest.FromString(spans(3))
                out.MergeFrom(ExportTraceServiceRequest.FromString(request(trace_id=b"1")))
                answer = await TraceServiceStub(channel).Export(out, compression=compression, timeout=20)
                assert answer.partial_success.rejected_spans == 1
                assert "trace_id" in answer.partial_success.error_message
                assert (await stream.info()).records == 3
                assert server.store.facts() == {"accepted": 3, "rejected": 1}

    run(body())


def test_bytes_that_are_no_request() -> None:
    """INVALID_ARGUMENT."""

    async def body() -> None:
        async with GrpcServer(nowhere) as server, grpc.aio.insecure_channel(server.address) as channel:
            call = channel.unary_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff\xff", timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            other = channel.unary_unary("/opentelemetry.proto.collector.logs.v1.LogsService/Export")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await other(b"", timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    run(body())


@pytest.mark.parametrize(
    ("error", "code", "wait_s"),
    [
        (Unavailable("x"), "UNAVAILABLE", 1.0),
        (Overloaded("x", retry_after_s=2.5), "RESOURCE_EXHAUSTED", 2.5),
        (StorageFull("x"), "RESOURCE_EXHAUSTED", 1.0),
        (RateLimited("x"), "RESOURCE_EXHAUSTED", 1.0),
        (Ambiguous("x"), "UNAVAILABLE", 1.0),
        (Closed("x"), "UNAVAILABLE", 1.0),
        (TooLarge("x", size_bytes=2, size_bytes_max=1), "INVALID_ARGUMENT", None),
        (DataLoss(first=1, last=2, resume_after=2), "FAILED_PRECONDITION", None),
        (Internal("x"), "INTERNAL", None),
        (ZeroDivisionError(), "INTERNAL", None),
    ],
)
def test_what_passes_has_a_retry_info(error: Exception, code: str, wait_s: float | None) -> None:
    """In the details as OTLP says, and where the Python exporter looks."""

    async def sink(envelopes: list[Envelope]) -> None:
        raise error

    async def work(export: Export, server: GrpcServer) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await export(request())
        assert caught.value.code().name == code
        trailers = dict(caught.value.trailing_metadata() or ())
        status = Status.FromString(trailers["grpc-status-details-bin"])
        assert grpc.StatusCode[code].value[0] == status.code
        infos = [RetryInfo.FromString(d.value) for d in status.details if d.Is(RetryInfo.DESCRIPTOR)]
        assert [i.retry_delay.seconds + i.retry_delay.nanos / 1e9 for i in infos] == (
            [] if wait_s is None else [wait_s]
        )
        assert ("google.rpc.retryinfo-bin" in trailers) == (wait_s is not None)
        if isinstance(error, MistError):
            assert passes(error) == (code_of(error) in REPEATED or code == "RESOURCE_EXHAUSTED")

    served(sink, work)


def test_limits() -> None:
    """A message too large, also one that inflates to it; too many spans; too many calls."""
    inside, go = asyncio.Event(), asyncio.Event()

    async def sink(envelopes: list[Envelope]) -> None:
        inside.set()
        await go.wait()

    async def work(export: Export, server: GrpcServer) -> None:
        big = request({"a": "x" * 70_000})
        for compression in (None, grpc.Compression.Gzip):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await export(big, compression=compression)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await export(spans(11))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        first = asyncio.create_task(export(request()))
        await inside.wait()
        # on a connection of its own: on one connection the server's limit of streams makes calls wait
        alone = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(server.address, options=alone) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await TraceServiceStub(channel).Export(ExportTraceServiceRequest.FromString(request()), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "requests are under way" in (caught.value.details() or "")
        go.set()
        await first

    served(sink, work, Limits(body_bytes_max=64_000, envelopes_max=10, inflight_requests_max=1))


def test_a_call_under_way_is_answered_before_the_end() -> None:
    """Nobody new comes in."""
    inside, go = asyncio.Event(), asyncio.Event()

    async def sink(envelopes: list[Envelope]) -> None:
        inside.set()
        await go.wait()

    async def work(export: Export, server: GrpcServer) -> None:
        first = asyncio.create_task(export(request()))
        await inside.wait()
        closing = asyncio.create_task(server.close())
        await asyncio.sleep(0.05)
        with pytest.raises(grpc.aio.AioRpcError):
            await export(request())
        assert not first.done()
        go.set()
        await first
        await closing
        await server.close()
        with pytest.raises(Closed):
            await server.start()

    served(sink, work)


def test_an_address_that_is_taken() -> None:
    """TransportError, at the start."""

    async def body() -> None:
        async with GrpcServer(nowhere) as server:
            await server.start()  # again is nothing
            other = GrpcServer(nowhere, port=int(server.address.rpartition(":")[2]))
            with pytest.raises(TransportError, match="cannot listen"):
                await other.start()

    run(body())
