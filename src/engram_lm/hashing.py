"""Addresses: which rows of the table a token reads. They follow from tokens alone, so rows can be fetched early.

The n-gram that ends at position t is hashed by multiply and XOR (paper 2.2; section numbers are arXiv 2601.07372's):

    mix = x[t] * m[0]  ^  x[t-1] * m[1]  ^  ...  ^  x[t-n+1] * m[n-1]        one odd multiplier a lag and layer
    id  = mix mod size[order, head] + offset[order, head]                    one prime size a head

Multipliers stay below 2^63 / vocabulary, so no product overflows and no remainder is negative.

All memory layers share one address space: layer after layer, order after order, head after head, without gaps.
`ids - plan.layer_starts[:, None]` are the row numbers inside each layer's own table, as published.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError
from .kernels import compiled, on_gpu

DEAD = -1  # in a history: a position that no later n-gram may see
OUTSIDE = -2  # in a history from a GPU: an id outside the vocabulary
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class HashConfig:
    """What determines the addresses, together with the vocabulary's size.

    orders: the n of the n-grams; heads: hash functions an order; rows_per_head: lower bound of each head's prime size,
    one number for all orders or one an order; layers: 0-based blocks that hold a memory, in the order in which primes
    are handed out; pad_id: raw token id that stands for "before the start".

    scheme: `engram` is the paper's and DeepSeek-V4.1's; `ple` is Qwen3.8-Flash-Next's (splitmix64 multipliers, seeded by
    the memory's ordinal rather than its layer; the window resets after `pad_id`, its end-of-text token); `capacity_1` is
    the control in which every n-gram reads the same row of its head, so that the branch remains and the memory is gone;
    `shuffled` is the control in which a text reads the rows of its neighbour in the batch (model/lookup.py): as many rows, as
    often, but they say nothing about it.
    """

    orders: tuple[int, ...] = (2, 3)
    heads: int = 8
    rows_per_head: int | tuple[int, ...] = 646_400
    layers: tuple[int, ...] = (1, 15)
    pad_id: int = 2
    seed: int = 0
    scheme: Literal["engram", "ple", "capacity_1", "shuffled"] = "engram"

    def __post_init__(self) -> None:
        if not self.orders or list(self.orders) != sorted(set(self.orders)) or self.orders[0] < 1:
            raise ConfigError(f"hash.orders must rise from 1 or more, got {self.orders}.")
        if self.heads < 1:
            raise ConfigError(f"hash.heads must be at least 1, got {self.heads}.")
        if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise ConfigError(f"hash.layers must name different blocks, counted from 0; got {self.layers}.")
        if isinstance(self.rows_per_head, tuple) and len(self.rows_per_head) != len(self.orders):
            raise ConfigError(f"hash.rows_per_head has {len(self.rows_per_head)} sizes for {len(self.orders)} orders.")
        if min(self.rows_by_order) < 1:
            raise ConfigError(f"hash.rows_per_head must be at least 1, got {self.rows_per_head}.")

    @property
    def rows_by_order(self) -> tuple[int, ...]:
        """Lower bound of a head's rows for each order."""
        if isinstance(self.rows_per_head, tuple):
            return self.rows_per_head
        return (self.rows_per_head,) * len(self.orders)

    @property
    def rows_per_token(self) -> int:
        """K: rows that one token reads in one memory layer."""
        return len(self.orders) * self.heads

    @staticmethod
    def paper() -> HashConfig:
        """The published demo's defaults."""
        return HashConfig()

    @staticmethod
    def deepseek_v41() -> HashConfig:
        """DeepSeek-V4.1-Flash: 2 x 384 M rows."""
        return HashConfig(orders=(2, 3, 4), rows_per_head=16_000_000, layers=(1, 14))

    @staticmethod
    def qwen_ple(eos_id: int, layers: tuple[int, ...] = (1,)) -> HashConfig:
        """Qwen3.8-Flash-Next's PLE: 320 M rows, raw token ids, window reset after `eos_id`."""
        return HashConfig(rows_per_head=20_000_000, layers=layers, pad_id=eos_id, seed=1234, scheme="ple")

    def sized(self, *, rows: int) -> HashConfig:
        """The same addresses with the largest equal heads whose tables hold at most `rows` rows in all.

        From a budget of parameters, `rows = parameters // row_dim`; of bytes, `rows = bytes // row_bytes`.
        Raises ConfigError when not even the smallest primes fit.
        """

        def total(rows_per_head: int) -> int:
            return int(prime_sizes(replace(self, rows_per_head=rows_per_head)).sum())

        low, high = 0, rows // (len(self.layers) * self.rows_per_token) + 1  # total(low) fits, total(high) does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if total(middle) <= rows else (low, middle)
        if low == 0:
            heads = len(self.layers) * self.rows_per_token
            raise ConfigError(f"A budget of {rows:,} rows is too small for {heads} heads of different prime sizes.")
        return replace(self, rows_per_head=low)


