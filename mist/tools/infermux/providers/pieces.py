"""A whole answer handed out in pieces, for providers that have it at once."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mist.tools.infermux.chat import Chunk, Reply

_WORD = re.compile(r"\s*\S+|\s+")


def pieces(reply: Reply) -> Iterator[Chunk]:
    """A chunk for each word with the white space before it, then the tool calls, then the end. Joined they are the
    content to the last character."""
    for word in _WORD.findall(reply.content):
        yield Chunk(content=word, model=reply.model, id=reply.id)
    if reply.refusal:
        yield Chunk(refusal=reply.refusal, model=reply.model, id=reply.id)
    for at, call in enumerate(reply.tool_calls):
        yield Chunk(tool_calls=[{"index": at, **call}], model=reply.model, id=reply.id)
    yield Chunk(finish_reason=reply.finish_reason, usage=reply.usage, model=reply.model, id=reply.id)
