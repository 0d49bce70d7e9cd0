"""A router that runs elsewhere, as the commands of `mist infer` ask it."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from mist.errors import InvalidArgument, MistError, TimedOut, TransportError, Unavailable
from mist.transport._status import error_for

if TYPE_CHECKING:
    from mist.tools.infermux.chat import ChatRequest

KEY = "INFERMUX_API_KEY"
TOKEN = "INFERMUX_MANAGEMENT_TOKEN"
TIMEOUT_S = 300.0
CONNECT_S = 5.0


class Server:
    """`url` is where it listens. The key, or for figures the management token, comes from the environment."""

    def __init__(self, url: str) -> None:
        httpx = _httpx()
        if not url.startswith(("http://", "https://")):
            raise InvalidArgument(f"{url!r} is no address of a router", hint="for example http://127.0.0.1:8600")
        self.url = url.rstrip("/")
        key, token = os.environ.get(KEY, ""), os.environ.get(TOKEN, "")
        self._key = {"authorization": f"Bearer {key}"} if key else {}
        self._token = {"authorization": f"Bearer {token}"} if token else self._key
        try:
            self._client: Any = httpx.AsyncClient(
                base_url=self.url, timeout=httpx.Timeout(TIMEOUT_S, connect=CONNECT_S)
            )
        except (httpx.InvalidURL, ValueError) as exc:
            raise InvalidArgument(f"{url!r} is no address of a router: {exc}") from exc

    async def get(self, path: str) -> Any:
        answer = await self._sent("GET", path, self._token)
        return msgspec.json.decode(answer.content)

    async def ask(self, request: ChatRequest) -> Any:
        """The payload of its `infer.response`."""
        from mist.tools.infermux.envelopes import request_payload

        answer = await self._sent("POST", "/infer", self._key, msgspec.json.encode(request_payload(request)))
        return msgspec.json.decode(answer.content)

    async def stream(self, request: ChatRequest, piece: Callable[[str], None]) -> Any:
        """Each piece as it comes; in the end as `ask` gives it."""
        httpx = _httpx()
        body = {
            **request.params, "model": request.model, "messages": request.messages, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        content: list[str] = []
        found: dict[str, Any] = {"finish_reason": ""}
        try:
            async with self._client.stream(
                "POST", "/v1/chat/completions", content=msgspec.json.encode(body), headers=self._key
            ) as answer:
                if answer.status_code != 200:
                    raise self._error(answer, await answer.aread())
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = msgspec.json.decode(line[6:])
                    if "error" in event:
                        raise TransportError(f"{self.url}: {event['error']['message']}", retryable=False)
                    for choice in event["choices"]:
                        text = choice["delta"].get("content") or ""
                        content.append(text)
                        found["finish_reason"] = choice["finish_reason"] or found["finish_reason"]
                        piece(text)
                    usage = event.get("usage") or {}
                    for ours, theirs in (("tokens_in", "prompt_tokens"), ("tokens_out", "completion_tokens")):
                        found[ours] = usage.get(theirs)
                    found.update(event.get("infermux") or {})
        except httpx.HTTPError as exc:
            raise self._failed(exc) from exc
        return {"content": "".join(content), **found}

    async def _sent(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> Any:
        httpx = _httpx()
        try:
            answer = await self._client.request(method, path, content=body or None, headers=headers)
        except httpx.HTTPError as exc:
            raise self._failed(exc) from exc
        if answer.status_code != 200:
            raise self._error(answer, answer.content)
        return answer

    def _error(self, answer: Any, body: bytes) -> MistError:
        try:
            told = msgspec.json.decode(body)
            if isinstance(told, dict) and isinstance(told.get("error"), dict):  # OpenAI's form
                body = str(told["error"].get("message", "")).encode()
        except msgspec.DecodeError:
            pass  # not JSON: it is shown as it is
        return error_for(answer.status_code, {k.lower(): v for k, v in answer.headers.items()}, body, self.url)

    def _failed(self, exc: Exception) -> MistError:
        httpx = _httpx()
        if isinstance(exc, httpx.TimeoutException) and not isinstance(exc, httpx.ConnectTimeout):
            return TimedOut(f"{self.url}: no answer within {TIMEOUT_S:g} s")
        return Unavailable(f"{self.url} cannot be reached: {exc}", hint="`mist up --tools infermux` runs one")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._client.aclose()


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as exc:
        raise InvalidArgument(
            "asking a router that runs needs a package that is not installed (httpx)",
            hint="pip install 'mist-stack[client]'",
        ) from exc
    return httpx
