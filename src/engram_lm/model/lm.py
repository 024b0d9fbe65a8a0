"""The language model: tokens and the rows they name in, logits out. It knows no table and no tokenizer.

    h = norm(embedding(tokens)), once for each of M residual streams      [B, T, M, D]
    in each block:
        h = h + memory(h, rows)              where the block holds a memory
        h = h + attention(norm(h))           with M > 1 the streams are mixed here (hyper.py)
        h = h + ffn(norm(h))
    logits = head(norm(mean of the streams))                              [B, T, V]

State is a value that goes in and comes out, so a text may be read in chunks of any length. Or it is divided: a model
that has neighbours is given one chunk of each text, and they the others, at the same time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, MismatchError
from ..hashing import HashConfig
from ..memory import ConvState, Engram, EngramConfig
from ..tables import Fetch
from .attention import AttentionConfig, Cache, build_attention
from .ffn import MixtureOfExperts, MoEConfig, SwiGLU
from .hyper import HyperConnection, build_connection
from .neighbours import Neighbours
from .norm import RMSNorm


@dataclass(frozen=True)
class MemoryConfig:
    """A memory: how its rows are addressed, and how they are fused into the hidden state."""

    hash: HashConfig
    engram: EngramConfig


@dataclass(frozen=True)
class ModelConfig:
    """A language model of `layers` blocks of width `dim`.

    ffn_width: of the SwiGLU in every block, or in the leading dense blocks of a mixture of experts. streams:
    residual streams, 1 for the plain residual. tie_embeddings: the head is the embedding's matrix.
    """

    vocab_size: int
    dim: int
    layers: int
    attention: AttentionConfig
    ffn_width: int
    moe: MoEConfig | None = None
    streams: int = 1
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    memory: MemoryConfig | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "ffn_width", "streams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if self.moe and self.moe.dense_layers >= self.layers:
            raise ConfigError(
                f"model: moe.dense_layers = {self.moe.dense_layers} leaves the experts none of {self.layers}."
            )
        if self.memory and max(self.memory.hash.layers) >= self.layers:
            raise ConfigError(
                f"model: memory.hash.layers {self.memory.hash.layers} name a block beyond the last, "
                f"{self.layers - 1} (they count from 0): its rows would never be read."
            )


class LayerState(NamedTuple):
    """What one block remembers of the positions so far."""

    attention: Cache
    memory: ConvState | None  # None without a memory, or without a convolution in it


class ModelState(NamedTuple):
    """What the model remembers of a text between chunks; a value, so keep an old one to roll back."""

    position: int  # positions seen so far
    layers: tuple[LayerState | None, ...]  # None before the first position
    padding: Tensor | None = None  # [B, position] bool, where there was no token; None for nowhere

    def select(self, indices: Tensor) -> ModelState:
        """The state of the sequences `indices` [B'] of the batch, repeats allowed: the beams that survive."""
        return self._each(self.position, lambda past: past[indices])

    def crop(self, position: int) -> ModelState:
        """The state after the first `position` positions, as if the later ones had never been read: a rejected draft.

        Raises ValueError for more positions than were seen.
        """
        if not 0 <= position <= self.position:
            raise ValueError(f"a state of {self.position} positions cannot be cropped to {position}.")
        if position == 0:
            return ModelState(0, (None,) * len(self.layers))
        return self._each(position, lambda past: past[:, :position])

    def _each(self, position: int, change: Callable[[Tensor], Tensor]) -> ModelState:
        """The state with every tensor [B, S, ...] changed."""

        def changed(value: Any) -> Any:  # a tensor, None, or a named tuple of such
            if value is None or isinstance(value, Tensor):
                return value if value is None else change(value)
            return value._make(map(changed, value))

        return ModelState(position, tuple(map(changed, self.layers)), changed(self.padding))


class Context(NamedTuple):
    """What all blocks of one forward share."""

    positions: Tensor  # [T]
    mask: Tensor | None  # [B, 1, T, S] bool; None is causal
    segments: Tensor | None  # [B, T], with neighbours [B, S]; None if no document ends inside a row
    keep: Tensor | None  # [B, T] bool
    with_state: bool
    neighbours: Neighbours | None


class Block(nn.Module):
    """Memory (in memory layers), attention, feed-forward; each a residual step.

    checkpoint: what calls the block in training so that less of it is kept for the backward pass, such as
    `torch.utils.checkpoint.checkpoint`; None for a plain call.
    """

    checkpoint: Callable[..., Any] | None = None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim, streams, eps = config.dim, config.streams, config.norm_eps
        self.memory = None
        if config.memory and layer in config.memory.hash.layers:
            rows_per_token = config.memory.hash.rows_per_token
            self.memory = Engram(config.memory.engram, dim=dim, streams=streams, rows_per_token=rows_per_token)
        self.attention_connection = build_connection(dim, streams, eps)
        self.attention_norm = RMSNorm(dim, eps)
        self.attention = build_attention(config.attention, dim, eps)
        self.ffn_connection = build_connection(dim, streams, eps)
        self.ffn_norm = RMSNorm(dim, eps)
        sparse = config.moe if config.moe and layer >= config.moe.dense_layers else None
        self.ffn = MixtureOfExperts(sparse, dim) if sparse else SwiGLU(dim, config.ffn_width)

    def forward(
        self, h: Tensor, rows: Tensor | None, state: LayerState | None, context: Context
    ) -> tuple[Tensor, LayerState | None]:
        """h [B, T, M, D], this layer's rows [B, T, K, d] -> h [B, T, M, D], and the state after it, if asked for."""
        cache, memory_state = state or (None, None)
        if self.memory is not None and context.neighbours is not None:
            assert rows is not None  # the model was given some
            h = h + recall_beside(context.neighbours, self.memory, h, rows, context)
        elif self.memory is not None:
            delta, memory_state = self.memory(
                h,
                rows,
                memory_state,
                segments=context.segments,
                keep=context.keep,
                with_state=context.with_state,
            )
            h = h + delta
        x, write = self.attention_connection(h)
        y, cache = self.attention(self.attention_norm(x), context.positions, cache, context.mask, context.neighbours)
        h = write(y)
        x, write = self.ffn_connection(h)
        h = write(self.ffn(self.ffn_norm(x)))
        return h, LayerState(cache, memory_state) if context.with_state else None


class LanguageModel(nn.Module):
    """A decoder-only transformer, with a memory where `config.memory` says so.

    `LanguageModel.build` gives one that is ready to train; the bare constructor leaves parameters to
    `init_weights` or to a checkpoint (so that it can run on the meta device).

    neighbours: the ranks that each text of a batch is divided over, while it is: tokens, rows, targets, segments and keep
    are then this rank's chunk of it, and so are hidden states and losses. None for whole texts.
    """

    neighbours: Neighbours | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    @staticmethod
    def build(config: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> LanguageModel:
        """A model with initial weights on `device`."""
        with torch.device("meta"):
            model = LanguageModel(config)
        model.to_empty(device=device)
        model.init_weights(seed)
        return model

    def forward(
        self,
        tokens: Tensor,
        rows: Tensor | Fetch | None = None,
        *,
        segments: Tensor | None = None,
        keep: Tensor | None = None,
        padding: Tensor | None = None,
        state: ModelState | None = None,
        with_state: bool = False,
    ) -> tuple[Tensor, ModelState | None]:
        """tokens [B, T], rows [B, T, L, K, d] -> hidden [B, T, D] after the final norm, and the state.

        rows may still be on their way: they are waited for in front of the first block that holds a memory.

        segments: [B, T] document numbers; neither attention nor memory crosses a change. keep: [B, T] bool,
        False silences the memory at a position. padding: [B, T] bool, True where there is no token: nothing looks
        there, now or later. state: where an earlier chunk ended; a state is returned when asked for or given.

        Raises MismatchError when rows and memory do not belong together, segments are given with a state, or a state or
        padding with neighbours.
        """
        self._check_given(rows, tokens)
        with_state = with_state or state is not None
        if self.neighbours is not None and (with_state or padding is not None):
            raise MismatchError(
                "a state or padding came together with neighbours: both speak of whole texts, but this rank has only a "
                "chunk of each, and would have taken it for the beginning. Decode with neighbours = None."
            )
        if with_state and segments is not None:
            raise MismatchError(
                "segments were given together with a state: a state holds one document a sequence, and later "
                "chunks would have looked into earlier documents. Decode each document on its own."
            )
        start, layers, before = state or ModelState(0, (None,) * self.config.layers)
        length = tokens.shape[1]
        if self.neighbours is not None:
            start = self.neighbours.rank * length
            segments = None if segments is None else self.neighbours.with_past(segments)
        mask = None if segments is None else segment_mask(segments, start)
        segments = None if mask is None else segments
        everywhere = padding_so_far(before, padding, start, tokens)
        if everywhere is not None:
            mask = padding_mask(everywhere, length, mask)
        if padding is not None:
            keep = ~padding if keep is None else keep & ~padding
        context = Context(
            positions=torch.arange(start, start + length, device=tokens.device),
            mask=mask,
            segments=segments,
            keep=keep,
            with_state=with_state,
            neighbours=self.neighbours,
        )

        # Normalised, or a small embedding would drown in the first sublayers' outputs and a large one learn
        # slowly (0.4 nats after 100 steps of the tiny preset).
        h = F.rms_norm(self.embedding(tokens), (self.config.dim,), eps=self.config.norm_eps)
        h = h.unsqueeze(2).expand(-1, -1, self.config.streams, -1)
        after = []
        for layer, block in enumerate(self.blocks):
            if block.memory is not None:
                # where and as the projection takes them: a model held in bf16 has no autocast to do it
                narrow = h.dtype if h.dtype.itemsize < 4 else None
                rows = rows if isinstance(rows, Tensor) else self._arrived(rows, narrow, tokens)
                rows = rows.to(h.device, narrow or rows.dtype)
            checkpoint: Any = block.checkpoint if self.training else None
            call = partial(checkpoint, block) if checkpoint else block
            h, layer_state = call(h, self._rows_of(layer, rows), layers[layer], context)
            after.append(layer_state)
        hidden = self.norm(h.mean(2))
        return hidden, ModelState(start + length, tuple(after), everywhere) if with_state else None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]."""
        return F.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        rows: Tensor | Fetch | None = None,
        *,
        segments: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Cross entropy in nats of targets [B, T] (-100: ignored) -> the mean, or [B, T] with 0 there."""
        hidden, _ = self(tokens, rows, segments=segments)
        logits = self.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction)
        return loss.view_as(targets) if reduction == "none" else loss

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter and buffer, whatever it held before.

            embedding.weight            N(0, 0.02)          normalised in forward; small: it learns fast
            head.weight                 N(0, 0.02)          every token is about equally likely at the start
            *.out.weight, *.down.weight, *.down     0       each sublayer begins as the identity
            *norm.weight                1
            *.alpha, *.static           HyperConnection.reset_static
            *.memory.*                  Engram.reset_parameters
            any other [.., in]          N(0, 1/sqrt(in))    keeps the variance; experts and routers too
            buffers bias, load          0                   no expert is preferred, none was used

        Each tensor has its own generator, seeded by `seed` and its name: the backbone is the same with a
        memory and without.
        """
        for name, parameter in self.named_parameters():
            generator = _generator(seed, name, parameter.device)
            if name in ("embedding.weight", "head.weight"):
                parameter.normal_(std=0.02, generator=generator)
            elif name.endswith((".out.weight", ".down.weight", ".down")):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif ".memory." not in name and not name.endswith((".alpha", ".static")):
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, Engram):
                module.reset_parameters(_generator(seed, name, module.project.weight.device))
            elif isinstance(module, HyperConnection):
                module.reset_static()
            elif isinstance(module, MixtureOfExperts):
                module.bias.zero_()
                module.load.zero_()

    def balance(self) -> None:
        """Once a training step: move every expert layer's selection bias against its load."""
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                module.balance()

    def _rows_of(self, layer: int, rows: Tensor | Fetch | None) -> Tensor | None:
        """The rows [B, T, K, d] of a memory layer; None for other layers."""
        memory = self.config.memory
        if memory is None or layer not in memory.hash.layers or not isinstance(rows, Tensor):
            return None
        return rows[:, :, memory.hash.layers.index(layer)]

    def _arrived(self, fetch: Fetch | None, narrow: torch.dtype | None, tokens: Tensor) -> Tensor:
        """Rows that were on their way."""
        assert fetch is not None  # a model with a memory was given rows
        rows = fetch.rounded(narrow) if narrow else fetch.rows()
        self._check_shape(rows, tokens)
        return rows

    def _check_given(self, rows: Tensor | Fetch | None, tokens: Tensor) -> None:
        if self.config.memory is None and rows is not None:
            raise MismatchError("rows were given to a model without a memory: they would have changed nothing.")
        if self.config.memory is not None and rows is None:
            raise MismatchError(
                "this model has a memory but was called without rows: the memory would have been silently "
                "switched off. To silence it on purpose, pass rows with keep=False everywhere."
            )
        if isinstance(rows, Tensor):
            self._check_shape(rows, tokens)

    def _check_shape(self, rows: Tensor, tokens: Tensor) -> None:
        memory = self.config.memory
        assert memory is not None
        expected = (*tokens.shape, len(memory.hash.layers), memory.hash.rows_per_token, memory.engram.row_dim)
        if rows.shape != expected:
            raise MismatchError(
                f"rows have the shape {list(rows.shape)}, but these tokens and this memory need "
                f"[B, T, L, K, d] = {list(expected)}: the memory would have read the wrong rows."
            )


