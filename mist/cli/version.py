"""`mist version`."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

from mist import __version__
from mist.cli.session import current
from mist.protocol.version import MAX, MIN

PACKAGES = (
    "msgspec",
    "google-crc32c",
    "typer",
    "rich",
    "nats-py",
    "redis",
    "httpx",
    "starlette",
    "uvloop",
    "zstandard",
)


def command() -> None:
    """Print the version; with --verbose or --format json also Python's, the packages' and the protocol's.

    Examples:
      mist version
      mist version --format json
    """
    out = current().out
    row: dict[str, object] = {
        "version": __version__,
        "protocol": str(MAX) if MIN == MAX else f"{MIN}-{MAX}",
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "brokers": sorted({p.name for p in entry_points(group="mist.brokers")} | {"log", "memory"}),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }
    if out.format in ("table", "raw"):
        out.text(f"mist {__version__}\n")
        if out.verbose:
            out.item({k: v for k, v in row.items() if k != "version"})
    else:
        out.item(row)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
