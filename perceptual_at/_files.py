"""Files that are either whole or not there."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from perceptual_at import _check


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Whatever stood at `path` stays untouched until then. Missing folders are made. A link stays and its target is
    replaced; what is no file (a folder, a device, a pipe) is not replaced at all.

    Args:
        path: where the finished file belongs.

    Yields:
        Where to write.

    Raises:
        OSError: if `path` is something other than a file, or cannot be written.

    Examples:
        >>> import tempfile
        >>> from perceptual_at.checkpoints import written_whole
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_whole(f"{folder}/a.txt") as path:
        ...         _ = path.write_text("all of it")
        ...     (path.parent / "a.txt").read_text()
        'all of it'
    """
    check_file("written_whole", "path", path)
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    beside = Path(name)
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_file(function: str, name: str, path: str | os.PathLike[str]) -> None:
    """Refuse a path at which there is something other than a file, without opening it: a device may never end."""
    _check.path(function, name, path)
    if Path(path).exists() and not stat.S_ISREG(Path(path).stat().st_mode):
        kind = "a folder" if Path(path).is_dir() else "no regular file"
        raise FileExistsError(f"{function}: `{name}` must be a file, but {os.fspath(path)!r} is {kind}.")
