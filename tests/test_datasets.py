"""The official data sets: found, or fetched from a small server of our own, and checked."""

import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from msvae.core.errors import DataError
from msvae.core.progress import NullProgress
from msvae.data import datasets, download
from msvae.data.download import Remote, fetch, unpack

FLOWERS = 12


class Server:
    """Serves bytes by name, continues where it is asked to, and can break off or refuse."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.break_off_after: list[int] = []  # bytes, one a request
        self.ranges = True
        self.address = ""

    def remote(self, name: str, content: bytes) -> Remote:
        """Serve the content by that name."""
        self.files[name] = content
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        return Remote(f"{self.address}/{name}", md5)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name, wanted = self.path.strip("/"), self.headers["Range"]
            state.asked.append((name, wanted))
            content = state.files.get(name)
            if content is None:
                self.send_error(404)
                return
            start = 0
            if wanted and state.ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = start + state.break_off_after.pop(0) if state.break_off_after else None
            self.wfile.write(content[start:end])

        def log_message(self, *_):
            """Nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


class Watcher(NullProgress):
    """Counts what it is told of."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def track(self, items, task, total):
        """Count the items."""
        count = 0
        for item in items:
            count += 1
            yield item
        self.seen.append((task, count, total))


CONTENT = np.random.default_rng(0).bytes(600_000)


def test_a_file_is_fetched_verified_and_watched(server, tmp_path):
    """The file arrives whole with progress told, and is not fetched twice."""
    remote, watcher = server.remote("a.bin", CONTENT), Watcher()
    for _ in range(2):
        assert fetch(remote, tmp_path / "x", watcher).read_bytes() == CONTENT
    assert watcher.seen == [("fetching a.bin", 3, 3)]
    assert len(server.asked) == 1


def test_a_broken_connection_is_resumed(server, tmp_path):
    """Within one call the rest is asked for, not the whole."""
    remote = server.remote("a.bin", CONTENT)
    server.break_off_after = [100_000, 200_000]
    assert fetch(remote, tmp_path, NullProgress()).read_bytes() == CONTENT
    assert [r for _, r in server.asked] == [None, "bytes=100000-", "bytes=300000-"]


def test_a_broken_download_is_continued_next_time(server, tmp_path):
    """What came stays; the next run goes on from there, the message says so."""
    remote = server.remote("a.bin", CONTENT)
    server.break_off_after = [1000] * download.ATTEMPTS
    with pytest.raises(DataError, match="run again to continue"):
        fetch(remote, tmp_path, NullProgress())
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin.part"]
    assert fetch(remote, tmp_path, NullProgress()).read_bytes() == CONTENT
    assert server.asked[-1][1] == f"bytes={1000 * download.ATTEMPTS}-"


def test_a_server_that_cannot_continue_is_asked_from_the_start(server, tmp_path):
    """A part is thrown away where the server sends everything again."""
    remote, server.ranges = server.remote("a.bin", CONTENT), False
    (tmp_path / "a.bin.part").write_bytes(b"x" * 5000)
    assert fetch(remote, tmp_path, NullProgress()).read_bytes() == CONTENT


def test_a_complete_part_needs_nothing_more(server, tmp_path):
    """Interrupted between the last byte and the check: the check is made up for."""
    remote = server.remote("a.bin", CONTENT)
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    assert fetch(remote, tmp_path, NullProgress()).read_bytes() == CONTENT


def test_a_wrong_file_is_refused_and_the_next_try_is_fresh(server, tmp_path):
    """Bytes of another file never reach the data; a spoilt part does not stay."""
    remote = server.remote("a.bin", CONTENT)
    (tmp_path / "a.bin.part").write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match="not the official file"):
        fetch(remote, tmp_path, NullProgress())
    assert list(tmp_path.iterdir()) == []
    assert fetch(remote, tmp_path, NullProgress()).read_bytes() == CONTENT


def test_what_cannot_be_fetched_is_said(server, tmp_path):
    """No such file on the server, no server, no folder to write to: one line with a remedy."""
    remote = server.remote("a.bin", CONTENT)
    (tmp_path / "file").touch()
    for where, what in (
        (tmp_path, Remote(f"{server.address}/b.bin", remote.md5)),
        (tmp_path, Remote("http://127.0.0.1:9/a.bin", remote.md5)),
        (tmp_path / "file", remote),
    ):
        with pytest.raises(DataError, match="--data-dir") as caught:
            fetch(what, where, NullProgress())
        assert "\n" not in str(caught.value)


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"no tar", packed({"../evil": b"x"}), packed({"b/c": b"x"})],
    ids=["no tar", "climbs out", "another set"],  # an archive holds the second it was made in
)
def test_a_bad_archive_leaves_nothing(tmp_path, content):
    """Damaged, reaching outside, or without the folder: refused, and nothing is half there."""
    archive = tmp_path / "in" / "a.tgz"
    archive.parent.mkdir()
    archive.write_bytes(content)
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(archive, "jpg", archive.parent)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "a.tgz"]


def mat(**values: object) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, values)
    return buffer.getvalue()


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def flowers(server, monkeypatch):
    """A server that has a dozen flowers in the official form."""
    order = np.random.default_rng(0).permutation(FLOWERS) + 1
    jpegs = {f"jpg/image_{i + 1:05d}.jpg": jpeg(i) for i in range(FLOWERS)}
    labels = mat(labels=np.arange(1, FLOWERS + 1)[None])
    splits = mat(trnid=order[None, :2], valid=order[None, 2:4], tstid=order[None, 4:])
    for name, file, content in (
        ("FLOWERS_ARCHIVE", "102flowers.tgz", packed(jpegs)),
        ("FLOWERS_LABELS", "imagelabels.mat", labels),
        ("FLOWERS_SPLITS", "setid.mat", splits),
    ):
        monkeypatch.setattr(datasets, name, server.remote(file, content))
    return order - 1


def test_flowers_are_fetched_once(server, flowers, tmp_path):
    """Absent flowers are fetched and unpacked; the second time nothing is asked for."""
    for _ in range(2):
        found = datasets.flowers102(tmp_path)
        assert [p.name for p in found.paths[:2]] == ["image_00001.jpg", "image_00002.jpg"]
        assert found.train.tolist() == flowers[:2].tolist()
        assert found.val.tolist() == flowers[2:4].tolist()
        assert found.test.tolist() == flowers[4:].tolist()
        assert found.labels.tolist() == list(range(FLOWERS))
    assert len(server.asked) == 3
    assert sorted(p.name for p in (tmp_path / "flowers-102").iterdir()) == [
        "imagelabels.mat",
        "jpg",
        "setid.mat",
    ]


def test_flowers_go_to_the_cache_without_a_folder(flowers, tmp_path, monkeypatch):
    """Without --data-dir they lie in the user's cache; the folder itself may be named too."""
    monkeypatch.setenv("MSVAE_CACHE", str(tmp_path))
    found = datasets.flowers102()
    folder = tmp_path / "data" / "flowers-102"
    assert found.paths[0].parent == folder / "jpg"
    assert datasets.flowers102(folder, download=False).paths == found.paths


