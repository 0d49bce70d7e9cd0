"""The conformance suite every broker runs, ours or a third party's.

    class TestMine(BrokerConformance):
        @pytest.fixture(autouse=True)
        def _store(self, tmp_path):
            self.url = f"mine:{tmp_path}"

That is all a broker with URLs needs; `Harness` (harness.py) lists what else can be filled in: `connect` and `reconnect`
for stores without a URL, hooks that inject a failing append or damage. docs/how-to/write-an-adapter.md walks through it.

Promises: every promise of mist/broker/base.py is a case; what is declared is exercised, what is not declared must
refuse. A case that cannot be run says why it is skipped. Does not: judge speed, pull plugs (that is the campaigns'
work). Needs pytest; nothing else in mist does.
"""

from __future__ import annotations

import pytest

for _part in ("harness", "append", "reading", "positions", "identity", "delivery", "consuming", "checkpoints",
              "erasing", "lifecycle", "sharing", "storage"):  # fmt: skip
    pytest.register_assert_rewrite(f"mist.testing.conformance.{_part}")

from mist.testing.conformance.append import Append  # noqa: E402
from mist.testing.conformance.checkpoints import CheckpointStore  # noqa: E402
from mist.testing.conformance.consuming import Consuming  # noqa: E402
from mist.testing.conformance.delivery import DeliveryState  # noqa: E402
from mist.testing.conformance.erasing import Erasing  # noqa: E402
from mist.testing.conformance.harness import Env, Harness, case  # noqa: E402
from mist.testing.conformance.identity import Identity  # noqa: E402
from mist.testing.conformance.lifecycle import Lifecycle  # noqa: E402
from mist.testing.conformance.positions import Positions  # noqa: E402
from mist.testing.conformance.reading import Reading  # noqa: E402
from mist.testing.conformance.sharing import Sharing  # noqa: E402
from mist.testing.conformance.storage import Storage  # noqa: E402

__all__ = ["BrokerConformance", "Env", "Harness", "case"]


class BrokerConformance(
    Append,
    Reading,
    Positions,
    Identity,
    DeliveryState,
    Consuming,
    CheckpointStore,
    Erasing,
    Lifecycle,
    Sharing,
    Storage,
    Harness,
):
    """Subclass it in a test module, under a name that begins with Test."""
