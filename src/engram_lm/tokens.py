"""Vocabulary compression: token id -> canonical id (paper 2.1).

" Apple", "apple" and "APPLE" are one word to a memory of facts. Every token's text is normalised, and tokens with the
same normal form share a canonical id; about 23 % of a 128k vocabulary folds away.
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor

from .errors import DataError
from .kernels import on_gpu

SENTINEL = "\ue000"  # keeps a token of white space alone from being stripped to nothing
REPLACEMENT = "\ufffd"  # what a decoder prints for a fragment of a character
RULES = "nfkc-nfd-strip-lower-space/1"  # names this file's rules in the cache; change it when they change

NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), SENTINEL),
        normalizers.Strip(),
        normalizers.Replace(SENTINEL, " "),
    ]
)


@dataclass(frozen=True)
class CanonicalVocabulary:
    """The map from token ids to canonical ids, and the digest that a table or checkpoint keeps of it.

    lookup: [tokens] int64, canonical id of each token id; canonical ids are 0 .. size-1 by first appearance.
    """

    lookup: np.ndarray

    @cached_property
    def size(self) -> int:
        """Number of canonical ids."""
        return int(self.lookup.max()) + 1

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits of the map itself: two tokenizers that fold alike share it."""
        return hashlib.sha256(self.lookup.astype("<i8").tobytes()).hexdigest()[:16]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Canonical ids of token ids, int64, any shape.

        Raises DataError for an id that the tokenizer does not have. On other devices than the CPU, where nobody waits for the
        ids, it becomes -1 instead.
        """
        if tokens.device.type != "cpu" or on_gpu(tokens.device):
            return self._framed(tokens.device)[tokens.clamp(-1, len(self.lookup)) + 1]
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.lookup):
            raise DataError(
                f"token ids run from {int(tokens.min())} to {int(tokens.max())}, but the tokenizer has {len(self.lookup)}: "
                "the memory would be read at the rows of other words. Mask padding and images with `dead` instead."
            )
        return torch.as_tensor(self.lookup)[tokens]

    def _framed(self, device: torch.device) -> Tensor:
        """The map on a device with a -1 at either end, copied there once."""
        if device not in self._copies:
            self._copies[device] = torch.as_tensor(np.pad(self.lookup, 1, constant_values=-1), device=device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def __getstate__(self) -> dict[str, np.ndarray]:
        return {"lookup": self.lookup}

    @staticmethod
    def identity(size: int) -> CanonicalVocabulary:
        """No compression: every token is its own canonical id (the `ple` layout)."""
        return CanonicalVocabulary(np.arange(size, dtype=np.int64))

    @staticmethod
    def from_tokenizer(tokenizer: Any, *, cache: bool = True) -> CanonicalVocabulary:
        """Fold a `tokenizers.Tokenizer`, or a fast tokenizer of `transformers` (its `backend_tokenizer`).

        The result is cached on disk under the tokenizer's digest; `cache=False` neither reads nor writes it.
        """
        tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"expected a fast tokenizer (tokenizers.Tokenizer or one that wraps it), got {tokenizer!r}")
        if not cache:
            return CanonicalVocabulary(fold(tokenizer))
        key = hashlib.sha256(f"{RULES} {tokenizer.to_str()}".encode()).hexdigest()[:32]
        path = cache_directory() / f"{key}.npy"
        try:
            return CanonicalVocabulary(np.load(path))
        except (OSError, ValueError, EOFError):
            vocabulary = CanonicalVocabulary(fold(tokenizer))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            with partial.open("wb") as file:
                np.save(file, vocabulary.lookup)
            partial.replace(path)
        except OSError:
            pass  # a read-only or full home costs a second next time, nothing else
        return vocabulary


def cache_directory() -> Path:
    """Where folded vocabularies are kept: $ENGRAM_CACHE, or the user's cache directory."""
    if "ENGRAM_CACHE" in os.environ:
        return Path(os.environ["ENGRAM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "engram-lm"


def fold(tokenizer: Tokenizer) -> np.ndarray:
    """[tokens] int64 canonical ids, handed out in order of each normal form's first appearance."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    texts = tokenizer.decode_batch([[token] for token in range(size)], skip_special_tokens=False)
    canonical: dict[str, int] = {}
    return np.array(
        [canonical.setdefault(_key(tokenizer, token, text), len(canonical)) for token, text in enumerate(texts)],
        np.int64,
    )


def _key(tokenizer: Tokenizer, token: int, text: str) -> str:
    """What is compared: the normal form; the text where that is empty; the raw token for a character's fragment."""
    if REPLACEMENT in text:
        return str(tokenizer.id_to_token(token))
    return NORMALIZER.normalize_str(text) or text


def piece_bytes(piece: str) -> bytes:
    """The bytes behind a byte-level BPE token as its vocabulary spells it: `"Ġthe"` is `b" the"`.

    Tokens outside that alphabet (added ones, such as `<｜end▁of▁sentence｜>`) are themselves.
    """
    alphabet = _byte_level_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte, inverted: printable Latin-1 is itself, the rest start at U+0100."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(itself)]
    return {chr(b): b for b in itself} | {chr(0x100 + i): b for i, b in enumerate(others)}
