"""Attention: grouped queries for small models, multi-head latent attention (DeepSeek-V2, 2.1) for large ones.

Both map `(x, positions, cache, mask)` to `(y, cache)`. A cache is a value: the one that is passed in stays as
it was, so a caller can keep it to roll back, or index its batch to reorder beams. Where a sequence is divided over
neighbours, what they hold of the positions before takes the cache's place.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .neighbours import Neighbours
from .norm import RMSNorm
from .rope import rotate


@dataclass(frozen=True)
class AttentionConfig:
    """Sizes of an attention layer; those of the other kind stay 0.

    gqa: `heads` queries share `kv_heads` keys and values of `head_dim`.
    mla: a head's key is `nope_dim` without position and `rope_dim` with it, the latter shared by all heads;
    its value is `value_dim`. Keys and values come from a latent of `kv_rank`, queries from one of `q_rank`
    (0: from the input).
    """

    kind: Literal["gqa", "mla"] = "gqa"
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        gqa: tuple[str, ...] = ("kv_heads", "head_dim")
        mla: tuple[str, ...] = ("nope_dim", "rope_dim", "value_dim", "kv_rank")
        needed, foreign = (gqa, (*mla, "q_rank")) if self.kind == "gqa" else (mla, gqa)
        for name in ("heads", *needed):
            if getattr(self, name) < 1:
                raise ConfigError(f"attention.{name} must be at least 1 for {self.kind}, got {getattr(self, name)}.")
        for name in foreign:
            if getattr(self, name):
                raise ConfigError(
                    f"attention.{name} means nothing to {self.kind} and would have been ignored silently."
                )
        if self.kind == "gqa" and self.heads % self.kv_heads:
            raise ConfigError(f"attention: {self.heads} heads cannot share {self.kv_heads} kv_heads: choose a divisor.")
        if self.q_rank < 0:
            raise ConfigError(f"attention.q_rank must be at least 0, got {self.q_rank}.")
        if (self.head_dim or self.rope_dim) % 2:
            raise ConfigError("attention: RoPE turns channels in pairs, so head_dim and rope_dim must be even.")
        if self.rope_theta <= 0:
            raise ConfigError(f"attention.rope_theta must be positive, got {self.rope_theta}.")

    @property
    def query_width(self) -> int:
        """Channels of one query (and of the key that it meets)."""
        return self.head_dim if self.kind == "gqa" else self.nope_dim + self.rope_dim

    @property
    def value_width(self) -> int:
        """Channels of one value."""
        return self.head_dim if self.kind == "gqa" else self.value_dim


class KeyValueCache(NamedTuple):
    """What grouped-query attention remembers of S positions."""

    key: Tensor  # [B, S, G, d], normalised and rotated
    value: Tensor  # [B, S, G, d]


class LatentCache(NamedTuple):
    """What latent attention remembers of S positions; its size does not depend on the heads."""

    latent: Tensor  # [B, S, kv_rank], normalised
    rope_key: Tensor  # [B, S, rope_dim], rotated


Cache = KeyValueCache | LatentCache


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention of query [B, T, H, d] to key [B, S, G, d] and value [B, S, G, e] -> [B, T, H, e].

    Each of the G key heads serves H/G query heads. mask: [B, 1, T, S] bool, True where a query may look; None
    is causal, with the last query on the last key. scale: 1/sqrt(d) unless given.
    """
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if query.shape[2] < key.shape[2]:
        return _attend_to_past(query, key, value, mask, scale).transpose(1, 2)
    shared = query.shape[1] != key.shape[1]
    # On a CPU the kernel's backward in bf16 takes 1.2 (T = 256) to 8 times (T = 15) as long as in fp32.
    dtype = query.dtype
    precise = query.device.type == "cpu" and dtype == torch.bfloat16
    with torch.autocast("cpu", enabled=False) if precise else nullcontext():
        query, key, value = (x.float() if precise else x for x in (query, key, value))
        y = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shared
        )
    return (y.to(dtype) if precise else y).transpose(1, 2)