def test_flowers_must_be_whole(flowers, tmp_path):
    """A lost image, a split that does not part, or a torn file is told with the remedy."""
    with pytest.raises(DataError, match="allow the download"):
        datasets.flowers102(tmp_path, download=False)
    found = datasets.flowers102(tmp_path)
    splits = tmp_path / "flowers-102" / "setid.mat"
    splits.write_bytes(mat(trnid=[[1]], valid=[[2]], tstid=[[2]]))
    with pytest.raises(DataError, match="does not part"):
        datasets.flowers102(tmp_path)
    splits.write_bytes(b"torn")
    with pytest.raises(DataError, match="damaged"):
        datasets.flowers102(tmp_path)
    found.paths[3].unlink()
    with pytest.raises(DataError, match="1 of 12 flowers are missing"):
        datasets.flowers102(tmp_path)


def batch() -> tuple[bytes, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (datasets.CIFAR_IMAGES, 3, 32, 32), dtype=np.uint8)
    labels = (np.arange(datasets.CIFAR_IMAGES) % 10).astype(np.uint8)[:, None]
    rows = np.hstack([labels, images.reshape(len(images), -1)])
    return rows.tobytes(), images.transpose(0, 2, 3, 1)


def test_cifar_is_fetched_and_read(server, tmp_path, monkeypatch):
    """The official test batch comes out of the archive as (N, 32, 32, 3), label beside it."""
    monkeypatch.setattr(datasets, "CIFAR_IMAGES", 20)
    content, images = batch()
    archive = packed({"cifar-10-batches-bin/test_batch.bin": content})
    remote = server.remote("cifar-10-binary.tar.gz", archive)
    monkeypatch.setattr(datasets, "CIFAR_ARCHIVE", remote)
    cifar = datasets.cifar10(tmp_path)
    np.testing.assert_array_equal(cifar.images, images)
    assert cifar.labels.tolist() == list(range(10)) * 2
    assert cifar.sha256 == hashlib.sha256(content).hexdigest()
    assert cifar.stands_in is None
    assert datasets.cifar10(tmp_path / "cifar-10-batches-bin").file == cifar.file
    assert len(server.asked) == 1


