"""Released layouts: how DeepSeek-V4.1-Flash and Qwen3.8-Flash-Next publish their memories, in our terms.

A layout says which HashConfig follows from the integers of a config.json, in which tensors the rows lie, and which tensors are
the weights of an Engram. Neither release stores its hash: it follows from the config, and in V4.1 from the tokenizer. So what
the config says besides (rows of a layer, canonical ids) is compared, since a wrong hash reads the wrong row at every token.

    deepseek_v41   layers.{i}.engram.embed.weight F8_E4M3 [rows, 256], .embed.scale F8_E8M0 [rows, 8]
                   layers.{i}.engram.wkv.weight F8_E4M3 [(streams + 1) dim, 6144], .wkv.scale F8_E8M0, one for 32 x 32
                   layers.{i}.engram.q_weight, k_weight BF16 [streams, dim]
    qwen_ple       model.language_model.layers.{i}.ple.ple_embedding.ngram_embedding.shard_{n}.weight
                   BF16 [rows / 128, 160], or F8_E4M3 with one ngram_embedding.weight_scale BF16 [1] for all
                   ....ple.key_proj, value_proj, norm_query, norm_key, norm_conv, conv1d .weight; hash constants, I64
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import ConfigError, DataError, MismatchError
from ..hashing import HashConfig, HashPlan, prime_sizes
from ..memory import Engram, EngramConfig
from ..model.lm import ModelConfig
from ..model.lookup import build_plan
from ..tables.file import TableFile
from ..tables.rows import BLOCK, Encoding, RowFormat
from ..tokens import CanonicalVocabulary
from .blocks import from_blocks, to_blocks
from .shards import Kind, Shards

LayoutName = Literal["deepseek_v41", "qwen_ple"]
E8M0_ONE = 127  # the scale 2^0
CONSTANTS = ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")
T = TypeVar("T")


class RowTensor(NamedTuple):
    """A tensor that begins with rows `first` to `first + rows` of the table, in order; what follows in it, nothing reads."""

    layer: int  # ordinal of the memory layer
    name: str
    kind: Kind
    first: int
    rows: int
    scale: str = ""  # the tensor with a row's E8M0 scales, if it has any
    scale_kind: Kind = Kind("F8_E8M0", ())


class Weights(NamedTuple):
    """An Engram's state dict in float32, and the E8M0 scales uint8 of its project.weight if that came in blocks of E4M3."""

    state: dict[str, Tensor]
    scales: Tensor | None = None