def _attend_to_past(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention of T queries [B, H, T, d] to S > T keys [B, G, S, d] and values [B, G, S, e]; mask as in `attend`.

    The queries that share a key head become rows of one matrix: the cache is read once and never repeated in
    memory (on a CPU 130 times faster for one token, 32 heads, and one key head of 576 channels).
    """
    (heads, length), (groups, past) = query.shape[1:3], key.shape[1:3]
    if mask is None and length > 1:
        mask = torch.ones(1, 1, length, past, dtype=torch.bool, device=query.device).tril(past - length)
    if mask is not None:
        mask = mask.repeat(1, 1, heads // groups, 1)
    rows = query.unflatten(1, (groups, -1)).flatten(2, 3)  # [B, G, H/G * T, d]
    y = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return y.unflatten(2, (-1, length)).flatten(1, 2)


class GroupedQueryAttention(nn.Module):
    """Groups of query heads share a key head (Ainslie et al. 2023); queries and keys are normalised."""

    def __init__(self, config: AttentionConfig, dim: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(dim, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(dim, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(dim, config.kv_heads * config.head_dim, bias=False)
        self.query_norm = RMSNorm(config.head_dim, norm_eps)
        self.key_norm = RMSNorm(config.head_dim, norm_eps)
        self.out = nn.Linear(config.heads * config.head_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
        neighbours: Neighbours | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """x [B, T, D] at positions [T] -> y [B, T, D], and the longer cache. mask: see `attend`."""
        by_head = (-1, self.config.head_dim)
        query = self.query_norm(self.query(x).unflatten(-1, by_head))
        key = self.key_norm(self.key(x).unflatten(-1, by_head))
        value = self.value(x).unflatten(-1, by_head)
        query, key = (rotate(vector, positions, self.config.rope_theta) for vector in (query, key))
        if cache is not None:
            key, value = torch.cat([cache.key, key], dim=1), torch.cat([cache.value, value], dim=1)
        if neighbours is not None:
            key, value = neighbours.with_past(torch.cat([key, value], dim=-1)).chunk(2, dim=-1)
        y = attend(query, key, value, mask)
        return self.out(y.flatten(-2)), KeyValueCache(key, value)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2.1.2): keys and values of all heads come from one latent.

        [latent; rope_key] = kv_down x          RMSNorm(latent) and RoPE(rope_key) are the cache
        key_h = [K_h latent; rope_key]          value_h = V_h latent         K_h, V_h: a head's parts of kv_up

    `expanded` computes the keys and values of every head; `absorbed` moves K_h and V_h to the query's side,

        query_h . K_h latent = (K_h^T query_h) . latent
        sum_s p_s V_h latent_s = V_h sum_s p_s latent_s

    so that all heads attend to the latents themselves. The two are equal; `forward` takes the cheaper one.
    """

    def __init__(self, config: AttentionConfig, dim: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.config = config
        query_width = config.heads * config.query_width
        if config.q_rank:
            self.query_down = nn.Linear(dim, config.q_rank, bias=False)
            self.query_norm = RMSNorm(config.q_rank, norm_eps)
        self.query_up = nn.Linear(config.q_rank or dim, query_width, bias=False)
        self.kv_down = nn.Linear(dim, config.kv_rank + config.rope_dim, bias=False)
        self.kv_norm = RMSNorm(config.kv_rank, norm_eps)
        key_value_width = config.heads * (config.nope_dim + config.value_dim)
        self.kv_up = nn.Linear(config.kv_rank, key_value_width, bias=False)
        self.out = nn.Linear(config.heads * config.value_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: LatentCache | None = None,
        mask: Tensor | None = None,
        neighbours: Neighbours | None = None,
    ) -> tuple[Tensor, LatentCache]:
        """x [B, T, D] at positions [T] -> y [B, T, D], and the longer cache. mask: see `attend`."""
        config = self.config
        query = self.query_up(self.query_norm(self.query_down(x)) if config.q_rank else x)
        nope, rope = query.unflatten(-1, (config.heads, -1)).split([config.nope_dim, config.rope_dim], dim=-1)
        query = torch.cat([nope, rotate(rope, positions, config.rope_theta)], dim=-1)

        latent, rope_key = self.kv_down(x).split([config.kv_rank, config.rope_dim], dim=-1)
        latent = self.kv_norm(latent)
        rope_key = rotate(rope_key.unsqueeze(2), positions, config.rope_theta).squeeze(2)
        if cache is not None:
            latent = torch.cat([cache.latent, latent], dim=1)
            rope_key = torch.cat([cache.rope_key, rope_key], dim=1)
        if neighbours is not None:
            both = neighbours.with_past(torch.cat([latent, rope_key], dim=-1))
            latent, rope_key = both.split([config.kv_rank, config.rope_dim], dim=-1)
        cache = LatentCache(latent, rope_key)

        form = self.absorbed if self.absorbing_is_cheaper(x.shape[1], latent.shape[1]) else self.expanded
        return self.out(form(query, cache, mask).flatten(-2)), cache

    def expanded(self, query: Tensor, cache: LatentCache, mask: Tensor | None = None) -> Tensor:
        """query [B, T, H, nope + rope] -> [B, T, H, value], by the keys and values of every head."""
        config = self.config
        key_value = self.kv_up(cache.latent).unflatten(-1, (config.heads, -1))
        key, value = key_value.split([config.nope_dim, config.value_dim], dim=-1)
        rope_key = cache.rope_key.unsqueeze(2).expand(-1, -1, config.heads, -1)
        return attend(query, torch.cat([key, rope_key], dim=-1), value, mask)

    def absorbed(self, query: Tensor, cache: LatentCache, mask: Tensor | None = None) -> Tensor:
        """query [B, T, H, nope + rope] -> [B, T, H, value], by the latents as the one key head of all."""
        config = self.config
        up = self.kv_up.weight.unflatten(0, (config.heads, -1))  # [H, nope + value, kv_rank]
        key_up, value_up = up.split([config.nope_dim, config.value_dim], dim=1)
        nope, rope = query.split([config.nope_dim, config.rope_dim], dim=-1)
        query = torch.cat([torch.einsum("bthn,hnr->bthr", nope, key_up), rope], dim=-1)
        key = torch.cat([cache.latent, cache.rope_key], dim=-1).unsqueeze(2)  # [B, S, 1, kv_rank + rope]
        y = attend(query, key, cache.latent.unsqueeze(2), mask, scale=config.query_width**-0.5)
        return torch.einsum("bthr,hvr->bthv", y, value_up)

    def absorbing_is_cheaper(self, length: int, past: int) -> bool:
        """Whether `absorbed` multiplies less than `expanded`: when decoding it does, in training not."""
        config = self.config
        up = config.kv_rank * (config.nope_dim + config.value_dim)
        absorbed = length * up + length * past * (2 * config.kv_rank + config.rope_dim)
        expanded = past * up + length * past * (config.query_width + config.value_dim)
        return absorbed < expanded


def build_attention(config: AttentionConfig, dim: int, norm_eps: float) -> GroupedQueryAttention | LatentAttention:
    """The attention layer that `config.kind` names."""
    kind = GroupedQueryAttention if config.kind == "gqa" else LatentAttention
    return kind(config, dim, norm_eps)
