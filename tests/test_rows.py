"""Bytes of a row: every encoding against its definition, rounding that is exact in the mean, and the update by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.tables.rows import ENCODINGS, RowFormat, decode, encode, initial, noise, read_rows, update_rows

every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def blank(form, count):
    return torch.zeros(count, form.stride, dtype=torch.uint8)


def stochastic(form, rows, words):
    """Rows, encoded with the given 32-bit words as noise, and decoded."""
    return decode(form, encode(form, rows, words))


# --- the format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "dim", "row_bytes"),
    [
        ("fp32", 80, 320),
        ("bf16", 33, 68),
        ("fp8_e8m0", 256, 264),
        ("fp8_e8m0", 33, 36),
        ("fp8_e8m0", 31, 32),
        ("int8", 64, 68),
        ("int8", 3, 8),
    ],
)
def test_sizes(encoding, dim, row_bytes):
    assert RowFormat(dim, encoding, trainable=False).stride == row_bytes
    assert RowFormat(dim, encoding).row_bytes == row_bytes
    assert RowFormat(dim, encoding).stride == row_bytes + 4


@pytest.mark.parametrize(
    "settings", [{"dim": 0}, {"encoding": "fp16"}, {"std": -1.0}, {"std": 0.1, "trainable": False}], ids=str
)
def test_impossible_formats_are_refused(settings):
    with pytest.raises(ConfigError):
        RowFormat(**{"dim": 4} | settings)


# --- decoding -------------------------------------------------------------------------------------------------------


def e4m3(code):
    """By the definition (OCP 8-bit floating point, 2023)."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))


def test_fp8_is_the_number_times_its_scale_for_every_pair_of_bytes():
    form = RowFormat(256, "fp8_e8m0", trainable=False)
    codes = torch.arange(256, dtype=torch.uint8)
    records = torch.cat([codes.expand(256, 256), codes[:, None].expand(256, 8)], dim=1)
    numbers = np.array([e4m3(code) for code in range(256)])
    scales = np.array([*(2.0 ** (code - 127) for code in range(255)), math.nan])
    with np.errstate(over="ignore"):
        expected = (numbers * scales[:, None]).astype(np.float32)  # exact in float64
    np.testing.assert_array_equal(decode(form, records).numpy(), expected)


def test_each_block_has_its_own_scale():
    form = RowFormat(33, "fp8_e8m0", trainable=False)
    record = torch.tensor([0x38] * 33 + [127, 129] + [0])  # ones; scales 1 and 4
    assert decode(form, record.to(torch.uint8)).tolist() == [1.0] * 32 + [4.0]


def test_bf16_is_the_upper_half_of_a_float32():
    form = RowFormat(1 << 16, "bf16", trainable=False)
    codes = torch.arange(1 << 16).to(torch.int16)
    torch.testing.assert_close(
        decode(form, codes.view(torch.uint8)), codes.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True
    )


@every_encoding
@pytest.mark.parametrize("dim", [1, 33])
def test_zero_bytes_are_zeros(encoding, dim):
    form = RowFormat(dim, encoding)
    assert decode(form, blank(form, 2)).tolist() == [[0.0] * dim] * 2
    assert not encode(form, torch.zeros(2, dim)).any()


@every_encoding
def test_decode_keeps_leading_axes_and_ignores_the_accumulator(encoding):
    form = RowFormat(40, encoding)
    rows = torch.linspace(-1, 1, 6 * 40).view(6, 40)
    data = encode(form, rows)
    records = torch.cat([data, torch.full((6, 4), 255, dtype=torch.uint8)], dim=1)
    assert torch.equal(decode(form, records.view(2, 3, -1)), decode(form, data).view(2, 3, 40))


# --- encoding, to nearest -------------------------------------------------------------------------------------------


@every_encoding
def test_what_was_encoded_once_is_kept(encoding):
    form = RowFormat(64, encoding)
    rows = decode(form, encode(form, torch.randn(100, 64, generator=torch.Generator().manual_seed(0))))
    again = decode(form, encode(form, rows))
    torch.testing.assert_close(again, rows, rtol=2e-7 if encoding == "int8" else 0, atol=0)


