"""Token shards: a corpus as two memory-mapped files of token ids, with every document's place and size.

directory/
    train.bin                token ids, uint16 (vocabulary up to 65,536) or uint32, little-endian
    train.docs.npy           int64 [2, documents]: where each document begins, and its bytes as UTF-8
    val.bin, val.docs.npy    the same for the held-out documents
    meta.json                sizes, checksums, tokenizer digest, source; written last

Every document is a separator token followed by its own tokens.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from .. import config
from ..errors import ConfigError, DataError, MismatchError
from .sources import Document
from .tokenizer import encode_texts, id_limit, separator_id, tokenizer_digest

SplitName = Literal["train", "val"]
BATCH = 4 << 20  # characters of text that are encoded at a time


@dataclass(frozen=True)
class SplitMeta:
    """Sizes and checksums of one split."""

    tokens: int
    documents: int
    bytes: int
    tokens_crc32: int
    docs_crc32: int


@dataclass(frozen=True)
class ShardMeta:
    """What `meta.json` says: where the tokens come from, how to read them, and that they are all there."""

    source: str
    held_out: float
    max_tokens: int | None
    tokenizer: str
    vocab_size: int
    separator: int
    dtype: Literal["uint16", "uint32"]
    train: SplitMeta
    val: SplitMeta


@dataclass(frozen=True)
class Split:
    """The documents of one split, end to end.

    Attributes:
        tokens: ids [N], memory-mapped, uint16 or uint32.
        starts: int64 [documents], where in `tokens` each document begins.
        bytes: int64 [documents], each document's length as UTF-8.
    """

    tokens: np.ndarray
    starts: np.ndarray
    bytes: np.ndarray

    @property
    def tokens_per_byte(self) -> float:
        """Predicted tokens (all but separators) a byte: bits a byte = nats a token * this / ln 2."""
        return (len(self.tokens) - len(self.starts)) / int(self.bytes.sum())


@dataclass(frozen=True)
class TokenData:
    """An open corpus: its two splits, and what they are."""

    directory: Path
    meta: ShardMeta
    train: Split
    val: Split

    def split(self, name: SplitName) -> Split:
        """The split of that name."""
        return self.train if name == "train" else self.val


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    source: str = "",
    held_out: float = 0.02,
    max_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenData:
    """Encode a stream of documents into `directory`, all or nothing; shards that were there are replaced.

    A document is held out by a hash of its name, so a file stays on its side whatever comes with it. Where
    that divides the corpus badly (few documents, or one giant), the last `held_out` of all tokens is held out
    instead, and the document that the border falls into is cut in two.

    Args:
        documents: read once, a few at a time.
        tokenizer: any that has a separator, see `separator_id`.
        directory: made if need be.
        source: what the documents were read from, for the record.
        held_out: share of the corpus that becomes `val`.
        max_tokens: stop after so many tokens, both splits together; the last document is cut there.
        progress: called with the number of tokens written so far.

    Raises:
        ConfigError: for a share or a number of tokens that leaves a split empty.
        DataError: when there is no text, no separator, or no room on the disk; older shards are still there.
    """
    directory = Path(directory)
    limit = sys.maxsize if max_tokens is None else max_tokens
    if not 0 < held_out < 1 or limit < 4:
        raise ConfigError(f"held_out={held_out}, max_tokens={max_tokens}: a split would be empty.")
    separator, vocab_size = separator_id(tokenizer), id_limit(tokenizer)
    dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 1 << 16 else "uint32"
    with (
        _all_or_nothing(directory) as partial,
        _Writer(partial, "train", dtype) as train,
        _Writer(partial, "val", dtype) as val,
    ):
        for document, ids in _encoded(documents, tokenizer):
            num_bytes = len(document.text.encode())
            room = limit - train.tokens - val.tokens - 1
            if len(ids) > room:
                ids = ids[:room]
                num_bytes = _num_bytes(tokenizer, ids)
            if len(ids):  # a normalizer may leave nothing of a text
                split = val if _uniform(document.name) < held_out else train
                split.append(np.insert(ids, 0, separator), num_bytes)
            if progress:
                progress(train.tokens + val.tokens)
            if train.tokens + val.tokens >= limit - 1:
                break
        if (total := train.tokens + val.tokens) < 4:
            raise DataError(f"{source or directory}: {total} tokens in all, too few to hold some out.")
        if not held_out / 4 <= val.tokens / total <= held_out * 4 or train.tokens == 0:
            _hold_out_the_end(train, val, held_out, tokenizer)
        digest = tokenizer_digest(tokenizer)
        metas = train.finish(), val.finish()
        meta = ShardMeta(source, held_out, max_tokens, digest, vocab_size, separator, dtype, *metas)
        (partial / "meta.json").write_text(config.to_json(meta), encoding="utf-8")
    return open_shards(directory, verify=False)


def split_in_memory(documents: Iterable[Document], tokenizer: Tokenizer) -> Split:
    """All documents as one split that is not written anywhere: for evaluating on other text."""
    separator, pieces, sizes = separator_id(tokenizer), [], []
    for document, ids in _encoded(documents, tokenizer):
        pieces.append(np.concatenate([[separator], ids]).astype(np.uint32))
        sizes.append(len(document.text.encode()))
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    return Split(np.concatenate(pieces), np.cumsum(lengths) - lengths, np.array(sizes, dtype=np.int64))


def open_shards(directory: str | Path, tokenizer_digest: str | None = None, *, verify: bool = True) -> TokenData:
    """Open the shards in `directory`; the tokens stay on disk.

    Args:
        directory: where `write_shards` wrote.
        tokenizer_digest: of the tokenizer that the tokens will be used with; None skips the check.
        verify: compare the checksum of every file, which reads it once.

    Raises:
        DataError: when shards are missing, cut short or damaged.
        MismatchError: when another tokenizer wrote them.
    """
    directory = Path(directory)
    if not (directory / "meta.json").exists():
        raise DataError(f"{directory}: no token shards (no meta.json); they must be written first.")
    try:
        meta = config.load(ShardMeta, directory / "meta.json")
    except ConfigError as error:
        raise DataError(f"{error} The tokens could be misread; write the shards again.") from None
    if tokenizer_digest not in (None, meta.tokenizer):
        raise MismatchError(
            f"{directory}: written with tokenizer {meta.tokenizer} but opened for {tokenizer_digest}; "
            f"every token would mean another string. Write the shards again, or use their own tokenizer."
        )
    train = _open_split(directory, "train", meta.dtype, meta.train, verify)
    val = _open_split(directory, "val", meta.dtype, meta.val, verify)
    return TokenData(directory, meta, train, val)


def _open_split(directory: Path, name: SplitName, dtype: str, meta: SplitMeta, verify: bool) -> Split:
    tokens_path, docs_path = _paths(directory, name)
    for path in (tokens_path, docs_path):
        if not path.exists():
            raise _damaged(path, "missing")
    size, expected = tokens_path.stat().st_size, meta.tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise _damaged(tokens_path, f"{size} bytes long instead of {expected}")
    if _crc32(docs_path) != meta.docs_crc32:
        raise _damaged(docs_path, "its checksum differs")
    if verify and _crc32(tokens_path) != meta.tokens_crc32:
        raise _damaged(tokens_path, "its checksum differs")
    starts, num_bytes = np.load(docs_path)
    return Split(np.memmap(tokens_path, dtype, mode="r"), starts, num_bytes)


def _damaged(path: Path, fault: str) -> DataError:
    return DataError(f"{path}: {fault}; the model would learn from damaged text. Write the shards again.")


class _Writer:
    """One split in the making."""

    def __init__(self, directory: Path, name: SplitName, dtype: str) -> None:
        self.tokens_path, self.docs_path = _paths(directory, name)
        self.dtype = np.dtype(dtype)
        self.file = self.tokens_path.open("w+b")
        self.tokens = 0
        self.starts, self.bytes = array("q"), array("q")  # of each document, eight bytes each

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, ids: np.ndarray, num_bytes: int) -> None:
        """Add a document."""
        self.file.write(ids.astype(self.dtype).tobytes())
        self.starts.append(self.tokens)
        self.bytes.append(num_bytes)
        self.tokens += len(ids)

    def take_all(self, other: _Writer) -> None:
        """Move every document of `other` behind one's own."""
        other.file.seek(0)
        shutil.copyfileobj(other.file, self.file)
        self.starts.extend(start + self.tokens for start in other.starts)
        self.bytes.extend(other.bytes)
        self.tokens += other.tokens
        other.truncate(0, 0)

    def read_from(self, start: int) -> np.ndarray:
        """The tokens from `start` to the end."""
        self.file.seek(start * self.dtype.itemsize)
        return np.frombuffer(self.file.read(), self.dtype)

    def truncate(self, tokens: int, documents: int) -> None:
        """Keep only the first tokens and documents."""
        self.file.seek(tokens * self.dtype.itemsize)
        self.file.truncate()
        self.tokens = tokens
        del self.starts[documents:], self.bytes[documents:]

    def finish(self) -> SplitMeta:
        """Write out everything."""
        self.file.flush()
        np.save(self.docs_path, np.array([self.starts, self.bytes]))
        checksums = _crc32(self.tokens_path), _crc32(self.docs_path)
        return SplitMeta(self.tokens, len(self.starts), sum(self.bytes), *checksums)


