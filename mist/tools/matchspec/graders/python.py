"""A function of the user's as a grader.

`function` is `module:name` or `file.py:name` (a file of the suite's folder). It is called with the GradeInput and gives
a bool, a score from 0 to 1, or a Verdict; anything else, and any exception, is an error of the grader.

The contract: a plain function is called in a thread, several at a time (as many as the harness's `concurrency`); a coroutine
function is awaited in the event loop of the run, and must not block it. Either has the harness's `timeout_s`; one that takes
longer is an error of the grader, and a thread it holds is left behind (kit/aside.py). It runs in the program that
grades, with all its rights: run suites of people you trust. The source file it stands in is part of the suite's digest.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from mist.errors import InvalidArgument, MistError
from mist.kit.aside import aside
from mist.tools.matchspec.graders.base import EMPTY, Base, Share, decided, rated
from mist.tools.matchspec.grading import GradeInput, Verdict


def module_from(path: Path) -> ModuleType:
    """The module a Python file is, run once per content. Raises InvalidArgument with the line for whatever it raises."""
    try:
        source = path.read_bytes()
    except OSError as exc:
        raise InvalidArgument(f"{path}: cannot be read: {exc.strerror}") from exc
    name = f"matchspec_{path.stem}_{hashlib.sha256(str(path.resolve()).encode() + source).hexdigest()[:12]}"
    known = sys.modules.get(name)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidArgument(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except MistError:
        del sys.modules[name]
        raise
    except SyntaxError as exc:
        del sys.modules[name]
        at = {"line": str(exc.lineno or 1), "column": str(exc.offset or 1)}
        raise InvalidArgument(f"{path}:{at['line']}:{at['column']}: {exc.msg}", meta=at) from exc
    except Exception as exc:
        del sys.modules[name]
        line = line_of(exc, path)
        raise InvalidArgument(f"{path}:{line}: {type(exc).__name__}: {exc}", meta={"line": str(line)}) from exc
    return module


def line_of(exc: BaseException, path: Path) -> int:
    """The innermost line of the file that led to the exception."""
    line, at = 1, exc.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == str(path):
            line = at.tb_lineno
        at = at.tb_next
    return line


class Python(Base, frozen=True, kw_only=True, tag="python"):
    """`pass_score`: from which score on it passes, where the function gives a number."""

    kind: ClassVar[str] = "python"
    function: str
    pass_score: Share = 1.0

    def __post_init__(self) -> None:
        target, _, name = self.function.rpartition(":")
        if not target or not name.isidentifier():
            raise InvalidArgument(f"not a function: {self.function!r}", hint="write module:name or file.py:name")

    @property
    def reads_expected(self) -> bool:
        return False  # nobody but the function knows

    @property
    def folder(self) -> Path:
        """Where `file.py` lies; set by who loads the suite, and no part of its digest."""
        found: Path = self.__dict__.get("folder_of_suite", Path())
        return found

    def within(self, folder: Path) -> None:
        self.__dict__["folder_of_suite"] = folder

    def check(self, expected: str) -> None:
        _ = self.call

    @cached_property
    def _module(self) -> ModuleType:
        target = self.function.rpartition(":")[0]
        if target.endswith(".py"):
            return module_from(self.folder / target)
        try:
            return importlib.import_module(target)
        except MistError:
            raise
        except Exception as exc:
            raise self.wrong(f"module {target} cannot be imported: {type(exc).__name__}: {exc}") from exc

    @cached_property
    def call(self) -> Callable[[GradeInput], Any]:
        name = self.function.rpartition(":")[2]
        found = getattr(self._module, name, None)
        if not callable(found):
            raise self.wrong(f"no function {name} in {self.function.rpartition(':')[0]}")
        typed: Callable[[GradeInput], Any] = found
        return typed

    @cached_property
    def code(self) -> str:
        """The source of the file it stands in."""
        try:
            return Path(inspect.getsourcefile(self._module) or "").read_text(encoding="utf-8")
        except (OSError, TypeError, UnicodeDecodeError) as exc:
            raise self.wrong(f"no source of {self.function} that could be part of the digest") from exc

    def grade(self, given: GradeInput) -> Verdict:
        """Here and now, for who has one output and nothing else to do. Not for coroutine functions."""
        if not given.output or given.output.isspace():
            return EMPTY
        if inspect.iscoroutinefunction(self.call):
            raise self.wrong(f"{self.function} is a coroutine function: `grade_async` awaits it")
        try:
            return self._verdict(self.call(given), given)
        except MistError:
            raise
        except (Exception, SystemExit) as exc:
            raise self.wrong(f"{type(exc).__name__}: {exc}") from exc

    def heavy(self, given: GradeInput) -> bool:
        return True  # for all we know

    async def grade_async(self, given: GradeInput) -> Verdict:
        if not given.output or given.output.isspace():
            return EMPTY
        if not inspect.iscoroutinefunction(self.call):
            return await aside(lambda: self.grade(given))
        try:
            return self._verdict(await self.call(given), given)
        except MistError:
            raise
        except Exception as exc:
            raise self.wrong(f"{type(exc).__name__}: {exc}") from exc

    def _verdict(self, found: Any, given: GradeInput) -> Verdict:
        match found:
            case bool():
                return decided(found, given.output)
            case int() | float() if 0.0 <= found <= 1.0:
                return rated(float(found), self.pass_score, given.output)
            case Verdict() if 0.0 <= found.score <= 1.0:
                return found
        raise self.wrong(f"{self.function} gave {str(found)[:80]!r}, not a bool, a score from 0 to 1, or a Verdict")