@given(st.lists(floats, min_size=1, max_size=40))
def test_bf16_rounds_as_torch_does_and_stays_finite(numbers):
    rows = torch.tensor([numbers])
    limit = torch.finfo(torch.bfloat16).max
    expected = rows.bfloat16().float().clamp(-limit, limit)
    assert torch.equal(decode(RowFormat(len(numbers), "bf16"), encode(RowFormat(len(numbers), "bf16"), rows)), expected)


@given(st.lists(floats | floats.map(lambda x: x * 2.0**-120), min_size=1, max_size=40))
def test_fp8_has_the_smallest_scale_that_fits_and_rounds_as_torch_does(numbers):
    form = RowFormat(len(numbers), "fp8_e8m0")
    data = encode(form, torch.tensor([numbers]))[0]
    for block in range(0, len(numbers), 32):
        part = torch.tensor(numbers[block : block + 32], dtype=torch.float64)
        code = int(data[len(numbers) + block // 32])
        largest = float(part.abs().max())
        assert largest <= 448 * 2.0 ** (code - 127)
        assert code == 0 or largest > 448 * 2.0 ** (code - 128)
        scaled = (part * 2.0 ** (127 - code)).float()  # exact where it matters
        assert (
            data[block : block + 32][: len(part)].tolist() == scaled.to(torch.float8_e4m3fn).view(torch.uint8).tolist()
        )


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40))
def test_int8_is_within_half_a_step(numbers):
    form = RowFormat(len(numbers), "int8")
    rows = torch.tensor([numbers])
    step = max(map(abs, numbers)) / 127
    error = (decode(form, encode(form, rows)).double() - rows.double()).abs().max()
    assert error <= 0.5001 * step + 1e-43


def test_what_is_not_finite_stays_visible():
    rows = torch.tensor([[1.0, math.nan, 2.0], [1.0, -math.inf, 2.0]])
    seen = {encoding: decode(RowFormat(3, encoding), encode(RowFormat(3, encoding), rows)) for encoding in ENCODINGS}
    for encoding in ("fp32", "bf16"):
        torch.testing.assert_close(seen[encoding], rows, rtol=0, atol=0, equal_nan=True)
    assert seen["fp8_e8m0"].isnan().tolist() == [[False, True, False]] * 2
    assert seen["int8"].isnan().all()


# --- encoding, stochastically ---------------------------------------------------------------------------------------


def counted(bits):
    """All words whose upper `bits` bits differ, as a column: noise that takes every value once."""
    return (torch.arange(1 << bits) << 32 - bits)[:, None]


@given(floats.filter(lambda x: abs(x) < 3e38))
def test_bf16_is_exact_in_the_mean(number):
    words = counted(16)
    rows = torch.full(words.shape, number)
    assert stochastic(RowFormat(1, "bf16"), rows, words).double().mean().item() == rows[0].item()


@pytest.mark.parametrize(  # with few bits each, so that 2^16 values of noise tell
    "number",
    [
        458751 / 2**10,
        425985 / 2**10,
        300.25,
        -224.125,
        7957 / 2**10,
        16777 / 2**20,
        -16253 / 2**20,
        2**-6,
        2**-9,
        3 / 2**25,
    ],
)
def test_fp8_is_exact_in_the_mean_for_large_and_for_subnormal_numbers(number):
    words = counted(16)
    rows = torch.tensor([[448.0, number]]).expand(len(words), 2)  # the first fixes the scale
    got = stochastic(RowFormat(2, "fp8_e8m0"), rows, words.expand(-1, 2))
    assert got[:, 0].unique().tolist() == [448.0]
    assert got[:, 1].double().mean().item() == rows[0, 1].item()
    assert got[:, 1].unique().numel() <= 2


