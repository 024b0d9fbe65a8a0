"""A memory on the residual stream of any decoder-only model of `transformers`.

    memory = attach(model, EngramConfig(row_dim=32, conv_kernel=0), tokenizer)

In front of each chosen layer, h becomes h + engram(h, rows). Rows start at zero, so the model's logits are what they were,
bit for bit, until the memory is trained. The model keeps its class and its code: hooks on its decoder address the rows when
tokens come in, and fuse them layer by layer; `detach` takes the hooks away again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..errors import ConfigError, MismatchError
from ..hashing import HashConfig
from ..memory import ConvState, Engram, EngramConfig
from ..model.lm import MemoryConfig
from ..model.lookup import Lookup, address_digest, build_plan
from ..tables import DeviceTable, Fetch, TableConfig, build_table
from ..tokens import CanonicalVocabulary
from .decoder import arguments, device_of, find_decoder
from .past import Past, cache_in, past_of, remember
from .rows import TrainedRows
from .text import UNSEEN, Text


class Memory(nn.Module):
    """A table and the Engrams that fuse its rows in front of some layers of one model.

    Attributes:
        name: what `using`, `detach` and `mounted` call it.
        config: how rows are addressed and fused.
        lookup: canonical vocabulary, plan and table.
        engrams: by layer number, as text.
        rows: what training changes in the table.
        enabled: whether it is on where `using` does not say otherwise.
        train_rows: whether gradients reach the table, wherever autograd records (in evaluation mode too, as with any
            parameter); a mounted cartridge's do not.
    """

    def __init__(self, name: str, config: MemoryConfig, lookup: Lookup, dim: int) -> None:
        super().__init__()
        self.name, self.config, self.lookup = name, config, lookup
        self.rows = TrainedRows(lookup)
        self.enabled, self.train_rows = True, True
        width = config.hash.rows_per_token
        self.engrams = nn.ModuleDict(
            {str(layer): Engram(config.engram, dim=dim, rows_per_token=width) for layer in config.hash.layers}
        )

    def engram(self, layer: int) -> Engram | None:
        """The Engram in front of a layer, if there is one."""
        found = self.engrams[str(layer)] if layer in self.config.hash.layers else None
        return found  # type: ignore[return-value]

    def read(self, text: Text, past: Past | None) -> Tensor | Fetch:
        """Rows [B, T, L, K, d] of a text, as given; with gradients where autograd records and they train, else on their way."""
        tokens = text.in_order(text.tokens)
        if past is not None:
            tokens = torch.cat([text.past_in_order(past.tokens, self.lookup.plan.history_length), tokens], dim=1)
        dead = (tokens == UNSEEN) | (tokens >= len(self.lookup.vocabulary.lookup))
        ids = self.lookup.ids(tokens, segments=text.segments, dead=dead)[0]
        ids = text.as_given(ids[:, -text.tokens.shape[1] :]).contiguous()
        if self.train_rows and torch.is_grad_enabled():
            return self.rows.read(ids)
        return self.lookup.table.prefetch(ids)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles of a model. Raises ConfigError for a table that is not simply in memory."""
        if not isinstance(self.lookup.table, DeviceTable):
            raise ConfigError(
                f"the memory {self.name!r} cannot be copied or pickled with its model: its rows are in a "
                f"{type(self.lookup.table).__name__}. Detach it first; save it as a cartridge and mount that on both."
            )
        return self.__dict__.copy()

    def extra_repr(self) -> str:
        """Its size."""
        table = self.lookup.table
        return f"{self.name!r}, {table.num_rows:,} rows of {table.dim}, {'on' if self.enabled else 'off'}"


@dataclass
class Call:
    """One forward of the decoder: what the layers' hooks need to know."""

    text: Text
    past: Past | None
    cache: Cache | None  # the one that was given
    keep_state: bool
    memories: dict[str, Memory]
    rows: dict[str, Tensor | Fetch]
    convolutions: dict[tuple[str, int], ConvState] = field(default_factory=dict)  # of the new positions


