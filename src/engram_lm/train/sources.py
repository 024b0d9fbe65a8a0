"""Text in: files, directories, tables of documents and data sets become one stream of named documents."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet")
FIELDS = ("text", "content")  # where a JSON line or a table keeps its document, the first that is there
SKIPPED_DIRECTORIES = {"__pycache__", "site-packages", "dist-packages", "node_modules"}

_SUPPORTED = f"{', '.join(SUFFIXES)}, a directory with such files, hf:DATASET[:SPLIT]"
_EITHER = " or ".join(map(repr, FIELDS))


@dataclass(frozen=True)
class Document:
    """One text with a name that stays the same wherever its source lies."""

    name: str
    text: str


def read_documents(source: str, skipped: list[str] | None = None) -> Iterator[Document]:
    """Stream the documents of `source`, one in memory at a time, in the same order every time.

    Args:
        source: a text file (.txt, .md, .rst, .py), JSON lines (.jsonl, also .gz, .xz, .zst), a .parquet file,
            a directory with any of these (searched recursively), or `hf:DATASET[:SPLIT]`, streamed from the
            hub or a local directory. Tables keep their documents in a field `text` or `content`.
        skipped: takes one line `name: reason` for each document left out: empty, or not text.

    Raises:
        DataError: for a source that does not exist, is of an unknown kind, is damaged, or holds no text.
    """
    skipped = [] if skipped is None else skipped
    skipped_before = len(skipped)
    count = 0
    for name, text in _read(source, skipped):
        text = text.replace("\r\n", "\n")
        if fault := _fault(text):
            skipped.append(f"{name}: {fault}")
        else:
            count += 1
            yield Document(name, text)
    if count == 0:
        reasons = "; ".join(skipped[skipped_before:][:3]) or "no documents"
        raise DataError(f"{source}: there is nothing to train on ({reasons}). Supported: {_SUPPORTED}.")


def standard_library() -> str:
    """The directory of this Python's own standard library: some 31 MB of source that every machine has."""
    return sysconfig.get_path("stdlib")


def _read(source: str, skipped: list[str]) -> Iterator[tuple[str, str]]:
    """The (name, text) pairs of any source."""
    if source.startswith("hf:"):
        yield from _read_dataset(source)
        return
    path = Path(source)
    if path.is_dir():
        for file in _walk(path):
            yield from _read_file(file, file.relative_to(path).as_posix(), skipped)
    elif not path.exists():
        raise DataError(f"{source}: no such file or directory. Supported: {_SUPPORTED}.")
    elif not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{source}: unknown kind of file; it may not be text. Supported: {_SUPPORTED}.")
    else:
        yield from _read_file(path, path.name, skipped)


def _walk(directory: Path) -> Iterator[Path]:
    """Every supported file below `directory`, sorted; hidden, cached and installed files are left out."""
    for parent, directories, files in os.walk(directory):
        directories[:] = sorted(d for d in directories if d[0] != "." and d not in SKIPPED_DIRECTORIES)
        for file in sorted(files):
            if file[0] != "." and file.lower().endswith(SUFFIXES):
                yield Path(parent, file)


def _read_file(path: Path, name: str, skipped: list[str]) -> Iterator[tuple[str, str]]:
    if path.name.lower().endswith(TEXT_SUFFIXES):
        try:
            yield name, path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            skipped.append(f"{name}: not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})")
        except OSError as error:
            skipped.append(f"{name}: cannot be read ({error.strerror})")
    elif path.name.lower().endswith(".parquet"):
        yield from _read_parquet(path, name)
    else:
        yield from _read_jsonl(path, name)


def _fault(text: str) -> str | None:
    """Why `text` is no document, or None."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "binary (it holds NUL characters)"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not Unicode text (lone surrogate at {error.start})"
    return None


def _read_jsonl(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """One document a line; empty lines are passed over."""
    for number, line in _lines(path):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error}); its document would have been lost.") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with a field {_EITHER}, got {record!r:.80}.")
        yield f"{name}:{number}", _text(record[_field(record, where)], where)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a plain or compressed file. Raises DataError where it is damaged or cut off."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path}: cannot be read after line {number} ({error}); all later documents would have been lost."
        ) from None


def _open(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path))
        case ".xz":
            return cast(BinaryIO, lzma.open(path))
        case ".zst":  # by pyarrow, which reads every frame of a file and notices a cut one
            return io.BufferedReader(_extra("pyarrow", path).input_stream(path, compression="zstd"))
        case _:
            return path.open("rb")


def _read_parquet(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """One document a row, a batch of one row group at a time."""
    _extra("pyarrow", path)
    parquet = importlib.import_module("pyarrow.parquet")
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            field = _field(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield f"{name}:{row}", _text(value, f"{path}, row {row}")
                    row += 1
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise DataError(f"{path}: not a readable Parquet file after row {row} ({error}).") from None


def _read_dataset(source: str) -> Iterator[tuple[str, str]]:
    """Stream `hf:DATASET[:SPLIT]`: nothing is downloaded but the rows that are read."""
    datasets = _extra("datasets", source)
    dataset, _, split = source.removeprefix("hf:").partition(":")
    split = split or "train"
    row = 0
    try:
        for record in datasets.load_dataset(dataset, split=split, streaming=True):
            where = f"{source}, row {row}"
            yield f"{Path(dataset).name}:{split}:{row}", _text(record[_field(record, where)], where)
            row += 1
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # not found, no such split, no network
        raise DataError(
            f"{source}: cannot be streamed after row {row} ({error}). Write hf:DATASET or hf:DATASET:SPLIT; "
            f"the hub must be reachable, or DATASET a local directory."
        ) from None


def _field(names: Iterable[str], where: str) -> str:
    """The field that holds the text. Raises DataError with the names that are there."""
    names = list(names)
    for field in FIELDS:
        if field in names:
            return field
    raise DataError(f"{where}: no field {_EITHER}; it has {', '.join(map(repr, names)) or 'none'}.")


def _text(value: Any, where: str) -> str:
    """A field's value as text; null counts as empty. Raises DataError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: the text is of type {type(value).__name__}, not a string ({value!r:.80}).")
    return value


def _extra(module: str, source: str | Path) -> Any:
    """Import an optional dependency. Raises DataError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{source}: reading it needs {module}: pip install 'engram-lm[data]'.") from None
