"""`infer.request` to `infer.response`, as a handler (mist/client/handler.py): over a broker, a pipe, files, or embedded.

    await serve(handler(calls), "log:./data?stream=infer-requests&consumer=infermux", out="infer")

Promises, beside those of every handler: each request gets one answer in the output stream, under an id that is the same
however often it is handled, with `correlation_id` naming the request and `request_key` for a replay. What fails for good
(an unknown model, a refused parameter, a spent budget, a request that cannot be read) is answered too, by an `infer.response`
with `error` and `error_code`: who asked is not left waiting, and the request is done. What may pass (a provider that is
down, slow or busy, after the router's own retries and fallbacks) is given back and handled again later; a request that is
out of attempts is answered with its last failure, and then a dead letter with that reason.

Does not: keep a call from being made twice. A process that dies after a provider answered and before the answer is stored
asks that provider again; the stream still gets one answer.
"""

from __future__ import annotations

import msgspec

from mist.client.handler import Handler
from mist.errors import Internal, MistError, Unavailable
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_REQUEST, INFER_RESPONSE, InferResponse
from mist.tools.infermux.calls import Calls, Recording
from mist.tools.infermux.chat import Caller, ChatRequest
from mist.tools.infermux.envelopes import SOURCE, chat_request, error_payload, response_payload
from mist.tools.infermux.openai_api import said


def handler(calls: Calls, *, recording: Recording = Recording(response=False)) -> Handler:  # noqa: B008  # a frozen value
    """The outputs are stored by whoever runs it, so they are not recorded a second time. The request is, under its own id:
    the stream of answers is then complete without that of requests. `Recording(request=False, …)` where both are one."""

    async def one(request: Envelope) -> list[Envelope]:
        return [await answered(calls, request, recording, errors=True)]

    return Handler(SOURCE, one, accepts=(INFER_REQUEST,), last_word=_given_up)


def _given_up(asked: Envelope, error: MistError) -> list[Envelope]:
    try:
        request = chat_request(asked)
    except MistError:  # it was dead for another reason; the answer says which
        request = ChatRequest(model="", messages=())
    cause = error.__cause__  # what `_later` made worth another attempt
    return [_answer(asked, error_payload(request, cause if isinstance(cause, MistError) else error), asked.traceparent)]


async def answered(
    calls: Calls, asked: Envelope, recording: Recording, *, errors: bool, caller: Caller | None = None
) -> Envelope:
    """The `infer.response` to an `infer.request`. `errors`: failures that stay are answers, too; otherwise all are raised.
    `caller` is who asks for sure, whatever the request says."""
    request = ChatRequest(model="", messages=(), id=asked.id, traceparent=asked.traceparent, tenant=asked.tenant)
    try:
        request = chat_request(asked)
        if caller is not None:
            request = msgspec.structs.replace(request, caller=caller)
        recording = Recording(request=recording.request, response=recording.response, asked=asked)
        request, routed = await calls.complete(request, recording)
    except Internal:
        raise
    except MistError as exc:
        if not errors:
            raise
        if said(exc).again:
            raise _later(exc) from exc
        payload = error_payload(request, exc)
    else:
        payload = response_payload(request, routed)
    return _answer(asked, payload, request.traceparent)


def _answer(asked: Envelope, payload: InferResponse, traceparent: str) -> Envelope:
    return Envelope.new(
        INFER_RESPONSE, payload, source=SOURCE, correlation_id=asked.id, causation_id=asked.id,
        traceparent=traceparent, tenant=asked.tenant,
    )  # fmt: skip


def _later(error: MistError) -> MistError:
    """The same as something that is worth handling again."""
    if error.retryable:
        return error
    return Unavailable(error.message, hint=error.hint, meta=error.meta, retry_after_s=error.retry_after_s)
