"""From plain functions to commands: option groups are spread out, global options added, coroutines run.

A command function takes typer parameters (`Annotated[...]`) and, for options that many commands share, parameters
annotated with an `OptionGroup`: each field of the group becomes an option of its own. In the docstring a paragraph
that starts with `Example:` or `Examples:` keeps its lines. This module is the only one that touches typer's machinery,
and only its public part.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, TypeVar, get_type_hints

import typer
from msgspec import NODEFAULT
from msgspec.structs import fields

from mist.cli.main import COMMANDS
from mist.cli.options import GlobalOptions, OptionGroup
from mist.cli.session import Session, start
from mist.errors import SequenceExpired
from mist.kit.signals import Interrupted, fast_loop, run

EPILOG = "Global options (-u -o -j -y --no-input -q -v --timeout) are accepted here too: see `mist --help`."
NOUN_EXAMPLES = 5
_GLOBAL = "global_"
F = TypeVar("F", bound=Callable[..., Any])


class UsageFault(Exception):
    """What the parser refused, as message and hint."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Job:
    """A parsed command: what is to be called with what, and the global options that came after the command."""

    def __init__(self, function: Callable[..., Any], values: dict[str, Any], given: dict[str, Any]) -> None:
        self.function = function
        self.values = values
        self.given = given


def serves(command: F) -> F:
    """Mark a command that serves others until it is stopped: it gets the faster event loop where there is one."""
    command.__serves__ = True  # type: ignore[attr-defined]
    return command


def noun(help: str) -> typer.Typer:
    """A Typer for a noun's verbs, with the settings that all of ours share."""
    return typer.Typer(
        help=help,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def load(name: str, verb: str = "") -> Any:
    """The parsed command object (a click-style command) of one entry of COMMANDS. Of a noun only `verb` is built, where it
    has it: the others are most of the time that a command takes before it does anything."""
    path, help = COMMANDS[name]
    module, _, attribute = path.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if not isinstance(target, typer.Typer):
        app = noun(help)
        app.command(name, epilog=EPILOG)(adapt(target))
        return _named(typer.main.get_command(app), name)
    for info in target.registered_commands:
        info.name = info.name or (info.callback and info.callback.__name__.replace("_", "-"))
    app = noun(target.info.help or help)
    app.registered_commands = [i for i in target.registered_commands if i.name == verb] or target.registered_commands
    app.callback()(lambda: None)  # a noun stays a noun when it has one verb
    examples: list[str] = []
    for info in app.registered_commands:
        if info.callback is not None and not hasattr(info.callback, "__mist__"):
            info.callback = adapt(info.callback)
            info.epilog = info.epilog or EPILOG
        text = inspect.cleandoc((info.callback and info.callback.__doc__) or "")
        info.short_help = info.short_help or _first_sentence(text)
        examples.append(_first_example(text))
    command = typer.main.get_command(app)
    command.help = command.help or help
    shown = [line for line in examples if line][:NOUN_EXAMPLES]
    command.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in shown) if shown else None
    return _named(command, name)


def _named(command: Any, name: str) -> Any:
    command.name = name
    settings = command.context_settings
    settings.setdefault("help_option_names", ["-h", "--help"])
    return command


def adapt(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as typer is to see it: groups spread, globals added, a coroutine run to its end."""
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, type[OptionGroup]] = {}
    parameters: list[inspect.Parameter] = []
    for p in signature.parameters.values():
        if isinstance(p.annotation, type) and issubclass(p.annotation, OptionGroup):
            groups[p.name] = p.annotation
            parameters.extend(_spread(p.annotation))
        else:
            parameters.append(p.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    parameters.extend(_spread(GlobalOptions, _GLOBAL))

    @wraps(function)
    def call(**values: Any) -> Job:
        given = {k[len(_GLOBAL) :]: values.pop(k) for k in list(values) if k.startswith(_GLOBAL)}
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        return Job(function, values, {k: v for k, v in given.items() if v not in (None, False)})

    call.__signature__ = signature.replace(parameters=parameters, return_annotation=Job)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": Job}
    call.__doc__ = _keep_examples(inspect.cleandoc(function.__doc__ or ""))
    call.__mist__ = True  # type: ignore[attr-defined]
    del call.__wrapped__
    return call


@cache
def _spread(group: type[OptionGroup], prefix: str = "") -> tuple[inspect.Parameter, ...]:
    hints = get_type_hints(group, include_extras=True)
    out = []
    for f in fields(group):
        default = f.default_factory() if f.default is NODEFAULT else f.default
        out.append(
            inspect.Parameter(
                prefix + f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[f.name]
            )
        )
    return tuple(out)


def _keep_examples(doc: str) -> str:
    """Paragraphs of examples keep their lines (the parser's own mark for that is a line with a backspace)."""
    parts = doc.split("\n\n")
    return "\n\n".join("\b\n" + p if p.startswith(("Example:", "Examples:")) else p for p in parts)


def _first_sentence(doc: str) -> str:
    """What stands behind a verb in its noun's help: whole, never cut by the parser."""
    paragraph = " ".join(doc.replace("\b\n", "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:;]) ", paragraph)[0].rstrip(".:;")


def _first_example(doc: str) -> str:
    """The first line of the examples."""
    found = re.search(r"^Examples?:\n +(.+)$", doc, re.MULTILINE)
    return found[1] if found else ""


def _call(function: Callable[..., Any], values: dict[str, Any], given: dict[str, Any]) -> int:
    """Run one command function in its session; returns the exit code."""
    session = start(given)

    async def work() -> Any:
        async with session:
            return await function(**values)

    if inspect.iscoroutinefunction(function):
        factory = fast_loop() if hasattr(function, "__serves__") else None
        return finish(session, lambda: run(work, timeout_s=session.timeout_s, loop_factory=factory))
    return finish(session, lambda: function(**values))


def finish(session: Session, work: Callable[[], Any]) -> int:
    """The exit code of a piece of work: its own, or the session's when it gives none, or 128 + signal."""
    try:
        result = work()
        session.out.flush()
    except Interrupted as exc:
        session.out.flush()
        session.say_resume()
        return exc.exit_code
    except BrokenPipeError:
        raise
    except SequenceExpired:
        session.out.flush()  # going on from there would meet the same error
        raise
    except BaseException:
        session.out.flush()
        session.say_resume()
        raise
    return result if isinstance(result, int) else session.exit_code


def parse_and_run(command: Any, args: Sequence[str], prog: str, found: dict[str, Any]) -> int:
    """Parse `args`, then run. Raises UsageFault for what the parser refuses.

    The command runs after the parser has returned: inside it, the parser's own ideas about broken pipes, interrupts and
    exit codes would come between us and them.
    """
    try:
        job = command.main(args=list(args), prog_name=prog, standalone_mode=False)
    except Exception as exc:
        raise _translate(exc, prog) from exc
    if isinstance(job, Job):
        return _call(job.function, job.values, found | job.given)
    return job if isinstance(job, int) else 0


def _translate(exc: Exception, prog: str) -> Exception:
    message = getattr(exc, "format_message", None)
    if message is None or getattr(exc, "exit_code", None) is None:
        return exc
    context = getattr(exc, "ctx", None)
    path = context.command_path if context is not None else prog
    if exc.__class__.__name__ == "NoArgsIsHelpError":
        return UsageFault(f"{path}: which verb?\n\n{message().rstrip()}", "")
    return UsageFault(f"{path}: {message().rstrip('.')}", f"see `{path} --help`")
