"""`mist dev`: a NATS or Redis server on this machine, from PATH or a wheel, with settings that keep what is acknowledged."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mist.cli.session import current
from mist.cli.wrap import noun
from mist.errors import InvalidArgument, NotFound, Unavailable

if TYPE_CHECKING:
    from mist.cli._dev_place import Held
    from mist.kit.local import LocalServer

app = noun("Local servers for development: no Docker, nothing to configure.")

WELL_KNOWN = {"nats": 4222, "redis": 6379}
MONITOR = 8222

DirOption = Annotated[
    str, typer.Option("--dir", metavar="DIR", help="Where its data lie; default: the user's state directory.")
]
PortOption = Annotated[
    int | None,
    typer.Option(
        "--port", min=0, max=65535, metavar="N",
        help="Default: the port of the last time there, else the usual one, else a free one. 0 = any free one.",
    ),
]  # fmt: skip
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="A new empty directory, removed when the server is stopped.")
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Return when it answers; `mist dev stop` stops it.")]


@app.command()
async def nats(
    dir: DirOption = "", port: PortOption = None, fresh: FreshOption = False, detach: DetachOption = False
) -> None:
    """Run a NATS server with JetStream until it is stopped: SIGINT, SIGTERM or `mist dev stop nats`.

    Every acknowledged message is synced to the disk (sync_interval: always), a record may have 11 MiB, and only this
    machine can connect. The URL is on stdout, with --format json an object. The data stay for the next time.

    Examples:
      mist dev nats
      mist dev nats --port 4333 --dir ./nats-data
      export MIST_URL="$(mist dev nats --detach)"
    """
    await _serve("nats", dir, port, fresh, detach)


@app.command()
async def redis(
    dir: DirOption = "", port: PortOption = None, fresh: FreshOption = False, detach: DetachOption = False
) -> None:
    """Run a Valkey or Redis server until it is stopped: SIGINT, SIGTERM or `mist dev stop redis`.

    Every acknowledged write is synced to the disk (appendonly yes, appendfsync always), nothing is evicted, and only
    this machine can connect. The URL is on stdout, with --format json an object. The data stay for the next time.

    Examples:
      mist dev redis
      mist dev redis --fresh --format json
      export MIST_URL="$(mist dev redis --detach)"
    """
    await _serve("redis", dir, port, fresh, detach)


@app.command()
def ls() -> None:
    """List the directories of development servers, and which of them has a running one.

    Example:
      mist dev ls --format json
    """
    from mist.cli import _dev_place as place

    rows = []
    for folder in place.directories():
        holder = place.said(folder)
        running = place.taken(folder)
        rows.append(
            {
                "name": folder.name,
                "state": "running" if running and holder else "starting" if running else "stopped",
                "url": holder.url if holder else None,
                "pid": holder.pid if holder and running else None,
                "directory": str(folder),
            }
        )
    current().out.rows(
        rows, ["name", "state", "url", "pid", "directory"], empty=f"no server was started yet; {place.root()} is empty"
    )


@app.command()
def stop(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="As `mist dev ls` shows them: nats, redis, …")
    ] = None,
    dir: Annotated[str, typer.Option("--dir", metavar="DIR", help="The server of this directory.")] = "",
    all: Annotated[bool, typer.Option("--all", help="Every running server of `mist dev ls`.")] = False,
) -> None:
    """Stop servers cleanly: SIGTERM, and SIGKILL after 10 seconds. Their data stay, except those of --fresh.

    Examples:
      mist dev stop nats
      mist dev stop --all
    """
    from mist.cli import _dev_place as place

    out = current().out
    folders = [place.root() / name for name in names or ()]
    for name in names or ():
        if "/" in name or name in ("", ".", ".."):
            raise InvalidArgument(f"{name!r} is no name of `mist dev ls`", hint="for a directory: --dir")
    if dir:
        folders.append(Path(dir).absolute())
    if all:
        fresh = [f for f in place.directories() if (holder := place.said(f)) and holder.fresh]
        folders += [f for f in place.directories() if place.taken(f) or f in fresh]
    elif not folders:
        raise InvalidArgument("which server?", hint="`mist dev stop nats`, --dir DIR or --all")
    for folder in dict.fromkeys(folders):
        out.outcome(f"{folder.name}: {place.stop(folder)}")


async def _serve(server: str, dir: str, port: int | None, fresh: bool, detach: bool) -> None:
    """Start it, say so, and stay until it ends. Cancellation stops it cleanly."""
    from mist.cli import _dev_place as place

    if dir and fresh:
        raise InvalidArgument("--fresh makes a directory of its own", hint="leave --dir or --fresh out")
    out = current().out
    with ExitStack() as stack:
        folder = place.fresh(server) if fresh else Path(dir).absolute() if dir else place.root() / server
        if fresh:
            stack.callback(place.remove, folder)
        before = place.said(folder)
        lock = stack.enter_context(place.held(folder))
        local = _made(server, folder, port, before)
        local.inherited = (lock.fileno(),)
        try:
            await asyncio.to_thread(local.start)
            monitor = getattr(local, "monitor_port", 0)
            document: dict[str, Any] = {
                "server": local.name, "url": local.url, "port": local.port, "pid": local.pid, "directory": str(folder),
            }  # fmt: skip
            place.say(lock, place.Held(**document, monitor_port=monitor, fresh=fresh))
            out.value(local.url, document)
            out.flush()
            _explain(local, document["pid"], folder, detach, place.stop_command(folder))
            if detach:
                local.leave()
                stack.pop_all()  # the directory stays, and the descriptor closes with us: the server has its own
                return
            code = await asyncio.to_thread(local.wait)
        finally:
            await asyncio.shield(asyncio.to_thread(local.stop))
    if code != 0:
        raise Unavailable(f"{local.name} ended with {code}: {local.log_tail()}", hint=f"its log: {local.log}")
    out.note(f"{local.name} was stopped")


def _made(server: str, folder: Path, given: int | None, before: Held | None) -> LocalServer:
    """The server, not started, at the ports it had before where they are free: saved URLs go on to be right."""
    from mist.kit.local import nats_server, redis_server

    port = _port(given, before.port if before else 0, WELL_KNOWN[server])
    try:
        if server == "nats":
            monitor = _free_of(before.monitor_port if before else 0, 0 if given == 0 else MONITOR)
            return nats_server(folder, port=port, monitor_port=monitor)
        return redis_server(folder, port=port)
    except NotFound as exc:
        raise NotFound(exc.message, hint=f"{exc.hint}, or put the server on PATH") from exc


def _port(given: int | None, before: int, usual: int) -> int:
    """The port to listen on. Raises Unavailable when the one that was asked for is taken."""
    from mist.kit.local import free_port, port_is_free

    if given:
        if not port_is_free(given):
            raise Unavailable(f"port {given} is taken", hint="another --port; 0 takes a free one")
        return given
    if given == 0:
        return free_port()
    port = _free_of(before, usual)
    if port not in (before, usual):
        current().out.note(f"port {before or usual} is taken: using {port}")
    return port


def _free_of(*wanted: int) -> int:
    """The first of these ports that is free, or any free one."""
    from mist.kit.local import free_port, port_is_free

    return next((p for p in wanted if p and port_is_free(p)), 0) or free_port()


def _explain(local: LocalServer, pid: int, folder: Path, detach: bool, stop_command: str) -> None:
    out = current().out
    out.note(f"{local.name} (pid {pid}) keeps its data in {folder}; every acknowledged write is synced to the disk")
    out.note(f"use it:  mist -u '{local.url}' stream ls     or  export MIST_URL='{local.url}'")
    out.note(f"stop it: {stop_command}" + ("" if detach else "  or Ctrl-C"))
