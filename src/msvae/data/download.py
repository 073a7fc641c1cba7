"""Official archives: fetched where absent, resumed where broken off, verified, unpacked whole."""

import math
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from msvae.core.errors import DataError
from msvae.core.progress import Progress
from msvae.core.replacement import sweep, unfinished

CHUNK = 1 << 18  # bytes
ATTEMPTS = 3
PATIENCE = 60  # seconds without a byte


@dataclass(frozen=True)
class Remote:
    """One official file and its md5."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


def fetch(remote: Remote, folder: Path, progress: Progress) -> Path:
    """The verified file in `folder`; what an earlier, broken download left there is continued."""
    import pooch

    pooch.get_logger().setLevel("ERROR")  # it prints otherwise; `progress` tells the user
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = pooch.retrieve(
            remote.url,
            known_hash=f"md5:{remote.md5}",
            fname=remote.name,
            path=folder,
            downloader=_downloader(folder / f"{remote.name}.part", progress),
        )
    except ValueError as error:
        raise DataError(
            f"{remote.url}: what came is not the official file (its md5 is not {remote.md5}): "
            f"try again, or put the file into {folder} yourself"
        ) from error
    except (OSError, HTTPException) as error:
        raise DataError(
            f"{remote.url}: could not be fetched into {folder} ({error}): run again to continue "
            "where it broke off, or name a folder that holds the data with --data-dir"
        ) from error
    return Path(path)


def _downloader(part: Path, progress: Progress) -> Callable[[str, str, object], None]:
    """For pooch: fills `part`, which survives failure, and hands it over when it is complete."""

    def download(url: str, output: str, _: object) -> None:
        for attempt in range(ATTEMPTS):
            try:
                _continue(url, part, progress)
                break
            except urllib.error.HTTPError:
                raise
            except (OSError, HTTPException):
                if attempt == ATTEMPTS - 1:
                    raise
        part.replace(output)

    return download


def _continue(url: str, part: Path, progress: Progress) -> None:
    """Append to `part` what it lacks; from the start where the server cannot continue."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url)  # noqa: S310 (our own constants)
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
            start = have if answer.status == 206 else 0
            _append(answer, part, start, progress)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416:  # nothing beyond what we have: the checksum will judge it
            raise


def _append(answer: HTTPResponse, part: Path, start: int, progress: Progress) -> None:
    length = int(answer.headers.get("Content-Length") or 0)
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        blocks = progress.track(
            _blocks(answer), f"fetching {part.stem}", max(1, math.ceil(length / CHUNK))
        )
        for block in blocks:
            file.write(block)
        got = file.tell() - start
    if got < length:
        raise ConnectionError(f"the connection broke off after {got} of {length} bytes")


def _blocks(answer: HTTPResponse) -> Iterator[bytes]:
    while block := answer.read(CHUNK):
        yield block


def unpack(archive: Path, member: str, folder: Path) -> Path:
    """`member` (a top folder) of a tar archive as `folder/member`: whole, or not there at all."""
    target = folder / member
    try:
        sweep(folder)
        with tarfile.open(archive) as tar, unfinished(folder, Path.mkdir) as room:
            tar.extractall(room, filter="data")
            if not target.exists():
                (room / member).replace(target)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{archive}: cannot be unpacked into {folder} ({error}): make room, or remove the "
            "archive to fetch it again"
        ) from error
    archive.unlink(missing_ok=True)
    return target
