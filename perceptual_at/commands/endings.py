"""How a command ends: with a result, or with one line that says what to do."""

import contextlib
import errno
import os
import re
import signal
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

SHOWN = "PERCEPTUAL_AT_TRACEBACK"
"""Environment variable with which an error that nobody foresaw shows its traceback."""


class Stopped(RuntimeError):
    """The command cannot go on; the message says why and what to do."""


class Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


def in_words(error: BaseException) -> str:
    """An error's message on one line, without the name of the internal function or a worker's traceback."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # colours
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "Original Traceback" in str(error):  # from a worker of a DataLoader
        lines = [re.sub(r"^\w+(\.\w+)*: ", "", lines[-1])]
    return " ".join(lines) or type(error).__name__


@contextlib.contextmanager
def said(command: str, again: str = "") -> Iterator[None]:
    """Turn what ends a command early into one line and an exit status: 1, 2 for bad words, 130 and 143 for signals."""
    before = _on_sigterm()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: what is left to print goes nowhere, also at the interpreter's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(f"{command}: nobody reads what it prints. {again}", 141)
    except KeyboardInterrupt:
        _leave(f"{command}: interrupted. {again}", 130)
    except Terminated:
        _leave(f"{command}: told to end (SIGTERM). {again}", 143)
    except (Stopped, OSError, ValueError, TypeError, ImportError) as error:
        _leave(f"{command}: {in_words(error)}", 1)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "allocate memory", "DataLoader worker")):
            _unforeseen(command, error)
        _leave(f"{command}: {in_words(error)[:300]}. A smaller --batch, or fewer --workers, needs less.", 1)
    except MemoryError:
        _leave(f"{command}: out of memory. A smaller --batch, or --stream for images, needs less.", 1)
    except Exception as error:
        _unforeseen(command, error)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _unforeseen(command: str, error: Exception) -> None:
    """An error of this program's, or of a network's own code: where it happened is shown to who asks."""
    if os.environ.get(SHOWN):
        raise error
    _leave(f"{command}: {type(error).__name__}: {in_words(error)[:300]} ({SHOWN}=1 shows where.)", 1)


def _leave(line: str, status: int) -> None:
    sys.stdout.flush()
    print(line.strip().encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)
    raise SystemExit(status)


def _on_sigterm() -> Any:
    """Let SIGTERM raise here, so that files are left whole; None where that is not possible."""

    def terminated(number: int, frame: types.FrameType | None) -> None:  # noqa: ARG001
        raise Terminated

    try:
        return signal.signal(signal.SIGTERM, terminated)
    except ValueError:  # not in the main thread
        return None


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Warnings as lines on standard error, and in a list for the record, each once."""
    lines: list[str] = []

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int,  # noqa: ARG001
             file: Any = None, line: str | None = None) -> None:  # noqa: ARG001  # fmt: skip
        text = " ".join(str(message).split())
        if text not in lines and issubclass(category, UserWarning):
            lines.append(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield lines


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Keep other processes away from a folder for as long as this one works in it, however it ends.

    Raises:
        Stopped: if another process works in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise Stopped(f"`{folder}` is no folder, or below a file; take another {what}.") from error
    with (folder / ".lock").open("a+b") as file:
        if not _lock(file):
            raise Stopped(f"another process is at work in `{folder}`; wait for it, or take another {what}.")
        _HELD.append(file)
        try:
            yield
        finally:
            _HELD.remove(file)


_HELD: list[IO[bytes]] = []
"""Locks of this process."""


def _let_go() -> None:
    """Close locks that were inherited: a loader's workers outlive a process that is killed by some seconds."""
    for file in _HELD:
        file.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(file: IO[bytes]) -> bool:
    """Whether the file could be locked; the system lets go of it when the process ends."""
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # file systems without locks are used as they are
    return True


def _lock_on_windows(file: IO[bytes]) -> bool:
    import msvcrt

    module: Any = msvcrt
    try:
        module.locking(file.fileno(), module.LK_NBLCK, 1)
    except OSError:
        return False
    return True
