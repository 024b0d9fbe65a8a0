"""All probes of one trained model, on samples that keep them cheap beside an evaluation of the whole held-out text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .. import config
from ..errors import DataError, MismatchError
from ..model.lm import LanguageModel
from ..model.lookup import Lookup
from ..tokens import piece_bytes
from ..train.loader import Batch, windows
from ..train.loop import on
from ..train.run import TrainedModel
from ..train.shards import Split
from ..train.tokenizer import tokenizer_digest
from .capture import capture_gates, evaluating
from .gate_statistics import gate_statistics
from .gates import GateView, gate_view
from .knockout import knock_out, knock_outs
from .ngrams import Ngrams, crowding, views
from .usage import usage_of

SHARE = 0.2  # of an evaluation's forward passes that the probes may take; counting n-grams and rows comes on top
VIEWED = 160  # tokens of the gate view
COMPARED = 96  # windows on which two models are compared
READ = 8192  # tokens that are read through the logit lens


def probe(
    model: LanguageModel,
    lookup: Lookup | None,
    held_out: Split,
    training: Iterable[Batch],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    length: int,
    tokens: int | None = None,
    viewed: tuple[Tensor, str] | None = None,
) -> dict[str, Any]:
    """What the memory does: {"knockout", "gates", "usage", "gate_view", "seconds"}, plain values.

    held_out: evaluated in windows of `length`; knock-outs and gates see an even sample of them. training: batches as they were
    trained on, of which `tokens` are counted (default: as many as are held out; seen n-grams, collisions and coverage are of
    these). viewed: token ids [T] for the gate view and where they come from; default: `excerpt` of the held-out text.

    "seconds": {part: seconds, "evaluation": of one pass over the held-out text, extrapolated from the sample, "ratio": all
    parts together / evaluation}. Precision is the caller's autocast. Raises MismatchError for a model without a memory,
    DataError for texts that are empty.
    """
    if lookup is None:
        raise MismatchError("this model has no memory: there is nothing to probe.")
    plan, device = lookup.plan, model.embedding.weight.device
    seconds: dict[str, float] = {}
    pieces = pieces_of(tokenizer)
    everything = -(-(len(held_out.tokens) - 1) // length)

    def sample(passes: int) -> list[Batch]:
        """Windows of which `passes` passes take half of what the probes may."""
        return list(windows(held_out, batch_size, length, max(batch_size, int(SHARE / 2 * everything / passes))))

    taken = sample(len(knock_outs(model)))
    evaluate_once(model, lookup, taken[:1], device)  # what is compiled or allocated once is not a pass's cost
    with timed(seconds, "sample"):
        evaluate_once(model, lookup, taken, device)
    evaluation = seconds.pop("sample") * everything / sum(len(batch.tokens) for batch in taken)

    with timed(seconds, "knockout"):
        knockout = knock_out(model, lookup, taken)
    with timed(seconds, "usage"):
        limit = len(held_out.tokens) if tokens is None else tokens
        seen = training_views(lookup, training, limit)
        text = Ngrams.of(seen, plan.vocab_size)
        used = usage_of(lookup, seen, text)
    with timed(seconds, "gates"):
        gates = gate_statistics(model, lookup, sample(2), pieces, text)
    with timed(seconds, "gate_view"):
        ids, source = viewed or excerpt(held_out, VIEWED)
        view = view_of(model, lookup, ids.to(device), pieces, text, source)
    ratio = sum(seconds.values()) / evaluation
    return {
        "knockout": knockout,
        "gates": gates,
        "usage": used,
        "gate_view": config.to_dict(view),
        "seconds": {**seconds, "evaluation": evaluation, "ratio": ratio},
    }


def compare_runs(one: TrainedModel, other: TrainedModel, held_out: Split, names: tuple[str, str]) -> dict[str, Any]:
    """What two models make of the same held-out windows, layer by layer: {"lens": {NAME: ..}, "cka"}.

    The logit lens of each (see lens.py), and where the layers of `one` belong among those of `other` (see cka.py); either may be
    without a memory. Raises MismatchError when they do not share a tokenizer, DataError for too little text.
    """
    from .cka import compare_models
    from .lens import logit_lens

    if tokenizer_digest(one.tokenizer) != tokenizer_digest(other.tokenizer):
        raise MismatchError("the two models have different tokenizers: the same ids would be different texts to them.")
    batches = list(windows(held_out, one.config.batch_size, one.config.length, COMPARED))
    return {
        "lens": {
            name: logit_lens(run.model, run.lookup, batches, max_tokens=READ)
            for name, run in zip(names, (one, other), strict=True)
        },
        "cka": compare_models(one.model, one.lookup, other.model, other.lookup, batches),
    }


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Note how long the block takes; whatever it computes on a GPU has come back when it ends."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


@torch.no_grad()
def evaluate_once(model: LanguageModel, lookup: Lookup, batches: Iterable[Batch], device: torch.device) -> float:
    """Nats of all tokens, without anything else: the pass that probes are compared with."""
    nats = 0.0
    with evaluating(model):
        for batch in (on(batch, device) for batch in batches):
            rows, _ = lookup.rows(batch.tokens, segments=batch.segments)
            loss = model.loss(batch.tokens, batch.targets, rows, segments=batch.segments, reduction="none")
            nats += float(loss.sum())
    return nats


def training_views(lookup: Lookup, batches: Iterable[Batch], limit: int) -> np.ndarray:
    """Views [T, N] (see ngrams.py) of the first batches that hold `limit` tokens together. Raises DataError for none."""
    seen: list[np.ndarray] = []
    for batch in batches:
        if sum(map(len, seen)) >= limit:
            break
        seen.append(views(lookup, batch.tokens, batch.segments))
    if not seen:
        raise DataError("no training text was given: what the memory was shown cannot be counted.")
    return np.concatenate(seen)


def view_of(
    model: LanguageModel, lookup: Lookup, tokens: Tensor, pieces: list[bytes], training: Ngrams, source: str
) -> GateView:
    """The gate view of a text, tokens [T], with the rows it reads and who shares them in the training text."""
    plan, seen = lookup.plan, views(lookup, tokens[None])
    rows, collides = crowding(plan, training, seen)
    return gate_view(
        [pieces[token] for token in tokens.tolist()],
        capture_gates(model, lookup, tokens),
        layers=plan.layers,
        orders=plan.orders,
        source=source,
        seen=training.times(seen)[:, np.array(plan.orders) - 1].tolist(),
        rows=rows.tolist(),
        collides=collides.tolist(),
    )


def excerpt(held_out: Split, tokens: int) -> tuple[Tensor, str]:
    """The beginning of the first held-out document of `tokens` tokens, or of the longest, and its name."""
    lengths = np.diff(held_out.starts, append=len(held_out.tokens))
    document = int(np.argmax(lengths >= tokens)) if (lengths >= tokens).any() else int(lengths.argmax())
    first = int(held_out.starts[document])
    ids = held_out.tokens[first : first + min(tokens, int(lengths[document]))].astype(np.int64)
    return torch.from_numpy(ids), f"from held-out document {document + 1} of {len(lengths)}"


def pieces_of(tokenizer: Tokenizer) -> list[bytes]:
    """Each token's bytes [V]."""
    return [piece_bytes(tokenizer.id_to_token(token) or "") for token in range(tokenizer.get_vocab_size())]
