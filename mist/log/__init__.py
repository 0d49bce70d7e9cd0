"""`log:DIR` — the embedded durable broker: no server, many processes, one directory.

format.py is the bytes, files.py the only door to segments, marks and indexes, journal.py the one writer of a stream (lock,
recovery, commit, roll, retention), reader.py the pages, state.py consumers and checkpoints in SQLite, broker.py the
contract over them. docs/reference/log-format.md specifies the files.
"""

from __future__ import annotations

from mist.log.broker import LogBroker, connect

__all__ = ["LogBroker", "connect"]
