"""compose/ and its test, as far as they can be looked at without an engine. `make compose-test` runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import compose_test, stand_ins

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "compose").glob("*.yaml"))


def anchors(text: str) -> dict[str, str]:
    """The shared blocks of a compose file, each with what it takes from others."""
    found: dict[str, str] = {}
    for name, block in re.findall(r"^x-\w+: &(\w+)\n((?:  .*\n)+)", text, re.MULTILINE):
        inherited = "".join(found[n] for n in re.findall(r"<<: \*(\w+)", block))
        found[name] = block + inherited
    return found


def services(text: str) -> dict[str, str]:
    """Each service with what it takes from the shared blocks."""
    shared = anchors(text)
    body = text.split("\nservices:\n")[1].split("\nvolumes:\n")[0]
    return {
        name: block + "".join(shared[n] for n in re.findall(r"<<: \*(\w+)", block))
        for name, block in re.findall(r"^  (\w+):\n((?:    .*\n|\n)+)", body, re.MULTILINE)
    }


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_service_is_hardened_and_bounded(file: Path) -> None:
    """Not root, read-only, no capabilities, limits on memory, cpus and processes; and nothing listens for the world."""
    text = file.read_text()
    found = services(text)
    assert {"door", "tokentrace"} < set(found)
    for name, block in found.items():
        for key in (
            "read_only: true",
            "cap_drop: [ALL]",
            "no-new-privileges:true",
            "mem_limit:",
            "cpus:",
            "pids_limit:",
        ):
            assert key in block, f"{name} has no {key}"
        user = re.search(r'user: "(\d+):\d+"', block)
        assert user, name
        assert user[1] != "0"
        assert "healthcheck:" in block or "image: mist-stack:local" in block
    published = re.findall(r'^ +- "(\S+):\d+"$', text, re.MULTILINE)
    assert published
    assert all(p.startswith("127.0.0.1:") for p in published)
    assert "version:" not in text  # obsolete for one program, optional for the other


def test_the_services_are_the_tools_of_mist_up() -> None:
    """Each line of the table runs in one service, but the evals: they serve suites, which are files of the user's."""
    from mist.cli.up import TOOLS

    for file in FILES:
        named = re.findall(r'"--tools", "([\w,]+)"', file.read_text())
        assert sorted(",".join(named).split(",")) == sorted(TOOLS.keys() - {"matchspec"})


def test_base_images_are_pinned_to_a_version() -> None:
    """No `latest`, no bare major."""
    images = compose_test.pinned()
    assert len(images) == 3
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+", image), image
        assert image.split(":")[0].split("/")[-1] in stand_ins.MAKERS


def test_the_servers_sync_what_they_acknowledge() -> None:
    """In every configuration."""
    for file in (ROOT / "compose/nats").glob("*.conf"):
        assert "sync_interval: always" in file.read_text(), file
    redis = (ROOT / "compose/redis/redis.conf").read_text()
    assert re.search(r"^appendonly yes$", redis, re.MULTILINE)
    assert re.search(r"^appendfsync always$", redis, re.MULTILINE)
    assert re.search(r"^maxmemory-policy noeviction$", redis, re.MULTILINE)


def test_what_the_image_copies_is_let_into_its_build() -> None:
    """.dockerignore lets in what the Dockerfile copies, and no more."""
    copied = [
        w
        for line in re.findall(r"^COPY (?!--)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for w in line.split()
    ]
    let_in = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(let_in)
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize(
    ("path", "says"), [("", "no docker on PATH"), ("docker", "no engine answers")], ids=["no docker", "no engine"]
)
def test_it_says_clearly_when_it_cannot_run(path: str, says: str, tmp_path: Path) -> None:
    """Its own exit code, and what is missing."""
    if path:
        (tmp_path / "docker").write_text("#!/bin/sh\necho 'is the daemon running?' >&2\nexit 1\n")
        (tmp_path / "docker").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "scripts/compose_test.py"], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == compose_test.CANNOT
    assert "cannot run here" in done.stderr
    assert says in done.stderr


def test_an_image_nobody_can_stand_in_for(tmp_path: Path) -> None:
    """Named, and nothing is made."""
    with pytest.raises(stand_ins.CannotBuild, match="oracle"):
        stand_ins.build(["false"], "oracle:1.2.3", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_ldd_prints_is_read() -> None:
    """Paths of libraries and of the loader; not the kernel's, not what is missing."""
    lines = [
        "\tlinux-vdso.so.1 (0x1)",
        "\tlibm.so.6 => /lib/libm.so.6 (0x2)",
        "\tlibgone.so => not found",
        "\t/lib64/ld-linux-x86-64.so.2 (0x3)",
        "\tstatically linked",
    ]
    assert stand_ins.needed(lines) == ["/lib/libm.so.6", "/lib64/ld-linux-x86-64.so.2"]
