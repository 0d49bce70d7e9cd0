"""A program as a model: the question on its standard input, the answer on its standard output.

    Command("local", ["./answer.sh"])                     # {"model": …, "messages": […], "params": {…}} on stdin
    Command("local", ["llama-cli", "-f", "/dev/stdin"], question="text")     # the last message's text

Promises: no shell; its own process group, killed when the time is up, the caller gives up, or the program says more than
fits; an exit code other than 0 is a failure, with the code and the end of its standard error. One newline at the end of the answer is
taken off. It runs with our environment, and `INFERMUX_MODEL` says which model is asked.

With `question="text"` there is room for one text alone: parameters and earlier messages are refused (`unsupported`) unless
`drop_params` is set.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Literal

from mist.errors import InvalidArgument
from mist.tools.infermux.chat import ChatRequest, Chunk, Embeddings, Json, Reply
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.providers.params import encoded, stated, unsupported

ANSWER_BYTES_MAX = 64 * 1024 * 1024
STDERR_BYTES_MAX = 64 * 1024
STDERR_CHARS_SHOWN = 500
_READ_BYTES = 64 * 1024


class Command:
    """`env` is added to the environment. One process a question; how many at once is the router's to say."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        models: Sequence[str] = (),
        question: Literal["json", "text"] = "json",
        env: Mapping[str, str] | None = None,
        drop_params: bool = False,
        answer_bytes_max: int = ANSWER_BYTES_MAX,
    ) -> None:
        if isinstance(argv, str) or not argv or not all(isinstance(arg, str) and "\0" not in arg for arg in argv):
            raise InvalidArgument(
                f"provider {name}: argv is a list of texts, the program first", hint='["./answer.sh"]'
            )
        if question not in ("json", "text"):
            raise InvalidArgument(f'provider {name}: question is "json" or "text", not {question!r}')
        self.name = name
        self.models = tuple(models)
        self._argv = list(argv)
        self._question = question
        self._env = dict(env or {})
        self._drop = drop_params
        self._answer_bytes_max = answer_bytes_max

    async def complete(self, request: ChatRequest, model: str, *, timeout_s: float) -> Reply:
        text = "".join([part async for part in self._run(request, model, timeout_s, whole=True)])
        return Reply(content=text, model=model)

    async def stream(self, request: ChatRequest, model: str, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        async with contextlib.aclosing(self._run(request, model, timeout_s, whole=False)) as parts:
            async for part in parts:
                yield Chunk(content=part, model=model)
        yield Chunk(finish_reason="stop", model=model)

    async def embed(self, model: str, texts: Sequence[str], params: Json, *, timeout_s: float) -> Embeddings:
        raise ProviderError("unsupported", "has no embeddings", provider=self.name)

    async def aclose(self) -> None:
        """A process lives as long as its question."""

    async def _run(
        self, request: ChatRequest, model: str, timeout_s: float, *, whole: bool
    ) -> AsyncGenerator[str, None]:
        """The answer as it comes. The time limit is for all of it with `whole`, else for each part."""
        asked = self._stdin(request, model)
        try:
            process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, **self._env, "INFERMUX_MODEL": model},
            )
        except (OSError, ValueError) as exc:
            reason = (exc.strerror if isinstance(exc, OSError) else "") or str(exc)
            raise self._error("connection", f"{self._argv[0]} cannot be started: {reason}") from exc
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None  # noqa: S101, PT018
        said = asyncio.create_task(_tail(process.stderr))
        wrote = asyncio.create_task(_write(process.stdin, asked))
        begun = finished = False
        try:
            decoder = codecs.getincrementaldecoder("utf-8")()
            held, size = "", 0
            loop = asyncio.get_running_loop()
            deadline = loop.time() + timeout_s
            while True:
                async with asyncio.timeout_at(deadline):
                    data = await process.stdout.read(_READ_BYTES)
                size += len(data)
                if size > self._answer_bytes_max:
                    raise self._error("bad_answer", f"said more than {self._answer_bytes_max} bytes", begun=begun)
                text = held + decoder.decode(data, final=not data)
                if not data:
                    break
                held = "\n" if text.endswith("\n") else ""  # the last one is no part of the answer
                text = text.removesuffix("\n") if held else text
                if text:
                    yield text
                    if not whole:
                        begun = True
                        deadline = loop.time() + timeout_s
            async with asyncio.timeout_at(deadline):
                code = await process.wait()
                stderr = await said
            finished = True
            if code:
                how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
                raise self._error("server", f"{how}{': ' if stderr else ''}{stderr}", begun=begun)
            rest = text.removesuffix("\n")
            if rest:
                yield rest
        except TimeoutError as exc:
            raise self._error("timeout", f"no answer within {timeout_s:g} s", begun=begun) from exc
        except UnicodeDecodeError as exc:
            raise self._error("bad_answer", f"said what is no UTF-8: {exc.reason}", begun=begun) from exc
        finally:
            if not finished:
                _kill(process.pid)
            said.cancel()
            wrote.cancel()
            await asyncio.gather(said, wrote, return_exceptions=True)
            await process.wait()

    def _stdin(self, request: ChatRequest, model: str) -> bytes:
        params = stated(request.params)
        if self._question == "json":
            return encoded(self.name, {"model": model, "messages": request.messages, "params": params})
        refused = [*params, *(["earlier messages"] if len(request.messages) > 1 else [])]
        if refused and not self._drop:
            raise unsupported(self.name, refused, hint='with question="json" all of it is handed over')
        return (request.messages[-1].text if request.messages else "").encode("utf-8", "surrogatepass")

    def _error(self, kind: Literal["connection", "server", "timeout", "bad_answer"], what: str, *, begun: bool = False) -> ProviderError:  # fmt: skip
        return ProviderError(kind, what, provider=self.name, begun=begun)


def _kill(pid: int) -> None:
    """The process, if it lives, and whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        os.killpg(pid, signal.SIGKILL)


async def _write(stdin: asyncio.StreamWriter, data: bytes) -> None:
    """A program may answer without reading its question."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stdin.write(data)
        await stdin.drain()
    stdin.close()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await stdin.wait_closed()


async def _tail(stderr: asyncio.StreamReader) -> str:
    """The end of what it says there, in one line."""
    kept = b""
    while data := await stderr.read(_READ_BYTES):
        kept = (kept + data)[-STDERR_BYTES_MAX:]
    text = kept.decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() else " " for c in text)[-STDERR_CHARS_SHOWN:]
