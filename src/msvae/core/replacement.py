"""New files in the place of old ones, in one step: at every moment the old or the new is whole.

What is being written lies beside its place as `.msvae.<token>`, locked by its writer. What nobody
holds any more was left by a process that was killed, and the next one that writes there removes it.
Several files of a folder lie together in such a folder of their own; renaming that to `.msvae.ready`
is the one step. From there each goes to its place, by the writer or, where that was killed, by
whoever reads or writes the folder next.
"""

import errno
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path

from msvae.core.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows has none: what a killed process left goes after a day
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".msvae."  # begins the name of what is being written
READY = ".msvae.ready"
REMOVED = ".removed"  # in it: the names of files that the new ones leave no place for
DAY = 86_400  # seconds
_swept: set[Path] = set()


@contextmanager
def reported(path: Path, otherwise: str = "choose another place") -> Iterator[None]:
    """Turn an `OSError` into an `OutputError` that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}): free some space or {otherwise}"
        ) from error


@contextmanager
def atomic(path: Path) -> Iterator[BufferedWriter]:
    """A file to write into, renamed to `path` at the end; `OutputError` when the disk refuses.

    A symlink is followed. A character device or a FIFO is written into as it stands.
    """
    with reported(path):
        target = destination(path)
        if is_stream(target):
            with _stream(target) as file:
                yield file
            return
        folder = target.parent
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        if folder not in _swept:  # to list a folder before each of its files would take long
            _swept.add(folder)
            sweep(folder)
        with _whole(target) as file:
            yield file


@contextmanager
def replacing(folder: Path) -> Iterator["Replacement"]:
    """Several files of a folder, written and removed together, in one step at the end."""
    with reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with unfinished(folder, Path.mkdir) as room:
            new = Replacement(folder, room)
            yield new
            new.list_removed()
            _make_ready(room, folder)
    settle(folder)


@contextmanager
def replacing_tree(folder: Path) -> Iterator[Path]:
    """A folder to fill, that takes the place of `folder`, with all that lies in it, at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    with unfinished(folder.parent, Path.mkdir) as room:
        new = room / "new"
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(room / "old")
        new.rename(folder)


