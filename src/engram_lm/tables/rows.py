"""What a row is in memory and on disk: bytes. Here is the truth, in plain torch; kernels/rows.py does the same faster.

    record = encoded row | padding to a multiple of 4 bytes | float32 accumulator, if the row can be trained
    fp32       4 bytes a number
    bf16       2 bytes a number
    fp8_e8m0   dim E4M3 numbers, then one E8M0 scale (a power of two) for each 32 of them: 264 bytes for dim 256 (V4.1's row)
    int8       float32 scale, then dim int8 numbers

All little-endian. A record of zero bytes is a row that was never written, so a table starts as a sparse file or an
untouched mapping; it reads as zeros, or as `initial` when the format has a spread.

Every result is a pure function of its arguments and the same bits on every device: numbers are rounded by integer
arithmetic, float32 operations are rounded one by one in the order written here, and randomness is counted, not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

Encoding = Literal["fp32", "bf16", "fp8_e8m0", "int8"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
BLOCK = 32  # numbers that share an E8M0 scale (OCP microscaling, 2023)


@dataclass(frozen=True)
class RowFormat:
    """How the `dim` numbers of a row are kept.

    trainable: the record ends in the row's float32 accumulator. std: spread of a row that was never written, 0 for zeros;
    only trainable rows may have one. seed: of initial rows and of stochastic rounding, an int64. first: the number that row 0
    has in the whole table, of which these rows may be a part; initial rows and rounding go by it.
    """

    dim: int
    encoding: Encoding = "fp32"
    trainable: bool = True
    std: float = 0.0
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ConfigError(f"rows have no encoding {self.encoding!r}: choose one of {', '.join(ENCODINGS)}.")
        if self.dim < 1:
            raise ConfigError(f"a row needs at least one number, got dim {self.dim}.")
        if self.first < 0:
            raise ConfigError(f"rows are counted from 0, so none is the first with number {self.first}.")
        if self.std < 0:
            raise ConfigError(f"the spread of initial rows cannot be negative, got std {self.std}.")
        if self.std and not self.trainable:
            raise ConfigError(
                f"rows that are only read start as zeros, got std {self.std}: a row of zeros in the file would read as "
                "random numbers."
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of an encoded row, a multiple of 4."""
        dim = self.dim
        used = {"fp32": 4 * dim, "bf16": 2 * dim, "fp8_e8m0": dim + -(-dim // BLOCK), "int8": 4 + dim}[self.encoding]
        return used + -used % 4

    @property
    def stride(self) -> int:
        """Bytes of a record, a multiple of 4."""
        return self.row_bytes + 4 * self.trainable

    @property
    def wire(self) -> int:
        """Leading bytes of a record that tell its row: without the accumulator, unless that tells whether it was ever written."""
        return self.stride if self.std else self.row_bytes

    def stored_as(self, encoding: Encoding, *, trainable: bool) -> RowFormat:
        """The format of the same rows in another file: without accumulators, all are written as numbers and none has a spread."""
        return replace(self, encoding=encoding, trainable=trainable, std=self.std if trainable else 0.0)

    @property
    def unit(self) -> float:
        """What one unit of `initial`'s integers stands for: std over their standard deviation, as a float32."""
        return _float32(self.std / ((2**32 - 1) / 3) ** 0.5)


# --- bytes to numbers -----------------------------------------------------------------------------------------------


def decode(form: RowFormat, records: Tensor) -> Tensor:
    """Rows [..., dim] float32 of uint8 records [..., stride] (or [..., row_bytes]), exactly; zero bytes give zeros."""
    dim = form.dim
    if form.encoding == "fp32":
        return _view(records[..., : 4 * dim], torch.float32)
    if form.encoding == "bf16":
        return _view(records[..., : 2 * dim], torch.bfloat16).float()
    if form.encoding == "int8":
        return _view(records[..., 4 : 4 + dim], torch.int8).float() * _view(records[..., :4], torch.float32)
    numbers, scales = records[..., :dim], records[..., dim : dim + -(-dim // BLOCK)]
    by_column = _view(scales, torch.float8_e8m0fnu).float().repeat_interleave(BLOCK, -1)[..., :dim]
    return _view(numbers, torch.float8_e4m3fn).float() * by_column


def _view(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers, in memory of their own."""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


# --- numbers to bytes -----------------------------------------------------------------------------------------------


def encode(form: RowFormat, rows: Tensor, noise: Tensor | None = None) -> Tensor:
    """Bytes [U, row_bytes] uint8 of float32 rows [U, dim].

    Rounds to nearest, ties to even; with `noise` [U, dim] (32 random bits each) stochastically: up with the probability
    of the part that is cut off, so that steps far below a number's precision still count in the mean.
    Finite numbers stay finite (in fp8_e8m0 up to 2^127). NaN stays NaN; infinity becomes NaN in fp8_e8m0; either makes the
    whole row NaN in int8.
    """
    rows = rows.contiguous()
    if not len(rows):
        return torch.empty(0, form.row_bytes, dtype=torch.uint8, device=rows.device)
    if form.encoding == "fp32":
        data = rows
    elif form.encoding == "bf16":
        data = _to_bf16(rows, noise)
    elif form.encoding == "int8":
        data = _to_int8(rows, noise)
    else:
        data = _to_fp8(rows, noise)
    data = data.view(torch.uint8)
    return F.pad(data, (0, form.row_bytes - data.shape[1]))


def _to_bf16(rows: Tensor, noise: Tensor | None) -> Tensor:
    """[U, dim] int16. The upper half of a float32 is a bfloat16; a carry out of the mantissa raises the exponent."""
    sign, size = _sign_and_size(rows)
    carry = 0x7FFF + (size >> 16 & 1) if noise is None else noise >> 16
    code = ((size + carry) >> 16).clamp(max=0x7F7F)
    code = torch.where(size == INFINITY, 0x7F80, torch.where(size > INFINITY, 0x7FC0, code))
    return (code | sign << 15).to(torch.int16)


def _to_int8(rows: Tensor, noise: Tensor | None) -> Tensor:
    """[U, 4 + dim] int8: the scale maps the largest magnitude to 127."""
    _, size = _sign_and_size(rows)
    scale = size.amax(1, keepdim=True).to(torch.int32).view(torch.float32) * _float32(1 / 127)
    exact = (rows.double() / scale.double()).nan_to_num(nan=0.0)  # 0 / 0 of an empty row, or a row that is not finite
    code = exact.round() if noise is None else (exact + noise.double() * 2.0**-32).floor()
    return torch.cat([scale.view(torch.int8), code.clamp(-127, 127).to(torch.int8)], dim=1)


def _to_fp8(rows: Tensor, noise: Tensor | None) -> Tensor:
    """[U, dim + scales] uint8: E4M3 numbers, each block scaled by the smallest power of two that keeps it within 448."""
    count, dim = rows.shape
    blocks = F.pad(rows, (0, -dim % BLOCK)).view(count, -1, BLOCK)
    _, size = _sign_and_size(blocks)
    largest = size.amax(2, keepdim=True)
    scale = ((largest >> 23) - 8 + (largest & MANTISSA > 0x600000).long()).clamp(min=0)  # 448 is 1.75 * 2^8
    blocks = blocks * (254 - scale << 23).to(torch.int32).view(torch.float32)  # times 2^(127 - scale), exactly
    numbers = _to_e4m3(blocks.view(count, -1)[:, :dim].contiguous(), noise)
    return torch.cat([numbers, scale[:, :, 0]], dim=1).to(torch.uint8)


def _to_e4m3(rows: Tensor, noise: Tensor | None) -> Tensor:
    """Codes of numbers within 448: three bits of mantissa, or steps of 2^-9 below 2^-6."""
    sign, size = _sign_and_size(rows)
    carry = 0x7FFFF + (size >> 20 & 1) if noise is None else noise >> 12
    code = (size + carry >> 20) - (120 << 3)
    fixed = (rows.abs() * 2.0**36).long()  # of small numbers; what lies below 2^-36 never counts
    carry = 0x3FFFFFF + (fixed >> 27 & 1) if noise is None else noise >> 5
    code = torch.where(size < 121 << 23, fixed + carry >> 27, code)
    return torch.where(size < INFINITY, code, 0x7F) | sign << 7


INFINITY, MANTISSA = 0x7F800000, 0x7FFFFF  # of a float32


def _sign_and_size(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of float32 numbers as int64: the sign, and the rest, which orders like the magnitude."""
    bits = rows.view(torch.int32).long()
    return bits >> 31 & 1, bits & 0x7FFFFFFF


def _float32(number: float) -> float:
    """Rounded once, so that no operation rounds it in its own way."""
    return torch.tensor(number, dtype=torch.float32).item()


# --- randomness -----------------------------------------------------------------------------------------------------


def noise(form: RowFormat, ids: Tensor, clock: int) -> Tensor:
    """32 random bits for each number of rows `ids` [U] at step `clock`: int64 [U, dim], below 2^32.

    With mix = splitmix64, all modulo 2^64, and ids counted from `form.first`: column j takes the low (j even) or high (j odd) half of
    mix(mix(mix(mix(seed) + clock) + id) + j // 2).
    """
    words = _mix(_key(form, ids, clock) + torch.arange((form.dim + 1) // 2, device=ids.device))
    return torch.stack([words & 0xFFFFFFFF, words >> 32 & 0xFFFFFFFF], dim=2).flatten(1)[:, : form.dim]


def initial(form: RowFormat, ids: Tensor) -> Tensor:
    """Rows [U, dim] float32 of ids [U] as they are before the first update: near normal with spread std.

    The sum of the four 16-bit parts of mix(mix(mix(mix(seed) - 1) + id) + j), centred: it reaches 3.46 std.
    """
    words = _mix(_key(form, ids, clock=-1) + torch.arange(form.dim, device=ids.device))
    total = torch.stack([words >> shift & 0xFFFF for shift in (0, 16, 32, 48)]).sum(0)
    return (total - 2 * 0xFFFF).float() * form.unit


def _key(form: RowFormat, ids: Tensor, clock: int) -> Tensor:
    """[U, 1] int64."""
    key = _mix(_mix(torch.tensor(form.seed)) + clock) + form.first
    return _mix(ids + key.to(ids.device))[:, None]


def _mix(x: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea and Flood 2014) on int64, whose products wrap around and whose shifts copy the sign."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ (x >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ (x >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return x ^ (x >> 31 & 2**33 - 1)


# --- using rows -----------------------------------------------------------------------------------------------------


def read_rows(form: RowFormat, records: Tensor, slots: Tensor, ids: Tensor) -> Tensor:
    """Rows [U, dim] float32. records: uint8 [S, stride]; slots: [U] where the rows are; ids: [U] who they are."""
    return _read(form, records.index_select(0, slots), ids)


def _read(form: RowFormat, held: Tensor, ids: Tensor) -> Tensor:
    """Rows [U, dim] of records [U, stride]."""
    rows = decode(form, held)
    if form.std:
        rows = torch.where((held == 0).all(1, keepdim=True), initial(form, ids), rows)
    return rows


def update_rows(
    form: RowFormat, records: Tensor, slots: Tensor, ids: Tensor, grads: Tensor, lr: float, clock: int
) -> None:
    """Row-wise Adagrad (Duchi 2011, one accumulator a row as in DLRM) on distinct rows of trainable records, in place.

    grads: [U, dim] float32. A row's step is lr * gradient / sqrt(sum of mean squares so far). Encodings that cannot hold
    the result round it stochastically with `noise(form, ids, clock)`. A row whose gradient is all zero keeps its bytes.
    Raises ConfigError when the rows are not trainable.
    """
    if not form.trainable:
        raise ConfigError("these rows are only read: their records have no accumulator, so no optimizer can step.")
    touched = (grads != 0).any(1)
    slots, ids, grads = slots[touched], ids[touched], grads[touched]
    held = records.index_select(0, slots)
    moment = _view(held[:, form.row_bytes :], torch.float32) + _mean_square(grads)
    root = (moment + _float32(1e-24)).double().sqrt().float()  # as IEEE rounds it; torch's own is one off in places
    scale = torch.full_like(moment, lr) / root
    rows = _read(form, held, ids) - grads * scale
    data = encode(form, rows, None if form.encoding == "fp32" else noise(form, ids, clock))
    records.index_copy_(0, slots, torch.cat([data, moment.view(torch.uint8)], dim=1))


def _mean_square(grads: Tensor) -> Tensor:
    """[U, 1]; summed as a tree, upper half onto lower half, so that every device adds in the same order."""
    dim = grads.shape[1]
    width = 1 << (dim - 1).bit_length()
    squares = F.pad(grads * grads, (0, width - dim))
    while width > 1:
        width //= 2
        squares = squares[:, :width] + squares[:, width:]
    return squares * _float32(1 / dim)
