"""A byte-level BPE of one's own, or any tokenizer that exists; text to token ids in batches."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ..errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
# What other tokenizers call the token between documents, the first that is there.
SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|im_end|>")

# GPT-4's split (cl100k), but with digits in pairs: a small vocabulary has no room for 1000 numbers.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MIN_VOCAB_SIZE = 257  # the 256 bytes and the separator
PIECE = 1 << 16  # characters; a longer text is encoded in pieces, which bounds memory and uses every core
PIECES = 64  # pieces encoded at a time
_LINE_START = re.compile(r"(?<=\n)(?=\S)")


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_bytes: int = 32 << 20) -> Tokenizer:
    """Train a byte-level BPE on the first `max_bytes` of `texts`; `<|endoftext|>` has id 0.

    The same texts give the same tokenizer, to the character of its JSON. It has fewer than `vocab_size`
    tokens when the text holds no more pairs to merge.

    Raises:
        ConfigError: for a vocabulary too small to spell every byte.
        DataError: when there is no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size={vocab_size}: a byte-level vocabulary needs at least {MIN_VOCAB_SIZE} tokens; "
            f"with fewer, some text could not be spelled."
        )
    sample = list(_first_bytes(texts, max_bytes))
    if not any(sample):
        raise DataError("No text to train a tokenizer on; its vocabulary would hold single bytes only.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load a `tokenizer.json`, a directory that holds one, or a model's tokenizer from the hub by name.

    Truncation and padding that the file asks for are switched off: they would lose or invent text.
    Raises DataError when there is no such tokenizer or the hub does not answer.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        local = path.exists()
        tokenizer = Tokenizer.from_file(str(path)) if local else Tokenizer.from_pretrained(str(name_or_path))
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise DataError(
            f"{name_or_path}: no tokenizer could be loaded ({error}). Give a tokenizer.json, a directory "
            f"that holds one, or the name of a model on the hub (which needs the network)."
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Sixteen hex digits that identify a tokenizer."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def id_limit(tokenizer: Tokenizer) -> int:
    """One more than the largest token id: the rows an embedding needs, also where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def separator_id(tokenizer: Tokenizer) -> int:
    """The id of the token that begins every document. Raises DataError if the tokenizer has none."""
    for token in SEPARATORS:
        if (number := tokenizer.token_to_id(token)) is not None:
            return number
    raise DataError(
        f"The tokenizer has none of the tokens {', '.join(SEPARATORS)}; without one, documents would run "
        f"into one another. Add one as a special token."
    )


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The token ids of each text (uint32 [length]), on all cores, without special tokens.

    A special token's name inside a text is text: it is spelled out, and cannot end a document.
    """
    pieces = [list(_pieces(text)) for text in texts]
    ids = iter(_encode_pieces(tokenizer, [piece for parts in pieces for piece in parts]))
    return [np.concatenate([next(ids) for _ in parts]) for parts in pieces]


def _encode_pieces(tokenizer: Tokenizer, pieces: list[str]) -> Iterator[np.ndarray]:
    spells_special_tokens = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        for first in range(0, len(pieces), PIECES):
            batch = pieces[first : first + PIECES]
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoding.ids, np.uint32)
    finally:
        tokenizer.encode_special_tokens = spells_special_tokens


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text at line starts that no token can span: after a newline, before something visible."""
    start = 0
    while cut := _LINE_START.search(text, start + PIECE):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The leading texts until `max_bytes` of UTF-8 are reached; the last text is cut."""
    room = max_bytes
    for text in texts:
        data = text.encode()
        yield text if len(data) <= room else data[:room].decode(errors="ignore")
        room -= len(data)
        if room <= 0:
            return
