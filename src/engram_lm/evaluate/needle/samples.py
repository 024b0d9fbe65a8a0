"""Samples of a length in tokens: drafts of a task, each in the largest haystack that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from ...errors import ConfigError, DataError
from ...train.tokenizer import encode_texts
from .sources import Question, Source, split_sentences
from .tasks import ONE_NEEDLE, TASKS, Draft, Text, task_named

INTERPOLATED = 12  # guesses before bisection


@dataclass(frozen=True)
class Sample:
    """A prompt, the beginning of its answer, and what the answer must contain.

    depths: percent of the haystack in front of each needle, () where nothing is hidden at a place. tokens: of the prompt with
    the token that begins a document, and of the longest answer; at most the length that was asked for.
    """

    task: str
    prompt: str
    prefix: str
    references: tuple[str, ...]
    depths: tuple[float, ...]
    tokens: int

    @property
    def text(self) -> str:
        """What the model reads."""
        return f"{self.prompt}\n{self.prefix}"


def make_samples(
    task: str,
    tokenizer: Tokenizer,
    length: int,
    count: int,
    seed: int,
    corpus: Sequence[str] = (),
    questions: Sequence[Question] = (),
    *,
    depth: float | None = None,
) -> list[Sample]:
    """`count` samples of a task, as near to `length` tokens as the haystack's next unit allows, and never longer.

    The same arguments give the same samples in any process, and a larger `count` begins with them; what is hidden and asked
    is also the same at every length. corpus: texts whose sentences are the haystack of essay tasks. questions: of the QA
    tasks, each asked once; qa_1 takes those with one paragraph, qa_2 all. depth: percent of the haystack in front of the
    needle, for tasks that hide one.

    Raises ConfigError for an unknown task, a length below the task's minimum for these samples, or a depth where nothing lone is
    hidden; DataError for a task without the data it needs, or with too little of it.
    """
    kind = task_named(task)
    if count < 1 or seed < 0:
        raise ConfigError(f"{task}: count {count} must be at least 1, and seed {seed} at least 0.")
    if depth is not None and (not 0 <= depth <= 100 or task not in ONE_NEEDLE):
        raise ConfigError(f"{task} at depth {depth}: a depth is 0 to 100, of {', '.join(ONE_NEEDLE)}.")
    number = list(TASKS).index(task)
    source = source_of(task, length, count, corpus, questions, np.random.default_rng((seed, number, 0)), depth)
    drafts = [kind.draw(np.random.default_rng((seed, number, 1 + i)), source, i) for i in range(count)]

    def tokens(text: Text) -> int:
        (ids,) = encode_texts(tokenizer, [f"{text.prompt}\n{text.prefix}"])
        return 1 + len(ids) + kind.budget

    smallest = [tokens(draft.write(draft.smallest)) for draft in drafts]
    if (minimum := max(smallest)) > length:
        raise ConfigError(
            f"{task} at length {length}: with this tokenizer its shortest samples take {minimum} tokens, "
            f"{kind.budget} of them for the answer. Ask for at least {minimum}."
        )
    samples = []
    for draft, least in zip(drafts, smallest, strict=True):
        size = largest_fit(draft, tokens, least, length)
        text = draft.write(size)
        if size == draft.largest:
            raise DataError(
                f"{task} at length {length}: the data fills only {tokens(text)} tokens of it. Give more text, or a shorter length."
            )
        samples.append(Sample(task, *text, tokens(text)))
    return samples


def source_of(
    task: str,
    length: int,
    count: int,
    corpus: Sequence[str],
    questions: Sequence[Question],
    rng: np.random.Generator,
    depth: float | None,
) -> Source:
    """What a task draws on. Raises DataError when it is not there, or too little."""
    needs = TASKS[task].needs
    if needs == "corpus":
        sentences = [sentence for text in corpus if text.strip() for sentence in split_sentences(f"{text.rstrip()}\n")]
        if not sentences:
            raise DataError(f"{task} hides its needles in text, and was given none: name a corpus.")
        return Source(length, sentences, depth=depth)
    if needs == "questions":
        usable = [item for item in questions if task == "qa_2" or len(item.paragraphs) == 1]
        if len(usable) < count:
            raise DataError(
                f"{task}: {count} samples need as many questions, and {len(usable)} were given: "
                "some would have been asked twice. Give more questions, or a smaller count."
            )
        return Source(length, questions=[usable[i] for i in rng.permutation(len(usable))])
    return Source(length, depth=depth)


def largest_fit(draft: Draft, tokens: Callable[[Text], int], least: int, length: int) -> int:
    """The largest size whose sample has at most `length` tokens; draft.smallest has `least`, which is no more.

    Interpolates, for tokens grow about linearly, and bisects when that takes long: it ends whatever `tokens` does, and the
    result has been seen to fit.
    """
    low, high = draft.smallest, draft.largest + 1  # low fits; high does not, or does not exist
    at_low, slope, step = least, 32.0, 0
    while high - low > 1:
        guess = low + int((length - at_low) / slope) if step < INTERPOLATED else (low + high) // 2
        size = min(max(guess, low + 1), high - 1)
        found = tokens(draft.write(size))
        slope = max(1.0, (found - at_low) / (size - low))
        if found <= length:
            low, at_low = size, found
        else:
            high = size
        step += 1
    return low