def test_int8_is_exact_in_the_mean_to_the_resolution_of_the_noise():
    words = counted(16)
    rows = torch.tensor([[127.0, 3.3, -0.001, 100.5]]).expand(len(words), 4)
    got = stochastic(RowFormat(4, "int8"), rows, words.expand(-1, 4))
    torch.testing.assert_close(got.double().mean(0), rows[0].double(), rtol=1e-6, atol=2.0**-16)


@pytest.mark.parametrize("encoding", ENCODINGS[1:])
def test_no_noise_carries_a_number_out_of_range(encoding):
    largest = 2.0**127
    rows = torch.tensor([[largest, -largest, 1.0], [448.0, 447.99, -448.0], [240.0, 255.9, 0.0]])
    for word in (0, 2**32 - 1):
        got = stochastic(RowFormat(3, encoding), rows, torch.full((3, 3), word))
        assert got.isfinite().all()
        assert (got.abs().amax(1) <= 1.15 * rows.abs().amax(1).double()).all()


# --- randomness -----------------------------------------------------------------------------------------------------


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40), st.integers(0, 2**40))
def test_noise_and_initial_rows_by_hand(seed, clock, id):
    form = RowFormat(5, "bf16", std=0.3, seed=seed)
    row = mix(mix(mix(seed % 2**64) + clock) + id)
    words = [mix(row + j // 2) >> 32 * (j % 2) & 0xFFFFFFFF for j in range(5)]
    assert noise(form, torch.tensor([id]), clock).tolist() == [words]

    row = mix(mix(mix(seed % 2**64) - 1) + id)
    sums = [sum(mix(row + j) >> shift & 0xFFFF for shift in (0, 16, 32, 48)) - 131070 for j in range(5)]
    unit = np.float32(0.3 / math.sqrt((2**32 - 1) / 3))
    assert initial(form, torch.tensor([id])).tolist() == [[float(np.float32(s) * unit) for s in sums]]


def test_noise_is_uniform_and_independent():
    form, ids = RowFormat(64, "bf16"), torch.arange(4096)
    here = noise(form, ids, clock=5).double() / 2**32 - 0.5
    assert abs(here.mean()) < 0.002
    assert abs(here.std() - 12**-0.5) < 0.002
    high = torch.histc(here, 64, -0.5, 0.5)
    assert (high / high.mean() - 1).abs().max() < 0.08
    others = {
        "next id": (here[:-1], here[1:]),
        "next column": (here[:, :-1], here[:, 1:]),
        "next clock": (here, noise(form, ids, clock=6).double() / 2**32 - 0.5),
        "next seed": (here, noise(RowFormat(64, "bf16", seed=1), ids, clock=5).double() / 2**32 - 0.5),
        "low bits": (here, (noise(form, ids, clock=5) & 0xFFFF).double() / 2**16 - 0.5),
    }
    for name, (left, right) in others.items():
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
        assert abs(correlation) < 0.01, name


def test_initial_rows_are_near_normal():
    rows = initial(RowFormat(64, std=0.02, seed=3), torch.arange(4096))
    assert abs(rows.mean()) < 0.0002
    assert abs(rows.std() / 0.02 - 1) < 0.01
    assert rows.abs().max() < 3.47 * 0.02
    within = (rows.abs() < 0.02).double().mean()
    assert abs(within - 0.683) < 0.02


# --- using rows -----------------------------------------------------------------------------------------------------


@every_encoding
def test_rows_never_written_read_as_initial_and_others_as_written(encoding):
    form = RowFormat(8, encoding, std=0.1, seed=7)
    records, slots, ids = blank(form, 10), torch.tensor([4, 1, 9]), torch.tensor([100, 200, 300])
    records[1, : form.row_bytes] = encode(form, torch.full((1, 8), 0.5))[0]
    records[9, -4:] = torch.tensor([1.0]).view(torch.uint8)  # zeros that were reached by training
    rows = read_rows(form, records, slots, ids)
    assert torch.equal(rows[0], initial(form, ids)[0])
    torch.testing.assert_close(rows[1], torch.full((8,), 0.5))
    assert rows[2].tolist() == [0.0] * 8


def adagrad(row, moment, grad, lr):
    """One row, number by number, every operation rounded to float32."""
    f = np.float32
    squares = [f(g) * f(g) for g in grad]
    squares += [f(0)] * ((1 << (len(grad) - 1).bit_length()) - len(grad))
    while len(squares) > 1:
        half = len(squares) // 2
        squares = [squares[j] + squares[half + j] for j in range(half)]
    moment = f(moment) + squares[0] * f(1 / len(grad))
    scale = f(lr) / np.sqrt(moment + f(1e-24))
    return [f(r) - f(g) * scale for r, g in zip(row, grad, strict=True)], moment


@pytest.mark.parametrize("dim", [1, 3, 32, 80])
def test_update_of_fp32_rows_by_hand(dim):
    form = RowFormat(dim, std=0.5)
    generator = torch.Generator().manual_seed(dim)
    records, slots, ids = blank(form, 9), torch.tensor([7, 2, 5, 0]), torch.tensor([11, 12, 13, 14])
    rows, moments = initial(form, ids).numpy(), np.zeros(4, np.float32)
    for clock in range(3):
        grads = torch.randn(4, dim, generator=generator)
        update_rows(form, records, slots, ids, grads, lr=0.1, clock=clock)
        stepped = [adagrad(r, m, g, 0.1) for r, m, g in zip(rows, moments, grads.numpy(), strict=True)]
        rows, moments = np.array([row for row, _ in stepped]), np.array([moment for _, moment in stepped])
    assert read_rows(form, records, slots, ids).numpy().tobytes() == rows.tobytes()
    assert records[slots, -4:].numpy().tobytes() == moments.tobytes()
    assert not records[[1, 3, 4, 6, 8]].any()


@every_encoding
def test_first_step_has_length_lr_and_no_gradient_touches_nothing(encoding):
    form = RowFormat(32, encoding)
    records, places = blank(form, 6), torch.arange(6)
    grads = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) * 1e-3
    grads[[2, 4]] = torch.tensor([0.0, -0.0])[:, None]
    update_rows(form, records, places, places, grads, lr=0.25, clock=0)
    assert not records[[2, 4]].any()
    rows = read_rows(form, records, places, places)[[0, 1, 3, 5]]
    torch.testing.assert_close(rows.square().mean(1).sqrt(), torch.full((4,), 0.25), rtol=0.02, atol=0)
    assert (rows * grads[[0, 1, 3, 5]] <= 0).all()
    update_rows(form, records, places[:0], places[:0], grads[:0], lr=0.25, clock=1)


@pytest.mark.parametrize("encoding", ENCODINGS[1:])
def test_steps_below_the_precision_count_in_the_mean(encoding):
    """Four thousand rows of ones take 30 steps, each a fraction of what the encoding can tell apart."""
    form = RowFormat(4, encoding)
    records, places = blank(form, 4000), torch.arange(4000)
    records[:, : form.row_bytes] = encode(form, torch.ones(4000, 4))
    exact = RowFormat(4)
    exactly = torch.cat([encode(exact, torch.ones(4000, 4)), torch.zeros(4000, 4, dtype=torch.uint8)], dim=1)
    grads = torch.tensor([0.0, 0.5, 1.0, -1.0]).expand(4000, 4)
    for clock in range(30):
        for each, target in ((form, records), (exact, exactly)):
            update_rows(each, target, places, places, grads, lr=1e-4, clock=clock)
    got, wanted = (read_rows(f, r, places, places).mean(0) for f, r in ((form, records), (exact, exactly)))
    moved = (wanted - 1).abs().max()
    assert 5e-4 < moved < 2e-3
    assert (got - wanted).abs().max() < 0.4 * moved


def test_rows_without_accumulator_are_not_updated():
    form = RowFormat(4, trainable=False)
    with pytest.raises(ConfigError, match="accumulator"):
        update_rows(form, blank(form, 1), torch.tensor([0]), torch.tensor([0]), torch.ones(1, 4), lr=0.1, clock=0)
