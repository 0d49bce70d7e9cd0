"""JSON lines, without I/O: blocks of bytes to envelopes and positions, envelopes to bytes.

Promises: blocks may be cut anywhere; every line is one envelope or one error, in order, with its line number and
offset; a line above the size limit costs no memory and only itself; blank lines are passed over; CR before LF is read.
Does not: open, wait or retry.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence

from msgspec import Raw, Struct
from msgspec.structs import replace

from mist.errors import Malformed, MistError, ProtocolError, TooLarge
from mist.protocol import codec
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope

GO_LINE_BYTES_MAX = 1024 * 1024
"""A reader of the Go library stops for good at a line this long, its newline included."""


class Position(Struct, frozen=True):
    """A place between two lines: `line` lines lie before it, and `offset` bytes. What a reader resumes from."""

    line: int = 0
    offset: int = 0


class Encoded(Struct, frozen=True):
    """`largest` is the longest line, its newline included; 0 when all are known to be short."""

    data: bytes
    largest: int = 0


def encode_lines(envelopes: Sequence[Envelope], size_bytes_max: int = SIZE_BYTES_MAX) -> Encoded:
    """One line for each envelope. Raises TooLarge, naming which, before anything is written.

    A payload with line breaks between its tokens (pretty-printed by whoever sent it) gets spaces in their place, or it
    would be several lines; a checksum that was right is made right again.
    """
    data = codec.encode_lines(envelopes)
    if data.count(b"\n") != len(envelopes):
        data = codec.encode_lines([_on_one_line(e) for e in envelopes])
    if len(data) < GO_LINE_BYTES_MAX and len(data) <= size_bytes_max:
        return Encoded(data)
    sizes = [len(line) for line in data.split(b"\n")]
    largest = max(sizes)
    if largest > size_bytes_max:
        at = sizes.index(largest)
        raise codec.refuse(TooLarge(f"envelope {envelopes[at].id}", size_bytes=largest, size_bytes_max=size_bytes_max))
    return Encoded(data, largest + 1)


def _on_one_line(envelope: Envelope) -> Envelope:
    before = bytes(envelope.payload)
    if b"\n" not in before:
        return envelope
    after = before.replace(b"\n", b" ")
    right = envelope.checksum and envelope.checksum == zlib.crc32(before)
    return replace(envelope, payload=Raw(after), checksum=zlib.crc32(after) if right else envelope.checksum)


class _Good:
    """Envelopes, one for each line of `data`. The first `taken` were handed out; they end at `at`."""

    __slots__ = ("at", "counted", "data", "envelopes", "taken")

    def __init__(self, envelopes: list[Envelope], data: bytes) -> None:
        self.envelopes = envelopes
        self.data = data
        self.taken = 0
        self.counted = 0
        self.at = 0

    def offset(self) -> int:
        """Where the taken ones end. Each line is looked at once, however often this is asked."""
        while self.counted < self.taken:
            self.at = self.data.index(b"\n", self.at) + 1
            self.counted += 1
        return self.at


class _Bad(Struct):
    """One line that is an error, or (`error` None) one to be passed over. `size` includes the newline."""

    error: MistError | None
    size: int
    lines: int = 1


class LineDecoder:
    """`feed` blocks, `take` envelopes. `name` is how errors call the input."""

    def __init__(self, name: str, position: Position | None = None, size_bytes_max: int = SIZE_BYTES_MAX) -> None:
        position = position or Position()
        self._name = name
        self._size_bytes_max = size_bytes_max
        self._line = position.line  # before the first item of _ready
        self._offset = position.offset
        self._ready: deque[_Good | _Bad] = deque()
        self._rest: list[bytes] = []
        self._rest_size = 0
        self._skipping = False
        self._next_line = position.line + 1  # the number of the first line that is not in _ready
        self._next_offset = position.offset

    @property
    def position(self) -> Position:
        """Behind the last envelope taken or error raised."""
        front = self._ready[0] if self._ready else None
        if isinstance(front, _Good) and front.taken:
            return Position(self._line + front.taken, self._offset + front.offset())
        return Position(self._line, self._offset)

    @property
    def ready(self) -> bool:
        """Whether `take` has something to give, or an error to raise."""
        return bool(self._ready)

    @property
    def next_offset(self) -> int:
        """Where the first line that is not decoded starts."""
        return self._next_offset

    @property
    def rest(self) -> int:
        """How many bytes of an unfinished line are held."""
        return self._rest_size

    def forget_rest(self) -> int:
        """Drop the unfinished line, to be fed again; returns how many bytes lie between it and what was fed."""
        size, self._rest, self._rest_size, self._skipping = self._rest_size, [], 0, False
        return size

    def feed(self, block: bytes) -> None:
        """Take bytes in. Every line that is complete now is decoded."""
        cut = block.rfind(b"\n") + 1
        if not cut:
            self._hold(block)
            return
        if self._skipping:
            first = block.index(b"\n") + 1
            self._too_large(self._rest_size + first - 1)
            self._rest_size = 0
            self._skipping = False
            complete = block[first:cut]
        elif self._rest:
            self._rest.append(block[:cut])
            complete = b"".join(self._rest)
            self._rest = []
            self._rest_size = 0
        else:
            complete = block if cut == len(block) else block[:cut]
        if complete:
            self._decode(complete)
        if cut < len(block):
            self._hold(block[cut:])

    def finish(self, *, keep: bool = False) -> None:
        """The input is over: an unfinished last line is an envelope when it is whole, and an error otherwise.

        With `keep` the torn line stays before the position, so that a reader that resumes there sees it finished.
        """
        if not self._rest_size:
            return
        data = b"".join(self._rest)
        size, skipping = self._rest_size, self._skipping
        self.forget_rest()
        if skipping:
            self._too_large(size, newline=0)
            return
        if not data.strip():
            self._push(_Bad(None, size, 0))
            return
        try:
            envelope = codec.decode_foreign(data, size_bytes_max=self._size_bytes_max)
        except MistError as exc:
            torn = Malformed(
                f"{self._name}:{self._next_line}: torn last line: {size} bytes without an end ({exc})",
                meta={"input": self._name, "line": str(self._next_line), "offset": str(self._next_offset), "torn": "1"},
            )
            self._push(_Bad(torn, 0 if keep else size, 0))
        else:
            self._push(_Good([envelope], data + b"\n"))

    def take(self, limit: int) -> list[Envelope]:
        """Up to `limit` envelopes. Empty: feed more. Raises the error of a bad line when that is the next."""
        out: list[Envelope] = []
        while self._ready and len(out) < limit:
            front = self._ready[0]
            if isinstance(front, _Bad):
                if front.error is not None and out:
                    break
                self._ready.popleft()
                self._line += front.lines
                self._offset += front.size
                if front.error is not None:
                    raise front.error
                continue
            have = len(front.envelopes)
            until = min(have, front.taken + limit - len(out))
            if not out and not front.taken and until == have:
                out = front.envelopes
            else:
                out += front.envelopes[front.taken : until]
            front.taken = until
            if until == have:
                self._ready.popleft()
                self._line += have
                self._offset += len(front.data)
        return out

    def _hold(self, part: bytes) -> None:
        self._rest_size += len(part)
        if self._skipping:
            return
        if self._rest_size > self._size_bytes_max + 1:  # one more for the CR of a line that just fits
            self._skipping = True
            self._rest = []
        else:
            self._rest.append(part)

    def _push(self, item: _Good | _Bad) -> None:
        if isinstance(item, _Good):
            self._next_line += len(item.envelopes)
            self._next_offset += len(item.data)
        else:
            self._next_line += item.lines
            self._next_offset += item.size
        self._ready.append(item)

    def _too_large(self, size: int, newline: int = 1) -> None:
        error = codec.refuse(TooLarge("line", size_bytes=size, size_bytes_max=self._size_bytes_max))
        self._push(_Bad(self._named(error), size + newline))

    def _decode(self, data: bytes) -> None:
        """`data` ends with a newline."""
        if len(data) <= self._size_bytes_max:
            envelopes = codec.decode_block(data, size_bytes_max=self._size_bytes_max)
            if envelopes is not None:
                self._push(_Good(envelopes, data))
                return
        for line in data.split(b"\n")[:-1]:
            if not line.strip():
                self._push(_Bad(None, len(line) + 1))
                continue
            try:
                text = line[:-1] if line.endswith(b"\r") else line
                envelope = codec.decode_foreign(text, size_bytes_max=self._size_bytes_max)
            except (ProtocolError, TooLarge) as exc:
                self._push(_Bad(self._named(exc), len(line) + 1))
            else:
                self._push(_Good([envelope], line + b"\n"))

    def _named(self, error: MistError) -> MistError:
        """The same error, saying where: `input:line: …`."""
        error.message = f"{self._name}:{self._next_line}: {error.message}"
        error.args = (error.message,)
        error.meta.update(input=self._name, line=str(self._next_line), offset=str(self._next_offset))
        return error
