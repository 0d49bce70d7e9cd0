"""What a worker does with a delivery after its handler: the ack policies, and how a failed one is spaced out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from enum import Enum

from mist.broker.backoff import Backoff

NAK_BACKOFF = Backoff(first_s=0.5, most_s=60.0)
_STEPS = 16


class AckPolicy(Enum):
    """When a delivery is settled, and how. A handler that settles one itself (`ack`, `nak`, `term`) always wins."""

    ACK_FIRST = "ack_first"
    """Before the handler runs: at most once. A crash or an error loses it."""
    ACK = "ack"
    """After the handler, whether it returned or raised: an error is counted and never tried again."""
    REJECT_ON_ERROR = "reject_on_error"
    """After the handler; an error makes it a dead letter at once, with the error as the reason."""
    NACK_ON_ERROR = "nack_on_error"
    """After the handler; an error gives it back, to be tried again later, up to the consumer's `attempts_max`, then it
    becomes a dead letter. The default."""
    MANUAL = "manual"
    """The handler settles, also after it returned. What it raised without settling is given back as above."""


def nak_delay_s(backoff: Backoff, attempt: int, rand: Callable[[], float] = random.random) -> float:
    """Full jitter in sixteen steps of the ceiling, so that many failures share a few calls to the broker."""
    return backoff.ceiling_s(attempt) * math.ceil(rand() * _STEPS) / _STEPS
