"""How many different n-grams a batch of real text holds, and how many rows of a table they are.

A rank asks for a row once a step, however often its tokens read it. So what travels follows from the distinct n-grams of its
batch, which grow more slowly than its tokens. They are counted in batches as training reads them: packed windows at random
places, documents apart. Rows follow from them by arithmetic, for a table of any size: n n-grams that a hash spreads over R rows
hit R (1 - (1 - 1/R)^n) of them. `simulate` hashes real batches instead, row by row, to see that this holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..hashing import HashConfig, HashPlan, hash_ngrams
from ..model.lookup import build_plan
from ..tables import deduplicate
from ..tokens import CanonicalVocabulary
from ..train.loader import Batch, Loader, LoaderState
from ..train.shards import Split
from .fits import fit_polynomial

NUMBERS = 2**40  # that n-grams are told apart by: of a million, fewer than one is expected to be missed
FITTED = 3  # of the largest sizes, what the power law goes through


@dataclass(frozen=True)
class Growth:
    """Distinct n-grams of a batch against its tokens, measured at S sizes, for O orders.

    tokens: [S] rising; mean, spread: [S, O] mean and standard deviation over `draws` batches; text_tokens: of the whole text.
    Beyond the largest size: Heaps' law, n-grams = c tokens^exponent, through its mean, with exponents [O] fitted to the largest
    three sizes. Exponents fall with size, so what is extrapolated is rather too much.
    """

    orders: tuple[int, ...]
    tokens: tuple[int, ...]
    mean: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[float, ...], ...]
    exponents: tuple[float, ...]
    draws: int
    text_tokens: int

    def reaches(self, tokens: int) -> bool:
        """Whether a batch of so many tokens was measured, or lies between two that were; otherwise `at` extrapolates."""
        return tokens <= self.tokens[-1]

    def at(self, tokens: int) -> np.ndarray:
        """Distinct n-grams [O] of a batch of so many tokens. Raises ConfigError for one smaller than was measured."""
        if tokens < self.tokens[0]:
            raise ConfigError(f"n-grams were counted in batches from {self.tokens[0]:,} tokens on, not of {tokens:,}.")
        logs = np.log(np.array(self.mean))
        if self.reaches(tokens):
            at = [np.interp(math.log(tokens), np.log(self.tokens), column) for column in logs.T]
            return np.exp(np.array(at))
        beyond = math.log(tokens / self.tokens[-1])
        return np.exp(logs[-1] + np.array(self.exponents) * beyond)


def measure_growth(
    split: Split,
    vocabulary: CanonicalVocabulary,
    config: HashConfig,
    *,
    batch: int,
    largest: Sequence[int] = (),
    length: int = 4096,
    draws: int = 8,
    seed: int = 0,
) -> Growth:
    """Count the n-grams of `split` that `config` hashes, in `draws` batches of each size, in sequences of `length` tokens.

    Sizes double from an eighth of `batch` on to the greatest of `largest`, which are measured too, as far as half of the text
    goes. Raises DataError for a text of fewer than `batch` tokens, ConfigError for fewer than two draws.
    """
    if draws < 2:
        raise ConfigError(f"a spread needs at least two draws, got {draws}.")
    if batch < 8 or length < config.orders[-1]:
        raise ConfigError(
            f"batches of {batch} tokens in sequences of {length}: too few to tell how {config.orders[-1]}-grams grow."
        )
    limit, most = len(split.tokens) // 2, max((batch, *largest))
    if limit < batch // 2:
        raise DataError(
            f"the text has {len(split.tokens):,} tokens, fewer than a batch of {batch:,}: how its n-grams grow could not be told."
        )
    doubling = (batch >> 3 << power for power in range(64))
    sizes = sorted({size for size in (batch, *largest, *doubling) if size <= min(most, limit)})
    counted = [
        [distinct_ngrams(config, vocabulary, drawn) for drawn in _loader(split, size, length, seed).first(draws)]
        for size in sizes
    ]  # [S, draws, O]
    mean = np.mean(counted, axis=1)
    logs = np.log(sizes[-FITTED:]), np.log(mean[-FITTED:])
    return Growth(
        orders=config.orders,
        tokens=tuple(sizes),
        mean=_plain(mean),
        spread=_plain(np.std(counted, axis=1, ddof=1)),
        exponents=tuple(float(fit_polynomial(logs[0], column, 1).coefficients[1]) for column in logs[1].T),
        draws=draws,
        text_tokens=len(split.tokens),
    )


def _loader(split: Split, tokens: int, length: int, seed: int) -> Loader:
    """Batches of so many tokens, less the few that would not fill a window of each batch to the same length."""
    windows = max(1, round(tokens / length))
    return Loader(split, windows, tokens // windows, seed)


def _plain(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in values)


def distinct_ngrams(config: HashConfig, vocabulary: CanonicalVocabulary, batch: Batch) -> list[int]:
    """Distinct n-grams of each order, as `config` sees them: canonical ids, cut off where documents and windows begin.

    The memory's own hash counts them, with one head an order that is so large that hardly two n-grams share a number.
    """
    wide = build_plan(replace(config, heads=1, rows_per_head=NUMBERS, layers=(0,)), vocabulary)
    ids = _ids(wide, vocabulary, batch)[:, :, 0]  # [B, T, O]
    return [len(deduplicate(ids[:, :, order])[0]) for order in range(len(config.orders))]


def _ids(plan: HashPlan, vocabulary: CanonicalVocabulary, batch: Batch) -> Tensor:
    """[B, T, L, K]."""
    return hash_ngrams(plan, vocabulary(batch.tokens), segments=batch.segments)[0]


# --- rows -----------------------------------------------------------------------------------------------------------


def head_sizes(config: HashConfig) -> np.ndarray:
    """[L, K] rows of each head; they do not depend on a vocabulary."""
    return HashPlan.build(config, vocab_size=config.pad_id + 1, pad=config.pad_id).sizes


def distinct_rows(sizes: np.ndarray, ngrams: np.ndarray) -> np.ndarray:
    """Rows [L, K] of heads of `sizes` [L, K], order-major, that so many distinct n-grams [O] are expected to hit."""
    of_head = np.repeat(ngrams, sizes.shape[1] // len(ngrams))
    return sizes * (1 - (1 - 1 / sizes) ** of_head)


def owner_shares(sizes: np.ndarray, rows: np.ndarray, ranks: int) -> np.ndarray:
    """Share [ranks] of the requested `rows` [L, K] that each owner of a contiguous range of the table holds.

    Ranges are equal in rows, but a head of a low order has fewer distinct n-grams, so fewer of its rows are asked for.
    """
    ends, asked = (np.concatenate([[0], np.cumsum(of_head)]) for of_head in (sizes, rows))
    borders = [rank * int(ends[-1]) // ranks for rank in range(ranks + 1)]
    return np.diff(np.interp(borders, ends, asked)) / asked[-1]


@dataclass(frozen=True)
class Simulation:
    """What one step of real batches asks for, hashed and deduplicated row by row."""

    distinct: float  # rows that a rank asks for, mean over ranks
    everywhere: int  # rows that any rank asks for
    remote: float  # of a rank's rows, those that others own, mean over ranks
    busiest: float  # rows asked of the busiest owner, over the mean


def simulate(
    split: Split,
    vocabulary: CanonicalVocabulary,
    config: HashConfig,
    *,
    ranks: int,
    batch: int,
    length: int = 4096,
    seed: int = 0,
) -> Simulation:
    """Deal `ranks` batches of `batch` tokens to as many ranks and count the rows that each asks of each.

    Raises DataError for a text that is too short.
    """
    plan = build_plan(config, vocabulary)
    borders = torch.tensor([rank * plan.num_rows // ranks for rank in range(ranks + 1)])
    of_rank = _loader(split, batch, length, seed)
    loader = replace(of_rank, batch_size=of_rank.batch_size * ranks)  # refuses a text with fewer windows
    whole, _ = loader.next(LoaderState())
    asked, requests = [], np.zeros((ranks, ranks), np.int64)  # of requests: who asks, who owns
    for rank in range(ranks):
        mine = slice(rank * of_rank.batch_size, (rank + 1) * of_rank.batch_size)
        part = Batch(whole.tokens[mine], whole.targets[mine], None if whole.segments is None else whole.segments[mine])
        unique, _ = deduplicate(_ids(plan, vocabulary, part))
        requests[rank] = torch.searchsorted(unique, borders).diff().numpy()
        asked.append(unique)
    everywhere, _ = deduplicate(torch.cat(asked))
    served = requests.sum(0)
    return Simulation(
        distinct=float(requests.sum() / ranks),
        everywhere=len(everywhere),
        remote=float((requests.sum() - requests.trace()) / ranks),
        busiest=float(served.max() / served.mean()),
    )