def recall_beside(neighbours: Neighbours, memory: Engram, h: Tensor, rows: Tensor, context: Context) -> Tensor:
    """What a memory adds to a chunk h [B, T, M, D] whose short convolution looks into the chunks before.

    The few positions that it sees there are fused once more and dropped, so that a chunk is fused as a whole text is.
    """
    length, tail = h.shape[1], memory.config.tail
    h, rows = neighbours.with_past(h, tail), neighbours.with_past(rows, tail)
    keep = None if context.keep is None else neighbours.with_past(context.keep, tail)
    segments = None if context.segments is None else context.segments[:, -h.shape[1] :]
    delta, _ = memory(h, rows, segments=segments, keep=keep)
    return delta[:, -length:]


def segment_mask(segments: Tensor, first: int = 0) -> Tensor | None:
    """segments [B, S] -> causal mask [B, 1, S - first, S] bool within documents, for the positions from `first` on.

    None if no document ends inside a row.
    """
    change = segments[:, 1:] != segments[:, :-1]
    if not change.any():
        return None
    document = F.pad(change, (1, 0)).cumsum(1)  # a number that comes back after a change is another document
    return (document[:, first:, None] == document[:, None, :]).tril(first).unsqueeze(1)


def padding_so_far(before: Tensor | None, now: Tensor | None, start: int, tokens: Tensor) -> Tensor | None:
    """Padding [B, start + T] of the positions before, [B, start], and of tokens [B, T]; None for none at all.

    Raises MismatchError when `now` is not [B, T].
    """
    if before is None and now is None:
        return None
    padding = torch.zeros(len(tokens), start + tokens.shape[1], dtype=torch.bool, device=tokens.device)
    if before is not None:
        padding[:, :start] = before
    if now is not None:
        if now.shape != tokens.shape:
            raise MismatchError(
                f"padding is {list(now.shape)}, but the tokens are {list(tokens.shape)}: others would have been hidden."
            )
        padding[:, start:] = now
    return padding


def padding_mask(padding: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
    """padding [B, S] of all positions -> mask [B, 1, T, S] bool for the last T = `length` of them.

    mask: [B, 1, T, S], what may be looked at apart from padding; None is causal. A position always looks at itself:
    padding would otherwise have nothing to look at, and a softmax over nothing is not a number.
    """
    past = padding.shape[1]
    if mask is None:
        mask = torch.ones(1, 1, length, past, dtype=torch.bool, device=padding.device).tril(past - length)
    itself = torch.eye(past, dtype=torch.bool, device=padding.device)[past - length :]
    return mask & ~padding[:, None, None, :] | itself


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A random generator that depends on the seed and a tensor's name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
