"""Stand-ins for the base images of compose/, made of this machine's own files: for places where nothing can be pulled.

    stand_ins.build(docker, image, folder)

Each is a root file system put together from BusyBox and what the image is about (this interpreter with its standard
library, nats-server, valkey-server; from the wheels), imported with `docker import` under the pinned name and marked
with the label `mist.stand-in`. It answers the same commands at the same paths as far as the compose files use them; it
is not the image. The stand-in for Python carries the distributions of requirements.lock and an environment in which pip
takes only those, so that a build needs no network and its hashes are still compared.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

LABEL = "mist.stand-in"
ROOT = Path(__file__).resolve().parents[1]
BUILD_TOOLS = ("setuptools", "wheel")
"""What the lock's one sdist is built with."""
VALKEY = (999, 1000)
"""User and group of the Valkey image; its /data belongs to them."""
SKIPPED = ("test", "idlelib", "tkinter", "turtledemo", "site-packages", "__pycache__", "config-*")


class CannotBuild(Exception):
    """Something of this machine is missing; the message says what."""


def build(docker: list[str], image: str, folder: Path) -> None:
    """Make the stand-in for a pinned image and give it the image's name. Raises CannotBuild."""
    name = image.split(":")[0].split("/")[-1]
    if name not in MAKERS:
        raise CannotBuild(f"no stand-in is known for {image}")
    root = folder / name
    root.mkdir(parents=True)
    _base(root)
    changes = MAKERS[name](root)
    changes += [f"LABEL {LABEL}=1"]
    options = [word for change in changes for word in ("--change", change)]
    done = subprocess.Popen(
        [*docker, "import", *options, "-", image],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert done.stdin is not None  # noqa: S101
    with suppress(BrokenPipeError), tarfile.open(fileobj=done.stdin, mode="w|") as tar:
        tar.add(root, ".", filter=_owned)
    _, errors = done.communicate()
    if done.returncode:
        raise CannotBuild(f"docker import {image}: {errors.decode().strip()}")
    shutil.rmtree(root)


def _owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Everything is root's, but the directory a volume takes its owner from."""
    member.uid, member.gid = VALKEY if member.name == "./data" else (0, 0)
    member.uname = member.gname = ""
    return member


def _base(root: Path) -> None:
    """BusyBox as every command there is, users, and the directories a container needs."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise CannotBuild("no busybox on PATH (Debian: apt-get install busybox-static)")
    for name in ("bin", "etc", "proc", "sys", "dev", "var/tmp", "run", "root", "usr/local/bin"):
        (root / name).mkdir(parents=True, exist_ok=True)
    tmp = root / "tmp"
    tmp.mkdir()
    tmp.chmod(0o1777)
    _add(root, Path(busybox), "bin/busybox")
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/nsswitch.conf").write_text("hosts: files dns\n")


def _nats(root: Path) -> list[str]:
    _add(root, Path(_local("nats_binary")), "usr/local/bin/nats-server")
    # as the image's own: flags go to the server, anything else is a command
    entry = root / "usr/local/bin/docker-entrypoint.sh"
    entry.write_text('#!/bin/sh\ncase "$1" in -*|"") exec nats-server "$@" ;; esac\nexec "$@"\n')
    entry.chmod(0o755)
    return ['ENTRYPOINT ["docker-entrypoint.sh"]', 'CMD ["nats-server"]', "EXPOSE 4222", _PATH]


def _valkey(root: Path) -> list[str]:
    _add(root, Path(_local("redis_binary", "valkey")), "usr/local/bin/valkey-server")
    # enough of the client for a health check: words of one command, the answer as it comes
    client = root / "usr/local/bin/valkey-cli"
    client.write_text('#!/bin/sh\nprintf "%s\\r\\n" "$*" | nc -w 2 127.0.0.1 6379\n')
    client.chmod(0o755)
    data = root / "data"
    data.mkdir()
    return ['CMD ["valkey-server"]', "WORKDIR /data", "EXPOSE 6379", _PATH]


def _python(root: Path) -> list[str]:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = Path(sysconfig.get_path("stdlib"))
    target = root / "usr/local/lib" / version
    shutil.copytree(library, target, ignore=shutil.ignore_patterns(*SKIPPED), symlinks=True)
    packages = target / "site-packages"
    packages.mkdir()
    import pip

    shutil.copytree(Path(pip.__file__).parent, packages / "pip", ignore=shutil.ignore_patterns("__pycache__"))
    _add(root, Path(os.path.realpath(sys.executable)), f"usr/local/bin/{version}")
    for name in ("python3", "python"):
        (root / "usr/local/bin" / name).symlink_to(version)
    for extension in (target / "lib-dynload").glob("*.so"):
        _libraries(root, extension)
    for folder in (f"/lib/{_triplet()}", f"/usr/lib/{_triplet()}", "/lib64", "/usr/lib64"):
        for name in ASKED_FOR:
            if (found := Path(folder) / name).exists():
                _copy(root, found, f"usr/local/lib/{name}")
    wheels = root / "wheels-of-the-lock"
    _distributions(wheels)
    return [
        f'CMD ["{version}"]', _PATH, "ENV LD_LIBRARY_PATH=/usr/local/lib LANG=C.UTF-8",
        "ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels-of-the-lock",
    ]  # fmt: skip


ASKED_FOR = ("libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "libgcc_s.so.1", "libstdc++.so.6")
"""What extension modules in wheels are linked to, and the interpreter is not."""
MAKERS: dict[str, Callable[[Path], list[str]]] = {"nats": _nats, "valkey": _valkey, "python": _python}
_PATH = "ENV PATH=/usr/local/bin:/usr/bin:/bin"


def _distributions(folder: Path) -> None:
    """The files of the lock for this interpreter, checked against their hashes, by pip."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    for words in (["--require-hashes", "-r", str(ROOT / "requirements.lock")], list(BUILD_TOOLS)):
        done = subprocess.run([*pip, *words], capture_output=True, text=True)
        if done.returncode:
            raise CannotBuild(f"pip download {' '.join(words)}: {done.stderr.strip()[-400:]}")


def _local(finder: str, *words: str) -> str:
    from mist.errors import NotFound
    from mist.kit import local

    try:
        return str(getattr(local, finder)(*words))
    except NotFound as exc:
        raise CannotBuild(str(exc)) from exc


def _triplet() -> str:
    return sysconfig.get_config_var("MULTIARCH") or ""


def _add(root: Path, binary: Path, place: str) -> None:
    """An executable and the shared libraries it asks for."""
    real = Path(os.path.realpath(binary))
    _copy(root, real, place)
    (root / place).chmod(0o755)
    _libraries(root, real)


def _libraries(root: Path, binary: Path) -> None:
    for library in needed(subprocess.run(["ldd", str(binary)], capture_output=True, text=True).stdout.splitlines()):
        # a library from a place of its own (an interpreter's) would not be found there
        standard = library.startswith(("/lib", "/usr/lib"))
        _copy(root, Path(library), library.lstrip("/") if standard else f"usr/local/lib/{Path(library).name}")


def needed(lines: Iterable[str]) -> list[str]:
    """The paths in what `ldd` prints."""
    found = []
    for line in lines:
        words = line.split()
        path = words[2] if "=>" in words and len(words) > 2 else words[0] if words else ""
        if path.startswith("/"):
            found.append(path)
    return found


def _copy(root: Path, source: Path, place: str) -> None:
    target = root / place
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)  # what a link points to: one file, not a chain
        target.chmod(0o755)


def is_one(docker: list[str], image: str) -> bool:
    """Whether the image of that name is ours."""
    found = subprocess.run([*docker, "image", "inspect", image], capture_output=True, text=True)
    if found.returncode:
        return False
    labels = json.loads(found.stdout)[0]["Config"].get("Labels") or {}
    return LABEL in labels