def _hold_out_the_end(train: _Writer, val: _Writer, held_out: float, tokenizer: Tokenizer) -> None:
    """Put all documents into one stream and move its end into `val`, cutting a document if need be."""
    train.take_all(val)
    cut = train.tokens - max(2, round(train.tokens * held_out))
    document = bisect_right(train.starts, cut) - 1
    start = train.starts[document]
    if cut == start + 1:  # a separator alone is no document: move the whole of it
        cut = start
    tail = train.read_from(cut)
    borders = [cut, *train.starts[document + 1 :], train.tokens]
    pieces = [tail[begin - cut : end - cut] for begin, end in pairwise(borders)]
    sizes = train.bytes[document:]
    if cut > start:  # both halves are documents
        sizes[0] = _num_bytes(tokenizer, pieces[0])
        train.bytes[document] -= sizes[0]
        pieces[0] = np.insert(pieces[0], 0, separator_id(tokenizer))
        document += 1
    train.truncate(cut, document)
    for piece, size in zip(pieces, sizes, strict=True):
        val.append(piece, size)


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its token ids, encoded a batch at a time."""
    for batch in _batches(documents):
        yield from zip(batch, encode_texts(tokenizer, [document.text for document in batch]), strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _num_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Bytes of the text behind part of a document (off by up to three where a cut falls into a character)."""
    return len(tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode())


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _paths(directory: Path, name: SplitName) -> tuple[Path, Path]:
    return directory / f"{name}.bin", directory / f"{name}.docs.npy"


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


@contextmanager
def _all_or_nothing(directory: Path) -> Iterator[Path]:
    """A directory to write into, whose files move into `directory` at the end, or vanish on any failure.

    Raises DataError when the files cannot be written.
    """
    partial = directory / "partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        yield partial
        (directory / "meta.json").unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "meta.json"):
            os.replace(path, directory / path.name)
    except OSError as error:
        raise DataError(
            f"{directory}: token shards cannot be written ({error}); the partial files were removed. "
            f"Free some space (two or four bytes a token) or write elsewhere."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