@dataclass(frozen=True)
class Layout(ABC):
    """What a released model says of its memory.

    dim: width of the model; streams: its residual copies; encoding: of the table's rows; prefix: in front of `layers.`.
    """

    hash: HashConfig
    engram: EngramConfig
    dim: int
    streams: int
    encoding: Encoding
    prefix: str

    name: ClassVar[LayoutName]
    model_type: ClassVar[str]  # in a config.json

    @staticmethod
    @abstractmethod
    def read(config: Mapping[str, Any], where: str) -> Layout:
        """From the text part of a config.json. Raises ConfigError for one that says less."""

    @classmethod
    @abstractmethod
    def of(cls, hashing: HashConfig, engram: EngramConfig, dim: int, streams: int, vocab_size: int) -> Layout:
        """For a memory of ours, whether the layout can express it or not; vocab_size: number of canonical ids."""

    def check(self, where: str) -> None:
        """Raise MismatchError when what the config says contradicts itself."""
        return

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The text part of a config.json that `read` takes."""

    @abstractmethod
    def found_in(self, shards: Shards) -> Layout:
        """The same, with what only the tensors tell. Raises MismatchError when they contradict the config."""

    @abstractmethod
    def fitting(self, form: RowFormat) -> Layout:
        """The same, for rows in the encoding of a table. Raises MismatchError, with a remedy, when no release has that."""

    @abstractmethod
    def vocabulary(self, tokenizer: Tokenizer | None) -> CanonicalVocabulary:
        """The map from token ids to what is hashed. Raises ConfigError without, MismatchError with another model's tokenizer."""

    @abstractmethod
    def row_tensors(self) -> list[RowTensor]:
        """The tensors of the rows, in the table's order."""

    @abstractmethod
    def side_tensors(self, layer: int) -> dict[str, Tensor]:
        """Small tensors of memory layer `layer` that are neither rows nor weights."""

    @abstractmethod
    def weights(self, shards: Shards, layer: int) -> Weights:
        """The Engram of memory layer `layer`."""

    @abstractmethod
    def weight_tensors(self, weights: Weights, layer: int) -> dict[str, Tensor]:
        """The inverse, in the release's types: numbers are rounded to the nearest."""

    def row_scale(self, layer: int) -> int:
        """E8M0 scale of all rows of a layer, where they have none of their own; 0 where rows bring their scales or need none."""
        return 0

    @cached_property
    def layer_rows(self) -> list[int]:
        """Rows of each memory layer."""
        return [int(rows) for rows in prime_sizes(self.hash).sum(1)]

    def plan(self, vocabulary: CanonicalVocabulary) -> HashPlan:
        """The addresses."""
        return build_plan(self.hash, vocabulary)

    def build_engram(self) -> Engram:
        """A memory layer with these shapes, to load weights into."""
        return Engram(self.engram, dim=self.dim, streams=self.streams, rows_per_token=self.hash.rows_per_token)

    @property
    def facts(self) -> dict[str, str]:
        """What a table file notes, so that it can be exported without the release at hand."""
        return {"layout": self.name, "layout_prefix": self.prefix, "layout_config": json.dumps(self.config())}

    def _at(self, layer: int) -> str:
        return f"{self.prefix}layers.{self.hash.layers[layer]}."

    def _checked(self, state: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        """One of an Engram's tensors, in single precision. Raises MismatchError for another shape."""
        if name not in state or tuple(state[name].shape) != shape:
            found = list(state[name].shape) if name in state else "missing"
            raise MismatchError(f"Engram weights: {name} is {found}, layout {self.name} has {list(shape)} there.")
        if not (tensor := state[name].detach().float()).isfinite().all():
            raise DataError(f"Engram weights: {name} holds NaN or infinity: so would all that the layer computes.")
        return tensor


def read_tensor(shards: Shards, name: str, kind: Kind) -> Tensor:
    """A tensor that must be of this kind. Raises MismatchError for another one."""
    require_kind(shards, name, kind)
    return shards.tensor(name)


def require_kind(shards: Shards, name: str, kind: Kind) -> None:
    """Raise MismatchError unless the tensor is of this kind."""
    place = shards.place(name)
    if place.kind != kind:
        raise MismatchError(
            f"{place.path}: {name} is {place.kind}, the config says {kind}: it belongs to another model."
        )


# --- DeepSeek-V4.1 --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeepSeekV41(Layout):
    """One pair of tensors a layer: E4M3 numbers, and a power of two for each 32 of them.

    compressed: number of canonical ids; num_embeddings: rows of each layer.
    """

    compressed: int
    num_embeddings: tuple[int, ...]

    name: ClassVar[LayoutName] = "deepseek_v41"
    model_type: ClassVar[str] = "deepseek_v41"

    @staticmethod
    def read(config: Mapping[str, Any], where: str) -> DeepSeekV41:
        """See Layout.read."""
        get = _Reader(config, where)
        layers, rows = get("engram_layer_ids", list), get("engram_num_embeddings", list)
        if len(layers) != len(rows):
            raise ConfigError(f"{where}: {len(rows)} engram_num_embeddings for {len(layers)} engram_layer_ids.")
        return DeepSeekV41(
            hash=HashConfig(
                orders=tuple(range(2, get("engram_max_ngram_size", int) + 1)),
                heads=get("engram_n_heads", int),
                rows_per_head=get("engram_vocab_size", int),
                layers=tuple(layers),
                pad_id=get("engram_pad_token_id", int),
            ),
            engram=replace(
                EngramConfig.deepseek_v41(), row_dim=get("engram_head_dim", int), norm_eps=get("rms_norm_eps", float)
            ),
            dim=get("hidden_size", int),
            streams=get("hc_mult", int),
            encoding="fp8_e8m0",
            prefix="",
            compressed=get("engram_compressed_vocab_size", int),
            num_embeddings=tuple(rows),
        )

    @classmethod
    def of(cls, hashing: HashConfig, engram: EngramConfig, dim: int, streams: int, vocab_size: int) -> DeepSeekV41:
        """See Layout.of."""
        rows = tuple(int(rows) for rows in prime_sizes(hashing).sum(1))
        return cls(hashing, engram, dim, streams, "fp8_e8m0", "", compressed=vocab_size, num_embeddings=rows)

    def check(self, where: str) -> None:
        """See Layout.check: the primes of a layer's heads sum to its rows."""
        for layer, said, found in zip(self.hash.layers, self.num_embeddings, self.layer_rows, strict=True):
            if said != found:
                raise MismatchError(
                    f"{where}: engram_num_embeddings says {said:,} rows for layer {layer}, but the primes of its heads "
                    f"sum to {found:,}: rows would be read from the wrong place."
                )

    def config(self) -> dict[str, Any]:
        """See Layout.config."""
        return {
            "hidden_size": self.dim,
            "hc_mult": self.streams,
            "rms_norm_eps": self.engram.norm_eps,
            "engram_layer_ids": list(self.hash.layers),
            "engram_num_embeddings": list(self.num_embeddings),
            "engram_max_ngram_size": self.hash.orders[-1],
            "engram_vocab_size": self.hash.rows_per_head,
            "engram_n_heads": self.hash.heads,
            "engram_head_dim": self.engram.row_dim,
            "engram_pad_token_id": self.hash.pad_id,
            "engram_compressed_vocab_size": self.compressed,
        }

    def found_in(self, shards: Shards) -> DeepSeekV41:
        """See Layout.found_in."""
        return replace(self, prefix=shards.prefix(f"layers.{self.hash.layers[0]}.engram.embed.weight"))

    def fitting(self, form: RowFormat) -> DeepSeekV41:
        """See Layout.fitting."""
        if form.encoding != "fp8_e8m0":
            raise MismatchError(
                f"rows are {form.encoding}, layout deepseek_v41 has fp8_e8m0: `engram-lm table convert TABLE NEW --encoding "
                "fp8_e8m0` makes a table that can be exported."
            )
        return self

    def vocabulary(self, tokenizer: Tokenizer | None) -> CanonicalVocabulary:
        """See Layout.vocabulary."""
        if tokenizer is None:
            raise ConfigError(
                "layout deepseek_v41 hashes words as its tokenizer folds them: name that with --tokenizer (tokenizer.json, a "
                "directory that holds one, or a hub name)."
            )
        vocabulary = CanonicalVocabulary.from_tokenizer(tokenizer)
        if vocabulary.size != self.compressed:
            raise MismatchError(
                f"the tokenizer folds to {vocabulary.size:,} canonical ids, the config's engram_compressed_vocab_size is "
                f"{self.compressed:,}: with other multipliers every n-gram would read another row."
            )
        return vocabulary

    def row_tensors(self) -> list[RowTensor]:
        """See Layout.row_tensors."""
        first, tensors, dim = 0, [], self.engram.row_dim
        for layer, rows in enumerate(self.layer_rows):
            name = f"{self._at(layer)}engram.embed"
            kinds = Kind("F8_E4M3", (rows, dim)), Kind("F8_E8M0", (rows, -(-dim // BLOCK)))
            tensors.append(RowTensor(layer, f"{name}.weight", kinds[0], first, rows, f"{name}.scale", kinds[1]))
            first += rows
        return tensors

    def side_tensors(self, layer: int) -> dict[str, Tensor]:
        """See Layout.side_tensors."""
        return {}

    def weights(self, shards: Shards, layer: int) -> Weights:
        """See Layout.weights. E4M3 times a power of two is exact in float32."""
        name, shape = f"{self._at(layer)}engram.", self._wkv_shape
        blocks = tuple(-(-side // BLOCK) for side in shape)
        numbers = read_tensor(shards, f"{name}wkv.weight", Kind("F8_E4M3", shape))
        scales = read_tensor(shards, f"{name}wkv.scale", Kind("F8_E8M0", blocks))
        gain = Kind("BF16", (self.streams, self.dim))
        state = {
            "project.weight": from_blocks(numbers, scales),
            "query_gain": read_tensor(shards, f"{name}q_weight", gain).float(),
            "key_gain": read_tensor(shards, f"{name}k_weight", gain).float(),
        }
        return Weights(state, scales.view(torch.uint8))

    def weight_tensors(self, weights: Weights, layer: int) -> dict[str, Tensor]:
        """See Layout.weight_tensors. A block that its known scale still represents keeps it, so imported weights come out as
        they were, bit for bit; any other is scaled by the smallest power of two that keeps it within 448."""
        name, gain = f"{self._at(layer)}engram.", (self.streams, self.dim)
        numbers, scales = to_blocks(self._checked(weights.state, "project.weight", self._wkv_shape), weights.scales)
        return {
            f"{name}wkv.weight": numbers,
            f"{name}wkv.scale": scales,
            f"{name}q_weight": self._checked(weights.state, "query_gain", gain).bfloat16(),
            f"{name}k_weight": self._checked(weights.state, "key_gain", gain).bfloat16(),
        }

    @property
    def _wkv_shape(self) -> tuple[int, int]:
        return (self.streams + 1) * self.dim, self.hash.rows_per_token * self.engram.row_dim


# --- Qwen3.8-Flash-Next ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QwenPLE(Layout):
    """Each layer's rows in `parts` tensors, behind its last row as many as make the number divisible by `divisor`.

    vocab_size: token ids that the hash was made for. scales: of the layers' rows in FP8, one a layer, each as the name of its
    type, its shape and its value. The power of two in a scale goes to every row as its E8M0 scale; what remains of it, a
    number from 1 to 2, is multiplied into the projection of the Engram, which is linear in the rows. Where projection and
    scale are bfloat16 that product is exact in float32.
    """

    vocab_size: int
    divisor: int
    parts: int
    scales: tuple[tuple[str, tuple[int, ...], float], ...] = ()

    name: ClassVar[LayoutName] = "qwen_ple"
    model_type: ClassVar[str] = "qwen4_exp"

    @staticmethod
    def read(config: Mapping[str, Any], where: str) -> QwenPLE:
        """See Layout.read."""
        get = _Reader(config, where)
        eos = config.get("eos_token_id")
        order, heads = get("ngram_size", int), get("heads_per_ngram", int)
        width = get("ple_embed_dim", int)
        if width % ((order - 1) * heads):
            raise ConfigError(f"{where}: ple_embed_dim {width} cannot be shared out to {(order - 1) * heads} heads.")
        engram = replace(
            EngramConfig.qwen_ple(),
            row_dim=width // ((order - 1) * heads),
            conv_kernel=get("ple_conv_kernel_size", int),
            conv_dilation=order,
            norm_eps=get("rms_norm_eps", float),
            conv_norm_eps=get("rms_norm_eps", float),
        )
        return QwenPLE(
            hash=HashConfig(
                orders=tuple(range(2, order + 1)),
                heads=heads,
                rows_per_head=get("ngram_vocab_size_base", int),
                layers=tuple(number - 1 for number in sorted(set(get("ple_layer_ids", list)))),
                pad_id=eos[0] if isinstance(eos, list) and eos else get("eos_token_id", int),
                seed=get("seed", int),
                scheme="ple",
            ),
            engram=engram,
            dim=get("hidden_size", int),
            streams=get("hc_count", int),
            encoding="bf16",
            prefix="model.language_model.",
            vocab_size=get("vocab_size", int),
            divisor=get("make_ngram_vocab_size_divisible_by", int),
            parts=get("split_ngram_parts", int),
            scales=tuple((dtype, tuple(shape), value) for dtype, shape, value in config.get(SCALES, ())),
        )

    @classmethod
    def of(cls, hashing: HashConfig, engram: EngramConfig, dim: int, streams: int, vocab_size: int) -> QwenPLE:
        """See Layout.of."""
        return cls(hashing, engram, dim, streams, "bf16", "model.language_model.", vocab_size, divisor=128, parts=128)

    def config(self) -> dict[str, Any]:
        """See Layout.config."""
        return {
            "vocab_size": self.vocab_size,
            "eos_token_id": self.hash.pad_id,
            "hidden_size": self.dim,
            "hc_count": self.streams,
            "rms_norm_eps": self.engram.norm_eps,
            "ple_layer_ids": [layer + 1 for layer in self.hash.layers],
            "ple_embed_dim": self.hash.rows_per_token * self.engram.row_dim,
            "ple_conv_kernel_size": self.engram.conv_kernel,
            "ngram_size": self.hash.orders[-1],
            "heads_per_ngram": self.hash.heads,
            "ngram_vocab_size_base": self.hash.rows_per_head,
            "make_ngram_vocab_size_divisible_by": self.divisor,
            "split_ngram_parts": self.parts,
            "seed": self.hash.seed,
        }

    @property
    def facts(self) -> dict[str, str]:
        """See Layout.facts."""
        noted = self.config() | ({SCALES: self.scales} if self.scales else {})
        return super().facts | {"layout_config": json.dumps(noted)}

    def found_in(self, shards: Shards) -> QwenPLE:
        """See Layout.found_in: prefix, type of the rows and their scale; hash constants must be those of the plan."""
        suffix = f"layers.{self.hash.layers[0]}.ple.ple_embedding.ngram_embedding.shard_0.weight"
        found = replace(self, prefix=shards.prefix(suffix))
        place = shards.place(f"{found.prefix}{suffix}")
        encodings = {dtype: encoding for encoding, dtype in DTYPE_OF.items()}
        if place.kind.dtype not in encodings:
            raise MismatchError(
                f"{place.path}: rows of {place.kind.dtype}; layout qwen_ple has {', '.join(encodings)}."
            )
        found = replace(found, encoding=encodings[place.kind.dtype])
        layers = range(len(self.hash.layers))
        if found.encoding == "fp8_e8m0":
            found = replace(found, scales=tuple(found._scale_in(shards, layer) for layer in layers))
        for layer in layers:
            for name, expected in found._constants(layer).items():
                if name in shards and not torch.equal(shards.tensor(name).view(-1), expected):
                    raise MismatchError(
                        f"{shards.files[name]}: {name} holds {shards.tensor(name).tolist()}, from the config follow "
                        f"{expected.tolist()}: every row would be read from the wrong place."
                    )
        return found

    def fitting(self, form: RowFormat) -> QwenPLE:
        """See Layout.fitting."""
        remedy = "`engram-lm table convert TABLE NEW --encoding bf16` makes a table that can be exported."
        if form.encoding not in DTYPE_OF:
            raise MismatchError(f"rows are {form.encoding}, layout qwen_ple has bf16, fp32 or fp8_e8m0: {remedy}")
        if form.encoding == "fp8_e8m0" and not self.scales:
            raise MismatchError(
                f"rows are fp8_e8m0 with scales of their own, layout qwen_ple has one for all: {remedy}"
            )
        if form.encoding != "fp8_e8m0" and any(self.factor(layer) != 1.0 for layer in range(len(self.scales))):
            raise MismatchError(
                f"rows are {form.encoding}, but the layout that they were imported from scales them by "
                f"{', '.join(f'{value:g}' for _, _, value in self.scales)}, which only FP8 rows can leave to a tensor: export "
                "the table as it was imported."
            )
        scales = self.scales if form.encoding == "fp8_e8m0" else ()
        return replace(self, encoding=form.encoding, scales=scales)

    def _scale_in(self, shards: Shards, layer: int) -> tuple[str, tuple[int, ...], float]:
        place = shards.place(name := f"{self._table(layer)}.weight_scale")
        if math.prod(place.kind.shape) != 1 or place.kind.dtype not in ("BF16", "F32"):
            raise MismatchError(
                f"{place.path}: {name} is {place.kind}; layout qwen_ple has one BF16 or F32 for all rows."
            )
        value = shards.tensor(name).item()
        if not 2.0**-126 <= value < 2.0**127:
            raise DataError(f"{place.path}: {name} is {value}: no number that rows can be scaled with.")
        return place.kind.dtype, place.kind.shape, value

    def vocabulary(self, tokenizer: Tokenizer | None) -> CanonicalVocabulary:
        """See Layout.vocabulary: raw token ids; the tokenizer's must all be among them."""
        if tokenizer is not None and tokenizer.get_vocab_size() > self.vocab_size:
            raise MismatchError(
                f"the tokenizer has {tokenizer.get_vocab_size():,} token ids, the config's vocab_size is "
                f"{self.vocab_size:,}: it belongs to another model."
            )
        return CanonicalVocabulary.identity(self.vocab_size)

    def row_tensors(self) -> list[RowTensor]:
        """See Layout.row_tensors."""
        start, tensors, dtype = 0, [], DTYPE_OF[self.encoding]
        for layer, rows in enumerate(self.layer_rows):
            padded = -(-rows // self.divisor) * self.divisor
            size = -(-padded // self.parts)
            for part, lo in enumerate(range(0, padded, size)):
                held = min(size, padded - lo)
                name, used = f"{self._table(layer)}.shard_{part}.weight", max(0, min(held, rows - lo))
                tensors.append(
                    RowTensor(layer, name, Kind(dtype, (held, self.engram.row_dim)), start + min(lo, rows), used)
                )
            start += rows
        return tensors

    def row_scale(self, layer: int) -> int:
        """See Layout.row_scale."""
        return E8M0_ONE + math.frexp(self.scales[layer][2])[1] - 1 if self.scales else 0

    def factor(self, layer: int) -> float:
        """What rows are still to be multiplied with: a number from 1 up to 2."""
        return math.frexp(self.scales[layer][2])[0] * 2 if self.scales else 1.0

    def side_tensors(self, layer: int) -> dict[str, Tensor]:
        """See Layout.side_tensors."""
        tensors = self._constants(layer)
        if self.scales:
            dtype, shape, value = self.scales[layer]
            kind = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
            tensors[f"{self._table(layer)}.weight_scale"] = torch.full(shape, value, dtype=kind)
        return tensors

    def weights(self, shards: Shards, layer: int) -> Weights:
        """See Layout.weights."""
        state = {
            "project.weight": torch.cat([self._weight(shards, layer, part) for part in ("key_proj", "value_proj")])
            * self.factor(layer)
        }
        for ours, theirs in GAINS.items():
            state[ours] = self._weight(shards, layer, theirs).view(self.streams, self.dim)
        taps = self._weight(shards, layer, "conv1d")[:, 0].T.contiguous()
        return Weights(state | {"conv_weight": taps.view(-1, self.streams, self.dim)})

    def weight_tensors(self, weights: Weights, layer: int) -> dict[str, Tensor]:
        """See Layout.weight_tensors. Imported bfloat16 comes out as it was, bit for bit."""
        width, gain = self.hash.rows_per_token * self.engram.row_dim, (self.streams, self.dim)
        project = self._checked(weights.state, "project.weight", ((self.streams + 1) * self.dim, width))
        keys, value = (project / self.factor(layer)).split([self.streams * self.dim, self.dim])
        taps = self._checked(weights.state, "conv_weight", (self.engram.conv_kernel, *gain))
        tensors = {"key_proj": keys, "value_proj": value, "conv1d": taps.flatten(1).T[:, None]}
        tensors |= {theirs: self._checked(weights.state, ours, gain).flatten() for ours, theirs in GAINS.items()}
        at = f"{self._at(layer)}ple"
        return {f"{at}.{part}.weight": tensor.bfloat16().contiguous() for part, tensor in tensors.items()}

    def _weight(self, shards: Shards, layer: int, part: str) -> Tensor:
        """One of the dense tensors, in single precision; BF16 or F32 in the file."""
        name = f"{self._at(layer)}ple.{part}.weight"
        width, streams = self.hash.rows_per_token * self.engram.row_dim, self.streams * self.dim
        shapes = {"key_proj": (streams, width), "value_proj": (self.dim, width)}
        shapes["conv1d"] = (streams, 1, self.engram.conv_kernel)  # type: ignore[assignment]
        dtype = shards.place(name).kind.dtype
        return read_tensor(
            shards, name, Kind("F32" if dtype == "F32" else "BF16", shapes.get(part, (streams,)))
        ).float()

    def _table(self, layer: int) -> str:
        return f"{self._at(layer)}ple.ple_embedding.ngram_embedding"

    def _constants(self, layer: int) -> dict[str, Tensor]:
        """The hash of a layer as the release stores it."""
        plan = self.plan(CanonicalVocabulary.identity(self.vocab_size))
        values = plan.multipliers[layer], plan.sizes[layer], plan.offsets[layer] - plan.layer_starts[layer]
        at = f"{self._at(layer)}ple.ple_embedding"
        return {f"{at}.{name}": torch.from_numpy(value.copy()) for name, value in zip(CONSTANTS, values, strict=True)}


DTYPE_OF: dict[Encoding, str] = {"bf16": "BF16", "fp32": "F32", "fp8_e8m0": "F8_E4M3"}
SCALES = "ngram_embedding_weight_scales"  # in a table's facts
GAINS = {"query_gain": "norm_query", "key_gain": "norm_key", "conv_gain": "norm_conv"}


# --- which one ------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, type[Layout]] = {"deepseek_v41": DeepSeekV41, "qwen_ple": QwenPLE}
MARKS = {"engram_layer_ids": "deepseek_v41", "ple_layer_ids": "qwen_ple"}  # keys that only one layout's config has


def read_config(path: Path, name: str = "") -> Layout:
    """The layout of a released config.json; name: as which to read it, "" to be told by its keys.

    Raises ConfigError for a config of no released memory, MismatchError for one that contradicts itself.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        config = whole.get("text_config") or whole
        marks = [layout for key, layout in MARKS.items() if config.get(key)]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); the hash follows from its integers.") from None
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: no configuration ({error}).") from None
    if not name and len(marks) != 1:
        raise ConfigError(
            f"{path}: has no memory in a layout that is known ({', '.join(LAYOUTS)}). Keys that would: {', '.join(MARKS)}."
        )
    layout = LAYOUTS[name or marks[0]].read(config, str(path))
    layout.check(str(path))
    return layout


def layout_of_table(file: TableFile, name: str = "") -> Layout | None:
    """The layout that a table file was imported from; None where it notes none. Raises MismatchError when that is not `name`."""
    noted = file.facts.get("layout", "")
    if noted not in LAYOUTS:
        return None
    if name and noted != name:
        raise MismatchError(f"{file.path}: was imported from layout {noted}, so its plan does not fit {name}.")
    layout = LAYOUTS[noted].read(json.loads(file.facts["layout_config"]), str(file.path))
    return replace(layout, prefix=file.facts["layout_prefix"])


def layout_of_model(name: str, model: ModelConfig, vocabulary: CanonicalVocabulary) -> Layout:
    """The layout of a model of ours. Raises MismatchError for a memory that it cannot express."""
    if model.memory is None:
        raise MismatchError(f"the model has no memory, so none in layout {name}.")
    ours, kind = model.memory, LAYOUTS[name]
    layout = kind.of(ours.hash, ours.engram, model.dim, model.streams, vocabulary.size)
    read = kind.read(layout.config(), name)  # what it can express comes back as it was
    differing = [
        f"{field.name} = {getattr(mine, field.name)!r} (would be {getattr(its, field.name)!r})"
        for mine, its in ((ours.hash, read.hash), (ours.engram, read.engram))
        for field in fields(mine)
        if getattr(mine, field.name) != getattr(its, field.name)
    ]
    if differing:
        raise MismatchError(f"layout {name} cannot express {', '.join(differing)}.")
    return layout


class _Reader:
    """Values of a configuration that must be there and of a type."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def __call__(self, key: str, kind: type[T]) -> T:
        value = self.config.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)  # type: ignore[call-arg]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(
                f"{self.where}: {key} should be {kind.__name__}, got {value!r}; the hash and the rows follow from it."
            )
        return value