def test_a_stand_in_says_so(tmp_path, monkeypatch):
    """Another batch serves where the test batch is not at hand, and is named; torn, it is not."""
    monkeypatch.setattr(datasets, "CIFAR_IMAGES", 20)
    content, _ = batch()
    file = tmp_path / "data_batch_5.bin"
    file.write_bytes(content)
    expected = "data_batch_5.bin stands in for test_batch.bin"
    assert datasets.cifar10(tmp_path).stands_in == expected
    (tmp_path / "test_batch.bin").write_bytes(content)
    assert datasets.cifar10(tmp_path).stands_in is None
    (tmp_path / "test_batch.bin").write_bytes(content[:-1])
    with pytest.raises(DataError, match="61459 bytes, not 61460"):
        datasets.cifar10(tmp_path)
    with pytest.raises(DataError, match="allow the download"):
        datasets.cifar10(tmp_path / "nothing", download=False)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_magnetic_tiles(tmp_path):
    """MT_Free is normal; the others are anomalous, each with the mask beside it."""
    free, crack = tmp_path / "MT_Free" / "Imgs", tmp_path / "MT_Crack" / "Imgs"
    with pytest.raises(DataError, match="MT_Free"):
        datasets.magnetic_tile(tmp_path)
    touch(free / "a_1.jpg", free / "a_1.png")
    with pytest.raises(DataError, match="no defect classes"):
        datasets.magnetic_tile(tmp_path)
    touch(crack / "b_1.jpg", crack / "b_1.png")
    found = datasets.magnetic_tile(tmp_path)
    assert found.normal == (free / "a_1.jpg",)
    (sample,) = found.anomalous
    assert (sample.label, sample.kind, sample.mask) == (1, "crack", crack / "b_1.png")
    touch(crack / "b_2.jpg")
    with pytest.raises(DataError, match="has no mask"):
        datasets.magnetic_tile(tmp_path)


def test_mvtec_categories(tmp_path):
    """A category is found directly or below mvtec*; for another, those that are there are told."""
    for name in ("bottle", "mvtec-256/cable", "mvtec_ad/screw", "mvtec-256/bottle"):
        (tmp_path / name / "train" / "good").mkdir(parents=True)
    assert datasets.mvtec(tmp_path, "bottle") == tmp_path / "bottle"
    assert datasets.mvtec(tmp_path, "cable") == tmp_path / "mvtec-256" / "cable"
    assert datasets.mvtec(tmp_path, "screw") == tmp_path / "mvtec_ad" / "screw"
    with pytest.raises(DataError, match="'pill': there is bottle, cable, screw"):
        datasets.mvtec(tmp_path, "pill")
    with pytest.raises(DataError, match="no such folder"):
        datasets.mvtec(tmp_path / "nothing", "pill")


def test_the_real_sets(data_dir):
    """Official counts, official splits, official checksums of the split files."""
    flowers = datasets.flowers102(data_dir, download=False)
    assert len(flowers.paths) == 8189
    assert [len(p) for p in (flowers.train, flowers.val, flowers.test)] == [1020, 1020, 6149]
    assert np.bincount(flowers.labels[flowers.train]).tolist() == [10] * 102
    for remote in (datasets.FLOWERS_LABELS, datasets.FLOWERS_SPLITS):
        content = (flowers.paths[0].parents[1] / remote.name).read_bytes()
        assert hashlib.md5(content, usedforsecurity=False).hexdigest() == remote.md5
    cifar = datasets.cifar10(data_dir, download=False)
    assert cifar.images.shape == (10_000, 32, 32, 3)
    assert np.bincount(cifar.labels).min() > 900
    tiles = datasets.magnetic_tile(data_dir)
    kinds = [s.kind for s in tiles.anomalous]
    assert len(tiles.normal) == 952
    counts = {"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
    assert {k: kinds.count(k) for k in set(kinds)} == counts
    assert datasets.mvtec(data_dir, "bottle").name == "bottle"
