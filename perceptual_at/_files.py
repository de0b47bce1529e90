"""Files that are either whole or not there."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Whatever stood at `path` stays untouched until then. Missing folders are made.

    Args:
        path: where the finished file belongs.

    Yields:
        Where to write.

    Examples:
        >>> import tempfile
        >>> from perceptual_at.checkpoints import written_whole
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written_whole(f"{folder}/a.txt") as path:
        ...         _ = path.write_text("all of it")
        ...     (path.parent / "a.txt").read_text()
        'all of it'
    """
    path = Path(path)
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
