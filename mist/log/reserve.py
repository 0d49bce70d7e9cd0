"""One file of reserved space in the log's directory, so that a full disk still allows what makes room.

Appends refuse to take more space while it is missing. Settling, checkpoints and trimming give it up when they meet a full
disk; the next append that needs space makes it anew, once there is room. Any process may do either at any time.
"""

from __future__ import annotations

import os
from contextlib import suppress

from mist.log.files import Files

RESERVE = "reserve"
RESERVE_BYTES = 1024 * 1024


class Reserve:
    def __init__(self, files: Files, directory: str) -> None:
        self._files = files
        self._path = os.path.join(directory, RESERVE)

    def keep(self) -> None:
        """Make sure that the space is set aside. Raises OSError when there is none."""
        fd = self._files.open(self._path, create=True)
        try:
            if self._files.size(fd) < RESERVE_BYTES:
                self._files.allocate(fd, RESERVE_BYTES)
        except OSError:
            self.give_up()
            raise
        finally:
            self._files.close(fd)

    def give_up(self) -> None:
        """Free it."""
        with suppress(FileNotFoundError):  # somebody was faster
            self._files.unlink(self._path)