_call: ContextVar[Call | None] = ContextVar("engram_call", default=None)
_focus: ContextVar[dict[int, Tensor]] = ContextVar("engram_focus", default={})  # noqa: B039  (never changed)
_chosen: ContextVar[dict[int, frozenset[str]]] = ContextVar("engram_chosen", default={})  # noqa: B039  (never changed)


class Memories(nn.Module):
    """The memories of one decoder, as its submodule `engram`; they add up where they share a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleDict()
        self.handles: list[Any] = []

    @property
    def active(self) -> dict[str, Memory]:
        """Those that the next forward reads; by name, so that their sum does not depend on who came first."""
        members: dict[str, Memory] = dict(sorted(self.members.items()))  # type: ignore[arg-type]
        chosen = _chosen.get().get(id(self))
        return {
            name: memory for name, memory in members.items() if (memory.enabled if chosen is None else name in chosen)
        }

    def hook(self, stack: nn.Module, layers: nn.ModuleList) -> None:
        """Read when the stack is called, fuse in front of its layers, and leave the past on its cache."""
        wanted = sorted({layer for memory in self.members.values() for layer in memory.config.hash.layers})  # type: ignore[union-attr]
        self.unhook()
        self.handles = [
            stack.register_forward_pre_hook(self._before, with_kwargs=True),
            stack.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            *(layers[n].register_forward_pre_hook(partial(self._fuse, n), with_kwargs=True) for n in wanted),
        ]

    def unhook(self) -> None:
        """Leave the stack as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @torch.compiler.disable
    def _before(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(stack, "engram", None) is not self:
            raise MismatchError(
                "something has taken the place of the memories in the model (modules_to_save of peft copies them): what "
                "trains there is not what is read. Leave `engram` out of it."
            )
        given, memories = arguments(stack, args, kwargs), self.active
        tokens, cache = given.get("input_ids"), given.get("past_key_values")
        if tokens is None:
            self._require_none("with inputs_embeds alone", "Pass input_ids")
            return
        if given.get("cache") is not None:
            self._require_none("for continuous batching, which mixes the texts of requests", "Use generate")
        past = past_of(cache, len(tokens), tuple(memories))
        text = Text.read(tokens, given.get("attention_mask"), given.get("position_ids"), past.tokens if past else None)
        focus = _focus.get().get(id(self))
        if focus is not None:
            text = text.focus(focus)
        caching = given.get("use_cache")
        if caching is None:
            caching = getattr(stack.config, "use_cache", False) and not stack.training
        keep_state = (bool(caching) or cache is not None) and text.segments is None
        rows = {name: memory.read(text, past) for name, memory in memories.items()}
        _call.set(Call(text, past, cache, keep_state, memories, rows))

    def _require_none(self, how: str, instead: str) -> None:
        """Raise MismatchError if a memory is on."""
        if self.active:
            raise MismatchError(
                f"the model was called {how} while the memories {', '.join(self.active)} are on: they are addressed by the "
                f"tokens of a text and would have been silent or wrong. {instead}, or switch them off with using()."
            )

    @torch.compiler.disable
    def _fuse(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = _call.get()
        if call is None:
            if self.active:
                raise MismatchError(
                    f"layer {layer} was called on its own, not by its model: the memory does not know the tokens and "
                    "would have been silent. (To recompute activations, use the model's own gradient checkpointing.)"
                )
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        total = hidden
        for memory in call.memories.values():
            engram = memory.engram(layer)
            if engram is not None:
                total = total + self._delta(call, memory, engram, layer, hidden)
        if args:
            return (total, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": total}

    def _delta(self, call: Call, memory: Memory, engram: Engram, layer: int, hidden: Tensor) -> Tensor:
        """What a memory adds to hidden [B, T, D]."""
        if hasattr(engram.project, "base_layer"):
            raise MismatchError(
                f"peft has wrapped a projection of the memory {memory.name!r}, which froze it: it would not train, nor be "
                "saved with the memory. Attach after get_peft_model, or exclude_modules=r'.*\\.engram\\..*' in its config."
            )
        rows = call.rows[memory.name]
        if not isinstance(rows, Tensor):
            rows = call.rows[memory.name] = rows.rows()
        text, weight, key = call.text, engram.query_gain, (memory.name, layer)
        own = rows[:, :, memory.config.hash.layers.index(layer)].to(weight.device, weight.dtype)
        conv, before = engram.config.conv_kernel > 0, None
        if conv and call.past is not None:
            before = ConvState(*(text.past_in_order(part, engram.config.tail) for part in call.past.convolutions[key]))
        segments, keep = (part if part is None else part.to(weight.device) for part in (text.segments, text.keep))
        delta, after = engram(
            text.in_order(hidden.to(weight.device).unsqueeze(2)),
            text.in_order(own),
            before,
            segments=segments,
            keep=keep,
            with_state=conv and call.keep_state,
        )
        if after is not None:
            call.convolutions[key] = ConvState(*(text.as_given(part[:, -hidden.shape[1] :]) for part in after))
        return text.as_given(delta).squeeze(2).to(hidden.device)

    @torch.compiler.disable
    def _after(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = _call.get()
        _call.set(None)
        if call is None or not call.keep_state:
            return
        cache = call.cache if call.cache is not None else cache_in(output)
        if cache is not None:
            new = Past(call.text.tokens, tuple(call.memories), call.convolutions)
            remember(cache, new if call.past is None else call.past.followed_by(new))


# --- what users call ------------------------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    config: EngramConfig,
    tokenizer: Any,
    *,
    hash: HashConfig | None = None,
    table: TableConfig | None = None,
    directory: Path | str = ".",
    name: str = "memory",
    seed: int = 0,
) -> Memory:
    """Add a memory to a pretrained model, ready to be trained.

    model: a decoder-only model of `transformers`, wrapped by peft or not. tokenizer: its fast tokenizer. hash: addresses and
    layers; by default `default_hash`. table: where the rows live; tier disk keeps them in `directory`. seed: of the
    projections. The new parameters are in `model.parameters()`, as `...engram.members.NAME...`; rows are in the table, and
    trained by `hf.training.RowwiseAdamW`.

    Until it is trained the model's logits are unchanged, bit for bit: rows start at zero, or where `table.std` spreads them
    the value's projection does.

    Raises ConfigError for a name that is taken, a layer that the model does not have, or a model without a decoder.
    """
    decoder = find_decoder(model)
    config_ = MemoryConfig(hash or default_hash(len(decoder.layers), tokenizer), config)
    table = table or TableConfig()
    vocabulary = CanonicalVocabulary.from_tokenizer(tokenizer)
    if config_.hash.scheme == "ple":
        vocabulary = CanonicalVocabulary.identity(len(vocabulary.lookup))
    plan = build_plan(config_.hash, vocabulary)
    _require_place(model, name, config_)
    rows = build_table(
        table,
        plan.num_rows,
        config.row_dim,
        digest=address_digest(vocabulary, plan),
        directory=Path(directory),
        device=device_of(decoder.stack),
    )
    memory = Memory(name, config_, Lookup(vocabulary, plan, rows), decoder.dim)
    for layer in config_.hash.layers:
        engram = memory.engram(layer)
        assert engram is not None
        engram.reset_parameters(torch.Generator().manual_seed(seed + 10007 * layer))
        if table.std:
            with torch.no_grad():
                engram.project.weight[-decoder.dim :].zero_()
    return place(model, memory)


def place(model: nn.Module, memory: Memory) -> Memory:
    """Put a memory that was made or loaded for this model in front of its layers."""
    decoder = find_decoder(model)
    _require_place(model, memory.name, memory.config)
    for layer, engram in memory.engrams.items():
        engram.to(device_of(decoder.layers[int(layer)]))
    memories = _memories(decoder.stack)
    if memories is None:
        memories = decoder.stack.engram = Memories()
    memories.members[memory.name] = memory
    memory.train(decoder.stack.training)
    memories.hook(decoder.stack, decoder.layers)
    return memory


def detach(model: nn.Module, name: str | None = None) -> list[Memory]:
    """Take a memory, or all of them, off a model, which is then exactly as it was; returns what was taken off.

    Raises ConfigError when there is none of that name.
    """
    decoder, there = find_decoder(model), mounted(model)
    if name is not None and name not in there:
        raise _no_such(name, there)
    gone = list(there.values()) if name is None else [there[name]]
    memories = _memories(decoder.stack)
    if memories is None:
        return []
    for memory in gone:
        del memories.members[memory.name]
    if len(memories.members):
        memories.hook(decoder.stack, decoder.layers)
    else:
        memories.unhook()
        del decoder.stack.engram
    return gone


def mounted(model: nn.Module) -> dict[str, Memory]:
    """The memories of a model by name, in the order in which they came."""
    memories = _memories(find_decoder(model).stack)
    return dict(memories.members.items()) if memories is not None else {}  # type: ignore[arg-type]


@contextmanager
def using(model: nn.Module, *names: str) -> Iterator[None]:
    """Inside, exactly these memories are on; none at all without names. Other threads and tasks notice nothing.

    Nor does a thread that is started inside (a TextIteratorStreamer's): call using() in it, or switch by `enabled`.
    Raises ConfigError for a name that no memory has.
    """
    there = mounted(model)
    for name in names:
        if name not in there:
            raise _no_such(name, there)
    memories = _memories(find_decoder(model).stack)
    token = _chosen.set(_chosen.get() | {id(memories): frozenset(names)})
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def focused(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Inside, memories act only where mask [B, T] bool is True, and no row that is read elsewhere learns.

    It is for forwards of T tokens without a cache. Raises MismatchError when the tokens have another shape.
    """
    memories = _memories(find_decoder(model).stack)
    token = _focus.set(_focus.get() | {id(memories): mask})
    try:
        yield
    finally:
        _focus.reset(token)


def default_hash(layers: int, tokenizer: Any, *, rows_per_head: int = 100_003) -> HashConfig:
    """Addresses for a model of so many layers: bigrams and trigrams, 8 heads, one early layer and one in the middle."""
    pads = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id"))
    pad = next((token for token in pads if token is not None), 0)
    return HashConfig(orders=(2, 3), heads=8, rows_per_head=rows_per_head, layers=default_layers(layers), pad_id=pad)


def default_layers(layers: int) -> tuple[int, ...]:
    """One early layer and one in the middle, never in the last quarter: (2, 12) of 30."""
    early, middle = min(2, layers // 4), int(0.4 * layers)
    return (early, middle) if middle > early else (early,)


def _memories(stack: nn.Module) -> Memories | None:
    found = getattr(stack, "engram", None)
    if found is None or isinstance(found, Memories):
        return found
    raise ConfigError(
        f"the decoder has an `engram` of its own, a {type(found).__name__}: a memory would have taken its place."
    )


def _require_place(model: nn.Module, name: str, config: MemoryConfig) -> None:
    count = len(find_decoder(model).layers)
    if name in mounted(model):
        raise ConfigError(f"a memory called {name!r} is there already: name this one differently, or detach that one.")
    if not name or "." in name:
        raise ConfigError(f"{name!r} cannot name a memory: names are not empty and have no dots.")
    if max(config.hash.layers) >= count:
        raise ConfigError(
            f"memory layers {config.hash.layers} reach beyond the model's last, {count - 1}: its rows would never be read."
        )


def _no_such(name: str, there: dict[str, Memory]) -> ConfigError:
    return ConfigError(f"no memory is called {name!r}; there are {', '.join(there) or 'none'}.")