@dataclass(frozen=True)
class HashPlan:
    """Everything `hash_ngrams` needs, derived from a HashConfig and a vocabulary size; pure, and equal by digest.

    L memory layers, N = largest order, K = orders x heads (order-major).
    """

    orders: tuple[int, ...]
    heads: int
    multipliers: np.ndarray  # [L, N] int64, odd, one a lag
    sizes: np.ndarray  # [L, K] int64: rows of each head (primes; 1 in the capacity-1 control)
    offsets: np.ndarray  # [L, K] int64: first row of each head in the shared address space
    layers: tuple[int, ...]  # the blocks that the L memory layers sit in
    vocab_size: int  # canonical ids are below this
    pad: int  # canonical id that stands for "nothing there"
    eos: int | None  # the token after which the window resets (ple), or None

    @staticmethod
    def build(config: HashConfig, *, vocab_size: int, pad: int) -> HashPlan:
        """Derive the plan for a vocabulary of `vocab_size` canonical ids in which `pad` is the pad's canonical id."""
        if not 0 <= pad < vocab_size:
            raise ConfigError(
                f"pad id {pad} lies outside the vocabulary of {vocab_size} ids: its products could overflow and "
                "its rows would be arbitrary."
            )
        sizes = np.ones((len(config.layers), config.rows_per_token), np.int64)
        if config.scheme != "capacity_1":
            sizes = prime_sizes(config)
        ends = np.cumsum(sizes).reshape(sizes.shape)
        multipliers = ple_multipliers if config.scheme == "ple" else engram_multipliers
        return HashPlan(
            orders=config.orders,
            heads=config.heads,
            multipliers=multipliers(config, vocab_size),
            sizes=sizes,
            offsets=ends - sizes,
            layers=config.layers,
            vocab_size=vocab_size,
            pad=pad,
            eos=pad if config.scheme == "ple" else None,
        )

    @property
    def num_rows(self) -> int:
        """Rows of all memory layers together."""
        return int(self.sizes.sum())

    @property
    def layer_starts(self) -> np.ndarray:
        """[L] first row of each memory layer."""
        return self.offsets[:, 0]

    @property
    def history_length(self) -> int:
        """Tokens of the past that the next one needs: N - 1."""
        return self.orders[-1] - 1

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits: two plans with the same digest send every n-gram to the same row."""
        facts = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HashPlan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def constants(self) -> Any:
        """The plan as the compiled kernel wants it."""
        from .kernels.hashing import Constants

        return Constants.of(self)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


# --- what the plan is made of ---------------------------------------------------------------------------------------


def engram_multipliers(config: HashConfig, vocab_size: int) -> np.ndarray:
    """[L, N] odd int64 from `default_rng(seed + 10007 * layer)`, as in the demo and in V4.1."""
    half = max(1, INT64_MAX // vocab_size // 2)
    draws = [
        np.random.default_rng(config.seed + 10007 * layer).integers(0, half, size=config.orders[-1], dtype=np.int64)
        for layer in config.layers
    ]
    return np.stack(draws) * 2 + 1


def ple_multipliers(config: HashConfig, vocab_size: int) -> np.ndarray:
    """[L, N] odd int64 by splitmix64, seeded by the memory's ordinal (0, 1, ...), as in Qwen3.8-Flash-Next."""
    half = max(1, INT64_MAX // vocab_size // 2)
    rows = [
        [
            2 * (splitmix64(config.seed + 10007 * ordinal + GAMMA * (lag + 1)) % half) + 1
            for lag in range(config.orders[-1])
        ]
        for ordinal in range(len(config.layers))
    ]
    return np.array(rows, np.int64)


GAMMA = 0x9E3779B97F4A7C15


def splitmix64(x: int) -> int:
    """The generator's output function (Steele, Lea and Flood 2014) on 64-bit words."""
    mask = 2**64 - 1
    x = (x + GAMMA) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def prime_sizes(config: HashConfig) -> np.ndarray:
    """[L, K] int64 primes from `rows_per_head` upwards, none used twice over layers, orders and heads."""
    used: set[int] = set()

    def unused_primes(start: int) -> Iterator[int]:
        candidate = max(start, 2)
        while True:
            if candidate not in used and is_prime(candidate):
                used.add(candidate)
                yield candidate
            candidate += 1

    sizes = []
    for _ in config.layers:
        for start in config.rows_by_order:
            primes = unused_primes(start)
            sizes += [next(primes) for _ in range(config.heads)]
    return np.array(sizes, np.int64).reshape(len(config.layers), config.rows_per_token)


def is_prime(n: int) -> bool:
    """Miller-Rabin; with these witnesses it is a proof for every n below 2^64 (Sinclair 2011; Jaeschke 1993)."""
    witnesses = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 41 * 41:
        return n > 1 and all(n % p for p in witnesses if p < n)
    if not all(n % p for p in witnesses):
        return False
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    odd = (n - 1) >> twos
    for witness in witnesses:
        x = pow(witness, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


# --- applying it ----------------------------------------------------------------------------------------------------


def hash_ngrams(
    plan: HashPlan,
    canonical: Tensor,
    *,
    segments: Tensor | None = None,
    dead: Tensor | None = None,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows that each position reads, in every memory layer at once.

    canonical: [B, T] int64 canonical ids. segments: [B, T] document numbers; an n-gram never reaches into another one.
    dead: [B, T] bool; such a position (image span, padding) reads the pad's rows, and no n-gram sees it or past it.
    history: [B, N-1, 2] int64 as returned by the call before this one, (canonical id or DEAD, segment) for each
    position; None at the start. It is a value: keep an old one to roll back, index its first axis to reorder beams.
    Without `segments`, positions continue the history's last document.

    Returns ids [B, T, L, K] int64 below plan.num_rows, and the history after the last position.
    Raises ValueError for an id outside the vocabulary, whose product could overflow, and for a wrong shape. On a GPU, where
    nobody waits for the ids, an n-gram that sees one has row id -1 instead, which reads as NaN; in a history it is OUTSIDE.
    """
    if on_gpu(canonical.device) and canonical.numel() and not torch.compiler.is_compiling():
        from .kernels.gpu import hashing as on_device

        _require_shapes(plan, canonical, segments, dead, history)
        return on_device.hash_ngrams(on_device.constants(plan, canonical.device), canonical, segments, dead, history)
    if canonical.device.type != "cpu" or not compiled():
        return reference_hash_ngrams(plan, canonical, segments=segments, dead=dead, history=history)
    from .kernels import hashing as kernel

    segments, history = _complete(plan, canonical, segments, dead, history)
    ids, after, inside = kernel.hash_ngrams(
        plan.constants,
        np.ascontiguousarray(canonical.numpy(), np.int64),
        np.ascontiguousarray(segments.numpy(), np.int64),
        np.zeros(canonical.shape, np.bool_) if dead is None else np.ascontiguousarray(dead.numpy(), np.bool_),
        np.ascontiguousarray(history.numpy(), np.int64),
    )
    if not inside:
        _require_vocabulary(plan, canonical)
    return torch.from_numpy(ids), torch.from_numpy(after)


def reference_hash_ngrams(
    plan: HashPlan,
    canonical: Tensor,
    *,
    segments: Tensor | None = None,
    dead: Tensor | None = None,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The readable truth: `hash_ngrams` on any device, without a kernel."""
    length = canonical.shape[1]
    _require_vocabulary(plan, canonical)
    segments, history = _complete(plan, canonical, segments, dead, history)
    seen = canonical if dead is None else canonical.masked_fill(dead, DEAD)
    past = torch.cat([history, torch.stack([seen, segments.long()], dim=-1)], dim=1)  # [B, N-1+T, 2]

    constant = _constants(plan, canonical.device)
    ids = canonical.new_empty(*canonical.shape, len(plan.layers), len(plan.orders), plan.heads)
    blocked = torch.zeros_like(canonical, dtype=torch.bool)  # once the view is blocked it stays so for larger lags
    mix: Tensor | int = 0
    for lag in range(plan.orders[-1]):
        first = plan.history_length - lag
        token, segment = past[:, first : first + length].unbind(-1)
        blocked = blocked | (token == DEAD) | (segment != segments)
        value = token.masked_fill(blocked, plan.pad)
        mix = mix ^ (value[:, :, None] * constant.multipliers[:, lag])  # [B, T, L]
        if plan.eos is not None and lag > 0:
            blocked = blocked | (token == plan.eos)
        if lag + 1 in plan.orders:
            order = plan.orders.index(lag + 1)
            ids[:, :, :, order] = mix[..., None] % constant.sizes[:, order] + constant.offsets[:, order]
    return ids.flatten(-2), past[:, length:]


def _complete(
    plan: HashPlan, canonical: Tensor, segments: Tensor | None, dead: Tensor | None, history: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The segments and the history, given or not; all shapes are as documented thereafter."""
    _require_shapes(plan, canonical, segments, dead, history)
    batch, length = canonical.shape
    if history is None:
        history = start_of_text(plan, batch, canonical.device)
    if segments is None:
        segments = history[:, -1:, 1].expand(batch, length) if plan.history_length else torch.zeros_like(canonical)
    return segments, history


def _require_shapes(
    plan: HashPlan, canonical: Tensor, segments: Tensor | None, dead: Tensor | None, history: Tensor | None
) -> None:
    of_history = (len(canonical), plan.history_length, 2)
    if history is not None and history.shape != of_history:
        raise ValueError(
            f"history is {list(history.shape)} instead of {list(of_history)}: it belongs to another "
            "batch or plan, and n-grams would see the wrong past."
        )
    for name, given in ("segments", segments), ("dead", dead):
        if given is not None and given.shape != canonical.shape:
            raise ValueError(f"{name} is {list(given.shape)}, but the ids are {list(canonical.shape)}.")


def _require_vocabulary(plan: HashPlan, canonical: Tensor) -> None:
    if canonical.numel() and not 0 <= int(canonical.min()) <= int(canonical.max()) < plan.vocab_size:
        raise ValueError(
            f"canonical ids run from {int(canonical.min())} to {int(canonical.max())}, outside the plan's vocabulary "
            f"of {plan.vocab_size}: they would read arbitrary rows."
        )


def start_of_text(plan: HashPlan, batch: int, device: torch.device | None = None) -> Tensor:
    """The history before the first token: nothing to be seen. [B, N-1, 2] int64."""
    history = torch.zeros(batch, plan.history_length, 2, dtype=torch.int64, device=device)
    history[..., 0] = DEAD
    return history


@dataclass(frozen=True)
class _Constants:
    multipliers: Tensor  # [L, N]
    sizes: Tensor  # [L, orders, heads]
    offsets: Tensor  # [L, orders, heads]


def _constants(plan: HashPlan, device: torch.device) -> _Constants:
    by_head = (len(plan.layers), len(plan.orders), plan.heads)
    on: Callable[[np.ndarray], Tensor] = lambda array: torch.as_tensor(array, device=device)  # noqa: E731
    return _Constants(on(plan.multipliers), on(plan.sizes).view(by_head), on(plan.offsets).view(by_head))
