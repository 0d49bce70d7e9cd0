"""The rules of every checkpoint store: what may be saved, and what may follow what.

Adapters store; these functions decide. A checkpoint never goes back and never crosses incarnations unless forced.
"""

from __future__ import annotations

from mist.broker.base import SEQUENCE_MAX, Checkpoint
from mist.errors import CheckpointRegression, InvalidArgument, WrongIncarnation
from mist.protocol.subject import check_name, check_stream


def check_key(stream: str, name: str) -> None:
    """Raise InvalidArgument for what never names a checkpoint."""
    check_stream(stream)
    check_name(name)


def check_save(checkpoint: Checkpoint) -> None:
    check_key(checkpoint.stream, checkpoint.name)
    if not 0 <= checkpoint.sequence <= SEQUENCE_MAX:
        raise InvalidArgument(f"checkpoint {checkpoint.name}: needs a sequence from 0 to {SEQUENCE_MAX}")
    if not checkpoint.incarnation or not checkpoint.incarnation.isprintable():
        raise InvalidArgument(f"checkpoint {checkpoint.name}: needs the incarnation of its stream")


def check_advance(stored: Checkpoint, new: Checkpoint) -> None:
    """Raise unless `new` may follow `stored`."""
    if stored.incarnation != new.incarnation:
        raise WrongIncarnation(
            f"checkpoint {new.name}: stream {new.stream} was deleted and made again since it was saved",
            hint="delete the checkpoint, or save with force, to start on the new stream",
        )
    if new.sequence < stored.sequence:
        raise CheckpointRegression(
            f"checkpoint {new.name} of stream {new.stream} is at {stored.sequence}, {new.sequence} would go back",
            hint="force=True (--force) moves it back on purpose",
        )
