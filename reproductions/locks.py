"""Several processes on one folder: each training is claimed by one of them.

A claim ends with its process, also when that is killed. On Windows, which has no such locks, a folder is one process's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = "lock"


class Claims:
    """What this process has claimed in a folder: a byte of a file each, that is locked.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, Claims(Path(folder)) as claims:
        ...     claims.take("0123456789ab")
        True
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file: IO[bytes] = (folder / FILE).open("ab")

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()  # and with it all claims end

    def take(self, key: str) -> bool:
        """Claim a key, a hexadecimal number; False where another process has."""
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key, 16))
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        return True

    def give_back(self, key: str) -> None:
        if fcntl is not None:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, int(key, 16))


@contextmanager
def alone_in(file: IO[Any]) -> Iterator[None]:
    """While this holds, no other process is in this with the same file."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_UN)
