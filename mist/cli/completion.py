"""`mist completion`: the scripts, and what they ask at run time.

A script calls `mist __complete WORDS… CURRENT` and gets candidates, one per line. Commands, verbs and options come from
the commands themselves; names of streams, consumers and cursors from the broker, within 300 ms. Anything that goes
wrong while completing is silence: a shell prompt is no place for our errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mist.cli.main import ALIASES, COMMANDS, GLOBALS, split_globals
from mist.cli.session import current, start
from mist.errors import MistError

if TYPE_CHECKING:
    from mist.cli.render import Output

BUDGET_S = 0.3


class Shell(StrEnum):
    bash = "bash"
    zsh = "zsh"
    fish = "fish"


SCRIPTS = {
    Shell.bash: """\
_mist_complete() {
    local IFS=$'\\n' current="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=( $(compgen -W "$(mist __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" -- "$current") )
}
complete -o default -F _mist_complete mist
""",
    Shell.zsh: """\
#compdef mist
_mist() {
    local -a found
    found=("${(@f)$(mist __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[1]}" ]]; then compadd -- "${found[@]}"; else _files; fi
}
compdef _mist mist
""",
    Shell.fish: """\
function __mist_complete
    set -l words (commandline -opc)
    mist __complete $words[2..-1] (commandline -ct) 2>/dev/null
end
complete -c mist -a '(__mist_complete)'
""",
}


def command(shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> None:
    """Print the completion script of a shell. It completes commands, options, and names of streams and consumers.

    Examples:
      eval "$(mist completion bash)"
      mist completion zsh > ~/.zfunc/_mist
      mist completion fish > ~/.config/fish/completions/mist.fish
    """
    current().out.text(SCRIPTS[shell])


def complete(words: Sequence[str], out: Output) -> int:
    """Print the candidates for the last of `words`. Never fails."""
    try:
        for candidate in candidates(list(words)):
            out.text(candidate + "\n")
    except (Exception, SystemExit):  # noqa: S110 - promised: silent on failure, a prompt must not be disturbed
        pass
    return 0


def candidates(words: list[str]) -> list[str]:
    """What may stand where the last word is being typed."""
    *before, word = words or [""]
    found, rest = split_globals(before)
    if not rest:
        pool: Iterable[str] = GLOBALS if word.startswith("-") else COMMANDS
        return sorted(c for c in pool if c.startswith(word))
    name = ALIASES.get(rest[0], rest[0])
    if name not in COMMANDS:
        return []
    from mist.cli.wrap import load

    rest = rest[1:]
    target = load(name, rest[0] if rest else "")
    verbs: dict[str, Any] | None = getattr(target, "commands", None)
    if verbs is not None:
        inner, rest = split_globals(rest)
        found |= inner
        if not rest:
            return sorted(v for v in verbs if v.startswith(word))
        target = verbs.get(rest[0])
        rest = rest[1:]
        if target is None:
            return []
    return _of_command(target, rest, word, found)


def _of_command(target: Any, given: list[str], word: str, found: dict[str, Any]) -> list[str]:
    options = {o: p for p in target.params if p.param_type_name == "option" for o in (*p.opts, *p.secondary_opts)}
    arguments = [p for p in target.params if p.param_type_name == "argument"]
    if word.startswith("-"):
        return sorted(o for o in options if o.startswith(word) and o.startswith("--"))
    positional: list[str] = []
    waiting: Any = None
    for text in given:
        if waiting is not None:
            _note_global(found, waiting, text)
            waiting = None
        elif text.startswith("-") and text in options:
            waiting = None if options[text].is_flag else options[text]
        elif not text.startswith("-"):
            positional.append(text)
    if waiting is not None:
        return [c for c in _values(waiting) if c.startswith(word)]
    if len(positional) >= len(arguments):
        return []
    wanted = arguments[len(positional)]
    choices = _values(wanted)
    if choices:
        return [c for c in choices if c.startswith(word)]
    kind = (wanted.metavar or "").partition("|")[0]
    if kind in ("STREAM", "CONSUMER", "CURSOR", "SRC", "DST"):
        return [n for n in _names(kind, positional, found) if n.startswith(word)]
    if kind == "NAME" and COMMANDS:
        return [n for n in _contexts() if n.startswith(word)]
    return []


def _note_global(found: dict[str, Any], option: Any, text: str) -> None:
    for spelling in option.opts:
        if spelling in GLOBALS and GLOBALS[spelling][1]:
            found[GLOBALS[spelling][0]] = text


def _values(parameter: Any) -> list[str]:
    if "--format" in parameter.opts:
        from mist.cli.render import FORMATS

        return list(FORMATS)
    described = getattr(parameter, "type_descriptor", None)
    choices = getattr(described, "choices", None) or getattr(getattr(parameter, "type", None), "choices", None) or ()
    return [str(getattr(c, "value", c)) for c in choices]


def _contexts() -> list[str]:
    from mist.config import load_contexts

    return sorted(load_contexts().contexts)


def _names(kind: str, positional: list[str], found: dict[str, Any]) -> list[str]:
    """Names from the broker, or nothing when it does not answer in time."""

    async def ask() -> list[str]:
        session = start(found)
        async with session:
            broker = await session.connect()
            if kind == "CONSUMER" and positional:
                return await (await session.stream(positional[0])).consumers()
            if kind == "CURSOR" and positional:
                return [c.name for c in await broker.checkpoints.list(positional[0])]
            return await broker.streams()

    async def bounded() -> list[str]:
        async with asyncio.timeout(BUDGET_S):
            return await ask()

    try:
        return asyncio.run(bounded())
    except (MistError, TimeoutError, OSError):
        return []
