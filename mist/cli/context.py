"""`mist context`: broker URLs under names, one of them selected. Kept in the user's configuration directory."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mist.cli.session import current
from mist.cli.wrap import noun
from mist.config import Context, Contexts, load_contexts, save_contexts
from mist.errors import InvalidArgument, NotFound
from mist.protocol.subject import check_name
from mist.protocol.url import parse_url, redact

app = noun("Named broker URLs.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="The context's name.")]


def _shape(name: str, context: Context, contexts: Contexts) -> dict[str, Any]:
    return {
        "name": name,
        "url": redact(context.url),
        "description": context.description,
        "selected": name == contexts.selected,
    }


def _found(contexts: Contexts, name: str) -> Context:
    context = contexts.contexts.get(name)
    if context is None:
        there = ", ".join(sorted(contexts.contexts)) or "none"
        raise NotFound(f"no context {name}; there are: {there}", hint=f"`mist context save {name} URL` makes it")
    return context


@app.command("ls")
def ls() -> None:
    """List the contexts.

    Examples:
      mist context ls
    """
    contexts = load_contexts()
    rows = [_shape(name, c, contexts) for name, c in sorted(contexts.contexts.items())]
    current().out.rows(
        rows, ["name", "url", "selected", "description"], empty="no contexts; `mist context save` makes one"
    )


@app.command("save")
def save(
    name: Name,
    url: Annotated[str, typer.Argument(metavar="URL", help="The broker's URL; without secrets.")],
    description: Annotated[str, typer.Option("--description", metavar="TEXT", help="What it is.")] = "",
    select: Annotated[bool, typer.Option("--select", help="Use it from now on.")] = False,
) -> None:
    """Save a broker's URL under a name; an existing one is replaced.

    A URL with a password is refused: the file is no place for secrets, MIST_URL is.

    Examples:
      mist context save lab log:/srv/mist --select
      mist context save prod nats://nats.example:4222 --description 'the cluster'
    """
    if redact(url) != url:
        raise InvalidArgument("this URL holds a secret", hint="put the whole URL into MIST_URL instead")
    parse_url(url)
    contexts = load_contexts()
    saved = Contexts(
        selected=name if select else contexts.selected,
        contexts=contexts.contexts | {check_name(name): Context(url=url, description=description)},
    )
    path = save_contexts(saved)
    current().out.outcome(f"saved {name} in {path}{', selected' if select else ''}")


@app.command("select")
def select(name: Annotated[str, typer.Argument(metavar="NAME", help="The context; none = no context.")] = "") -> None:
    """Use a context from now on. Without a name no context is used.

    Examples:
      mist context select lab
      mist context select
    """
    contexts = load_contexts()
    if name:
        _found(contexts, name)
    save_contexts(Contexts(selected=name, contexts=contexts.contexts))
    current().out.outcome(f"using {name} ({redact(contexts.contexts[name].url)})" if name else "using no context")


@app.command("show")
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="The selected one if absent.")] = "") -> None:
    """Show a context.

    Examples:
      mist context show
      mist context show lab --format json
    """
    contexts = load_contexts()
    name = name or contexts.selected
    if not name:
        raise NotFound("no context is selected", hint="`mist context ls` shows them")
    current().out.item(_shape(name, _found(contexts, name), contexts))


@app.command("rm")
def rm(name: Name) -> None:
    """Forget a context.

    Examples:
      mist context rm lab -y
    """
    session = current()
    contexts = load_contexts()
    _found(contexts, name)
    session.confirm(f"forget context {name}")
    rest = {k: v for k, v in contexts.contexts.items() if k != name}
    save_contexts(Contexts(selected="" if contexts.selected == name else contexts.selected, contexts=rest))
    session.out.outcome(f"forgot {name}")
