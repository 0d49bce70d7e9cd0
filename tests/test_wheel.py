"""The built wheel, not the checkout: what is in it, and that it works in an environment of its own. No network."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this checkout by its own backend."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=ROOT, check=True)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; it borrows the dependencies of this one, and sees no checkout."""
    home = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    subprocess.run(
        [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python),
            "install", "--quiet", "--no-index", "--no-deps", str(wheel),
        ],
        check=True,
    )  # fmt: skip
    site = ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    # a path file names a folder, and path files inside that folder (our editable install) are not followed
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def ask(python: Path, code: str) -> str:
    """What a piece of code prints there, in isolated mode and far from the checkout."""
    return subprocess.run(
        [str(python), "-I", "-c", code], cwd=python.parent, check=True, capture_output=True, text=True
    ).stdout.strip()


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Adapters keep their own top-level names; tests, bench, scripts and a `brokers` package are not shipped."""
    top = {name.partition("/")[0] for name in names(wheel)}
    packages = {t for t in top if not t.endswith(".dist-info")}
    assert "mist" in packages
    assert packages <= {"mist", "mist_nats", "mist_redis", "mist_pytest"}
    assert not [n for n in names(wheel) if n.endswith((".pyc", ".so")) or "__pycache__" in n]


def test_the_wheel_is_typed_licensed_and_complete(wheel: Path) -> None:
    """py.typed, the licence and every module of the checkout's mist/ are inside."""
    held = set(names(wheel))
    assert "mist/py.typed" in held
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in held)
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mist").rglob("*.py")}
    assert modules <= held


def test_the_metadata_states_name_python_and_entry_points(wheel: Path) -> None:
    """The distribution is mist-stack; the console script and the brokers arrive through entry points."""
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        meta = Parser().parsestr(archive.read(info).decode())
        points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert meta["Name"] == "mist-stack"
    assert meta["Requires-Python"] == ">=3.11"
    core = [r for r in meta.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert any(r.startswith("msgspec") for r in core)
    assert not any(r.startswith(("nats", "redis", "starlette", "httpx")) for r in core)
    assert "mist = mist.cli.main:main" in points
    assert "[mist.brokers]" in points
    assert "memory = " in points
    assert "matchspec = mist_pytest" in points


def test_the_installed_wheel_imports_light_and_is_not_the_checkout(installed: Path) -> None:
    """`import mist` works there, comes from the wheel, and loads msgspec and the standard library only."""
    code = (
        "import sys, json; before = set(sys.modules); import mist; "
        "print(json.dumps([mist.__file__, mist.__version__, sorted(set(sys.modules) - before)]))"
    )
    where, version, loaded = json.loads(ask(installed, code))
    assert Path(where).is_relative_to(installed.parents[1])
    assert version
    foreign = {n.partition(".")[0] for n in loaded} - sys.stdlib_module_names
    # msgspec itself takes typing_extensions where somebody installed it
    assert foreign - {"typing_extensions"} == {"mist", "msgspec"}


def test_the_installed_wheel_connects_through_its_entry_points(installed: Path) -> None:
    """A broker URL finds its adapter in the installed metadata, and a record makes the round trip."""
    code = (
        "import asyncio, mist\n"
        "async def main():\n"
        "    async with mist.connect('memory:') as broker:\n"
        "        stream = await broker.open('s')\n"
        "        await stream.append([mist.Message('a.b', b'x')])\n"
        "        print((await stream.read()).records[0].data)\n"
        "asyncio.run(main())"
    )
    assert ask(installed, code) == "b'x'"


def test_nobody_can_import_brokers_from_the_wheel(installed: Path) -> None:
    """`brokers/` is a source root, not a package."""
    assert ask(installed, "import importlib.util as u; print(u.find_spec('brokers'))") == "None"


@pytest.mark.skipif(importlib.util.find_spec("mist.cli.main") is None, reason="this checkout has no command line yet")
@pytest.mark.parametrize("argument", ["--help", "version"])
def test_the_installed_command_answers(installed: Path, argument: str) -> None:
    """The console script starts and ends with 0, outside of any checkout."""
    done = subprocess.run(
        [str(installed.parent / "mist"), argument], cwd=installed.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