@contextmanager
def unfinished(folder: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A file or folder of its own in the folder, held by this process, gone at the end."""
    while True:
        path = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
        make(path)
        with _held(path) as own:
            if not own:  # another process took it for abandoned, before it was held
                continue
            try:
                yield path
            finally:
                with suppress(OSError):  # the error under way says so
                    _remove(path)
            return


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of the system's temporary one; the next removes it where this process is killed."""
    folder = Path(tempfile.gettempdir())
    with reported(folder, "set TMPDIR to another place"):
        sweep(folder)
        with unfinished(folder, lambda path: path.mkdir(mode=0o700)) as room:
            yield room


class Replacement:
    """New files of a folder, that lie aside until all of them are there."""

    def __init__(self, folder: Path, room: Path) -> None:
        """`room` is where they lie until then."""
        self.folder, self.room, self.removed = folder, room, list[str]()

    @contextmanager
    def open(self, name: str) -> Iterator[BufferedWriter]:
        """A file to write into that takes the place of `name`."""
        path = self.folder / name
        with reported(path):
            self._check(path)
            with (self.room / name).open("wb") as file:
                yield file
                _on_disk(file)

    def write(self, name: str, data: bytes) -> None:
        """Put a file in the place of `name`."""
        with self.open(name) as file:
            file.write(data)

    def remove(self, name: str) -> None:
        """Leave no file called `name`."""
        with reported(self.folder / name):
            self._check(self.folder / name)
        self.removed.append(name)

    def list_removed(self) -> None:
        """Write down which files go."""
        if self.removed:
            with (self.room / REMOVED).open("wb") as file:
                file.write("\n".join(self.removed).encode())
                _on_disk(file)

    @staticmethod
    def _check(path: Path) -> None:
        if is_stream(destination(path)):
            raise _no_file(path, "a device or a FIFO")


def destination(path: Path) -> Path:
    """The file that a path names, symlinks followed; `OutputError` where none can be written there."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:  # also a symlink to a file that is not there yet
        mode = stat.S_IFREG
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFBLK: "a block device", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode))
    if kind is not None:
        raise _no_file(path, kind)
    return Path(os.path.realpath(path)) if stat.S_ISREG(mode) and path.is_symlink() else path


def is_stream(path: Path) -> bool:
    """Whether there is a character device or a FIFO: something to write into, never to replace."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def check_output(path: Path) -> None:
    """Raise `OutputError` where no file can be written: before the long work, not after it."""
    with reported(path):
        destination(path)


def check_folder(path: Path) -> None:
    """Raise `OutputError` where something stands that is no folder: before the long work."""
    with reported(path):
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: cannot be written (it is no folder): name a folder")


def settle(folder: Path) -> None:
    """Finish a replacement of files in the folder that was cut off after its one step."""
    ready = folder / READY
    while _is_folder(ready):
        with reported(ready, "let msvae write there"), _held(ready) as free:
            if free:
                _move_in(ready, folder)


def sweep(folder: Path) -> None:
    """Remove what processes that were killed left in the folder unfinished."""
    with suppress(OSError), os.scandir(folder) as entries:
        left = [e.path for e in entries if e.name.startswith(UNFINISHED) and e.name != READY]
        for path in map(Path, left):
            _remove_abandoned(path)


def _no_file(path: Path, kind: str) -> OutputError:
    return OutputError(f"{path}: cannot be written (it is {kind}): name a file")


def _stream(path: Path) -> BufferedWriter:
    """The device or FIFO, opened; a FIFO that nobody reads is refused rather than waited for."""
    number = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    if hasattr(os, "set_blocking"):
        os.set_blocking(number, True)
    return os.fdopen(number, "wb")


@contextmanager
def _whole(target: Path) -> Iterator[BufferedWriter]:
    """A file to write into, renamed to the target when it is whole."""
    with unfinished(target.parent, Path.touch) as temporary:
        with temporary.open("wb") as file:
            yield file
            _on_disk(file)
        temporary.replace(target)


def _make_ready(room: Path, folder: Path) -> None:
    """The one step. Another process that was quicker is waited for: the last one counts."""
    while True:
        settle(folder)
        try:
            room.rename(folder / READY)
        except OSError:
            if not _is_folder(folder / READY):
                raise
        else:
            return


def _move_in(ready: Path, folder: Path) -> None:
    """Each file to its place; what was done before the process was killed is done no more."""
    removed = ready / REMOVED
    for path in sorted(ready.iterdir()):
        if path != removed:
            _place(path, folder / path.name)
    if removed.is_file():
        for name in removed.read_text(encoding="utf-8").splitlines():
            if name == Path(name).name:
                (folder / name).unlink(missing_ok=True)
        removed.unlink()
    try:
        ready.rmdir()
    except OSError as error:  # the next replacement stands there already
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _place(path: Path, target: Path) -> None:
    """Move a file to its place; where a symlink stands, to the file that it names."""
    real = destination(target)
    if real == target:
        path.replace(target)
        return
    with path.open("rb") as source, _whole(real) as file:  # it may lie on another disk
        shutil.copyfileobj(source, file)
    path.unlink()


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Hold a file or folder against other processes; whether it is still there once it is free."""
    number = None if fcntl is None else _opened(path)
    try:
        if number is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(number, fcntl.LOCK_EX)
        yield path.exists() and (number is None or _same(path, number))
    finally:
        if number is not None:
            os.close(number)


def _opened(path: Path) -> int | None:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(path, flags)  # a FIFO that somebody else put there is not waited for
    except OSError:
        return None


def _same(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(number))
    except OSError:
        return False


def _remove_abandoned(path: Path) -> None:
    """Remove it, unless a process that lives holds it."""
    number = None if fcntl is None else _opened(path)
    try:
        if (number is not None and _is_free(number)) or path.lstat().st_mtime < time.time() - DAY:
            _remove(path)
    except OSError:
        return  # another was quicker
    finally:
        if number is not None:
            os.close(number)


def _is_free(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is held, or the file system has no locks
        return False
    return True


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _on_disk(file: BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
