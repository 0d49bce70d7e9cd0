"""The device whose power is cut loses what was not flushed, and nothing else; the log on it loses nothing."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from . import cutdisk, power
from .cutdisk import BLOCK, ROOT, CutDisk, Device, missing, private_mounts

needs_root = pytest.mark.skipif(bool(missing()), reason=missing() or "it can be made here")


def in_a_process(*argv: str, timeout_s: float = 100) -> str:
    """Mounts belong to a process of their own, never to pytest's."""
    done = subprocess.run(
        [sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _blocks(tmp_path: Path) -> tuple[Device, Path]:
    for name in ("now", "stable"):
        (tmp_path / name).write_bytes(bytes(16 * BLOCK))
    return Device(-1, str(tmp_path / "now"), str(tmp_path / "stable")), tmp_path / "stable"


def _write(at: int, data: bytes) -> bytes:
    return struct.pack("<QQI20x", 1, at * BLOCK, len(data)) + data


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_cache_of_the_device_is_volatile(share: float, tmp_path: Path) -> None:
    """Flushed blocks stay, of the others each survives whole or not at all, and then nothing is taken any more."""
    device, stable = _blocks(tmp_path)
    assert device.write(_write(0, b"a" * BLOCK * 2)) == struct.pack("<II", 2 * BLOCK, 0)
    assert device.flush() == b""
    device.write(_write(1, b"b" * BLOCK * 8))
    assert device.read(struct.pack("<QQI", 1, 0, 3 * BLOCK)) == b"a" * BLOCK + b"b" * BLOCK * 2
    happened = device.cut(share, 4)
    assert (happened["writes"], happened["flushes"], happened["unflushed"]) == (2, 1, 8 * BLOCK)
    assert device.write(_write(0, b"c")) == device.flush() == errno.EIO
    found = stable.read_bytes()
    assert found[:BLOCK] == b"a" * BLOCK
    old = [b"a" * BLOCK, *[bytes(BLOCK)] * 7]
    kept = [found[(1 + i) * BLOCK : (2 + i) * BLOCK] == b"b" * BLOCK for i in range(8)]
    assert all(k or found[(1 + i) * BLOCK : (2 + i) * BLOCK] == old[i] for i, k in enumerate(kept))
    assert happened["kept"] == sum(kept) * BLOCK
    assert any(kept) == (share > 0)
    assert all(kept) == (share == 1)


def test_a_full_cache_is_written_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest first: memory is bounded, and a device may do that at any time."""
    monkeypatch.setattr(cutdisk, "CACHE_BYTES_MAX", 2 * BLOCK)
    device, stable = _blocks(tmp_path)
    for i in range(4):
        device.write(_write(i, b"%d" % i * BLOCK))
    device.cut(0.0, 1)
    assert stable.read_bytes()[: 4 * BLOCK] == b"0" * BLOCK + b"1" * BLOCK + bytes(2 * BLOCK)


@needs_root
@pytest.mark.parametrize("share", ["0.0", "0.5", "1.0"])
def test_what_was_not_flushed_is_gone(share: str, tmp_path: Path) -> None:
    """And what was is there, whatever becomes of the rest; after the cut nothing is acknowledged any more."""
    assert "as it should be" in in_a_process("tests.campaigns.test_power", str(tmp_path), share)


def _scenario(folder: Path, share: float) -> None:
    private_mounts()
    with CutDisk(folder / "device", size_bytes=64 << 20) as disk:
        synced = os.open(disk.path / "synced", os.O_CREAT | os.O_RDWR)
        for i in range(20):
            os.pwrite(synced, bytes([i]) * 5000, i * 5000)
            os.fsync(synced)
        os.pwrite(synced, b"not yet" * 1000, 0)
        cached = os.open(disk.path / "cached", os.O_CREAT | os.O_RDWR)
        os.write(cached, b"x" * 100_000)
        happened = disk.cut(share=share, seed=1)
        for fd in (synced, cached):
            try:
                os.fsync(fd)
            except OSError:
                pass
            else:
                raise AssertionError("a sync succeeded without power")
            os.close(fd)
        assert happened["flushes"] >= 20
        after = folder / "after"
        disk.remount(after)
        found = (after / "synced").read_bytes()
        assert found[7000:] == b"".join(bytes([i]) * 5000 for i in range(20))[7000:], "something synced is gone"
        gone = not (after / "cached").exists() or (after / "cached").stat().st_size == 0
        assert gone, "a file that nobody synced is there"
    print("as it should be")


@needs_root
def test_the_log_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cut for each of its two ends: everything unflushed gone, and some of it."""
    monkeypatch.setenv("MIST_CAMPAIGN_DIR", str(tmp_path))
    said = in_a_process("tests.campaigns.power", "--only", "log:, power", "--rounds", "2", "--seconds", "1")
    assert "| log:    | power (default) | 2 " in said


def test_it_says_when_it_cannot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An exit code of its own and a sentence, not a figure."""
    monkeypatch.setattr(power, "missing", lambda: "this needs root")
    assert power.main([]) == power.CANNOT
    assert capsys.readouterr().err == "no power cut can be made here: this needs root\n"


if __name__ == "__main__":
    _scenario(Path(sys.argv[1]), float(sys.argv[2]))
