"""engram-lm table: what the commands print, what they return, and that converting keeps every bit it can."""

import io
from typing import Annotated, Any, Union

import numpy as np
import pytest
import torch
import tyro
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tyro.conf import AvoidSubcommands, subcommand

from engram_lm.cli import table
from engram_lm.errors import CheckpointError, ConfigError, DataError
from engram_lm.kernels.reads import Reader
from engram_lm.model.lookup import address_digest, build_plan, build_vocabulary
from engram_lm.model.presets import get_preset
from engram_lm.tables.file import TableFile
from engram_lm.tables.journal import Journal
from engram_lm.tables.rows import ENCODINGS, RowFormat, decode, encode, read_rows
from engram_lm.train.tokenizer import train_tokenizer

ROWS, DIM = 1000, 40


def run(*arguments):
    """Exit code and output of `engram-lm table ...`, parsed as the command line does."""
    kinds = {"table": table.Table, "other": table.Inspect}
    either: Any = Union[  # noqa: UP007
        tuple(Annotated[kind, subcommand(name, prefix_name=False)] for name, kind in kinds.items())
    ]
    command = tyro.cli(either, args=["table", *map(str, arguments)], config=(AvoidSubcommands,))
    output = io.StringIO()
    code = command.run(Console(file=output, width=200))
    return code, output.getvalue()


def make(path, form, written=slice(200, 500), rows=ROWS, **options):
    """A table file in which some rows were written; all its records."""
    values = torch.randn(rows, form.dim, generator=torch.Generator().manual_seed(0))
    records = np.zeros((rows, form.stride), np.uint8)
    records[written, : form.row_bytes] = encode(form, values).numpy()[written]
    if form.trainable:
        records[written, form.row_bytes :] = np.arange(1, rows + 1, dtype=np.float32)[:, None].view(np.uint8)[written]
    with TableFile.create(path, rows, form, **options) as file:
        file.write(0, records)
    return records


def rows_of(path):
    """All rows as they read."""
    with TableFile.open(path) as file:
        records, ids = torch.from_numpy(file.read(0, file.num_rows)), torch.arange(file.num_rows)
        assert file.verify() == []
        return read_rows(file.form, records, ids, ids)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "table.safetensors"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target.safetensors"


# --- create and inspect ---------------------------------------------------------------------------------------------


def test_create_and_inspect(path):
    code, text = run(
        "create", path, "--rows", 100_000_000, "--dim", 64, "--encoding", "bf16", "--std", 0.02, "--seed", 5
    )
    assert code == 0
    assert "rows            100,000,000 of 64 numbers, bf16, 132 bytes each" in text
    assert "untouched rows  N(0, 0.02), seed 5" in text
    assert "blocks          0 of 1,562,500 written" in text
    assert run("inspect", path) == (0, text)
    with TableFile.open(path) as file:
        assert (file.num_rows, file.form) == (100_000_000, RowFormat(64, "bf16", std=0.02, seed=5))


def test_create_for_serving(path):
    assert "training        none" in run("create", path, "--rows", 5, "--dim", 2, "--serving")[1]
    assert not TableFile.open(path).form.trainable


def test_create_for_a_preset(path, target, tmp_path):
    tokenizer = train_tokenizer(["some text, any text"], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    memory = get_preset("tiny").memory
    vocabulary = build_vocabulary(memory.hash, Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    plan = build_plan(memory.hash, vocabulary)
    assert run("create", path, "--preset", "tiny")[0] == 0
    assert run("create", target, "--preset", "tiny", "--tokenizer", tmp_path / "tokenizer.json")[0] == 0
    with TableFile.open(path) as unbound, TableFile.open(target) as bound:
        assert unbound.num_rows == bound.num_rows == plan.num_rows
        assert unbound.form == bound.form == RowFormat(memory.engram.row_dim)
        assert (unbound.digest, bound.digest) == ("", address_digest(vocabulary, plan))


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        (["--rows", 5], ConfigError, "at least one number"),
        (["--dim", 5], ConfigError, "at least one row"),
        (["--preset", "tiny", "--rows", 5], ConfigError, "leave out --rows and --dim"),
        (["--preset", "moe-27b"], ConfigError, "moe-27b has no memory"),
        (
            ["--rows", 5, "--dim", 5, "--tokenizer", "x"],
            ConfigError,
            "--tokenizer binds a table to the plan of a --preset",
        ),
    ],
)
def test_what_cannot_be_created(path, options, error, reason):
    with pytest.raises(error, match=reason):
        run("create", path, *options)
    assert list(path.parent.iterdir()) == []


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify(path):
    make(path, RowFormat(DIM))
    assert run("verify", path) == (0, f"{path}: all 16 blocks are intact\n")
    with path.open("r+b") as file:
        file.seek(TableFile.open(path).offsets(np.array([300]))[0])
        file.write(b"\x00\x01")
    code, text = run("verify", path)
    assert code == 1
    assert text == f"damaged: block 4 (rows 256 to 319)\n{path}: 1 of 16 blocks are damaged\n"


def changed_in_journal(path, ids, records):
    """Commit newer rows to a journal beside a table file."""
    with TableFile.open(path, write=True) as file:
        journal = Journal(file, Reader())
        journal.append(ids, records)
        journal.commit(7)
        journal.close()


def test_verify_reads_the_journal(path):
    form = RowFormat(DIM)
    changed_in_journal(path, np.array([3, 900]), make(path, form)[[250, 251]])
    assert run("verify", path)[0] == 0
    journal = path.with_name(f"{path.name}.journal")
    assert "journal         " in run("inspect", path)[1]
    journal.write_bytes(b"x" + journal.read_bytes()[1:])
    with pytest.raises(DataError, match=r"\.journal"):
        run("verify", path)


# --- convert --------------------------------------------------------------------------------------------------------


def test_compact_leaves_one_file(path):
    form = RowFormat(DIM, "bf16")
    records = make(path, form)
    records[[3, 250, 999]] = 7
    changed_in_journal(path, [3, 250, 999], records[[3, 250, 999]])
    code, said = run("compact", path)
    assert code == 0
    assert "journal         none" in said
    assert not path.with_name(path.name + ".journal").exists()
    with TableFile.open(path) as file:
        np.testing.assert_array_equal(file.read(0, ROWS), records)
        assert file.verify() == []


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("source", ENCODINGS)
def test_convert_rounds_to_the_nearest(path, target, source, encoding):
    old, new = RowFormat(DIM, source), RowFormat(DIM, encoding)
    records = make(path, old, digest="d1", facts={"corpus": "x"})
    assert run("convert", path, target, "--encoding", encoding)[0] == 0
    with TableFile.open(target, digest="d1") as file:
        assert (file.form, file.facts) == (new, {"corpus": "x"})
        found = file.read(0, ROWS)
        assert file.verify() == []
    expected = encode(new, decode(old, torch.from_numpy(records))).numpy()
    written = slice(200, 500)
    if source == encoding:
        assert np.array_equal(found, records)
    else:
        assert np.array_equal(found[written, : new.row_bytes], expected[written])
    assert np.array_equal(found[:, new.row_bytes :], records[:, old.row_bytes :])  # accumulators
    assert not found[:200].any()
    assert not found[500:].any()


@pytest.mark.parametrize("encoding", ["fp32", "int8"])
def test_convert_for_serving(path, target, encoding):
    make(path, RowFormat(DIM, std=0.3, seed=2), written=slice(200, 203))
    run("convert", path, target, "--serving", "--encoding", encoding)
    form = RowFormat(DIM, encoding, trainable=False, seed=2)
    with TableFile.open(target) as file:
        assert file.form == form
    assert torch.equal(rows_of(target), decode(form, encode(form, rows_of(path))))
    assert rows_of(target).std() > 0.2  # untouched ones as well


def test_convert_leaves_untouched_rows_untouched(path, target):
    make(path, RowFormat(DIM, std=0.3, seed=2), written=slice(200, 203))
    run("convert", path, target, "--encoding", "bf16")
    with TableFile.open(target) as file:
        assert file.form == RowFormat(DIM, "bf16", std=0.3, seed=2)
        assert np.flatnonzero(file.read(0, ROWS).any(1)).tolist() == [200, 201, 202]
    assert torch.equal(rows_of(target)[:200], rows_of(path)[:200])


def test_a_sparse_table_is_converted_sparsely(path, target):
    form = RowFormat(8)
    with TableFile.create(path, 50_000_000, form) as file:
        file.write(30_000_000, np.ones((5, form.stride), np.uint8))
    run("convert", path, target, "--encoding", "bf16")
    assert target.stat().st_blocks * 512 < 1 << 17
    with TableFile.open(target) as file:
        ones = decode(form, torch.ones(form.stride, dtype=torch.uint8))
        assert torch.equal(
            decode(file.form, torch.from_numpy(file.read(30_000_004, 30_000_005)))[0], ones.bfloat16().float()
        )


def test_convert_takes_the_rows_of_the_journal(path, target):
    form = RowFormat(DIM, "bf16")
    records = make(path, form)
    ids = np.array([3, 220, 999])
    changed_in_journal(path, ids, records[[400, 401, 402]])
    records[ids] = records[[400, 401, 402]]
    run("convert", path, target)
    with TableFile.open(target) as file:
        assert np.array_equal(file.read(0, ROWS), records)
        assert file.clock == 7


def test_a_conversion_that_fails_leaves_nothing(path, target):
    make(path, RowFormat(DIM))
    with path.open("r+b") as file:
        file.seek(TableFile.open(path).offsets(np.array([300]))[0])
        file.write(b"\x00\x01")
    with pytest.raises(DataError, match=r"block 4 \(rows 256 to 319\) does not match"):
        run("convert", path, target)
    assert list(path.parent.iterdir()) == [path]


def test_a_table_is_not_converted_onto_another(path, target):
    make(path, RowFormat(DIM))
    make(target, RowFormat(DIM))
    with pytest.raises(CheckpointError, match="never overwritten"):
        run("convert", path, target)


@pytest.mark.parametrize(
    ("dtype", "encoding"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp32")]
)
def test_plain_rows(path, target, dtype, encoding):
    rows = torch.randn(300, 6).to(dtype)
    save_file({"embed": rows, "bias": torch.ones(3)}, path)
    run("convert", path, target, "--digest", "d9")
    with TableFile.open(target, digest="d9") as file:
        assert file.form == RowFormat(6, encoding)
    assert torch.equal(rows_of(target), rows.float())


@pytest.mark.parametrize("dim", [256, 40])
def test_the_two_tensors_of_v41(path, target, dim):
    numbers = torch.randint(0, 256, (300, dim), dtype=torch.uint8)
    scales = torch.randint(100, 150, (300, -(-dim // 32)), dtype=torch.uint8)
    name = "layers.1.engram.embed"
    save_file(
        {
            f"{name}.weight": numbers.view(torch.float8_e4m3fn),
            f"{name}.scale": scales.view(torch.float8_e8m0fnu),
            "layers.1.engram.proj.weight": torch.ones(2, 2),
        },
        path,
    )
    with pytest.raises(DataError, match=r"does not say which .* it has layers.1.engram.\w+.weight, layers.1"):
        run("convert", path, target)
    run("convert", path, target, "--tensor", f"{name}.weight", "--serving")
    with TableFile.open(target) as file:
        assert file.form == RowFormat(dim, "fp8_e8m0", trainable=False)
        found = torch.from_numpy(file.read(0, 300))
    used = dim + scales.shape[1]
    assert torch.equal(found[:, :used], torch.cat([numbers, scales], dim=1))
    assert not found[:, used:].any()


def test_files_without_rows(path, target):
    save_file({"integers": torch.ones(3, 3, dtype=torch.int64), "flat": torch.ones(3)}, path)
    with pytest.raises(DataError, match="it has none"):
        run("convert", path, target)
    with pytest.raises(DataError, match="has no rows called 'flat'"):
        run("convert", path, target, "--tensor", "flat")
    path.write_bytes(b"no safetensors")
    with pytest.raises(DataError, match="not a safetensors file"):
        run("convert", path, target)
    with pytest.raises(DataError, match="there is no such table file"):
        run("convert", path.with_name("nowhere"), target)
    assert not target.exists()


# --- stats ----------------------------------------------------------------------------------------------------------


def test_stats(path):
    make(path, RowFormat(DIM))
    code, text = run("stats", path)
    assert code == 0
    assert "300 of 1,000 rows were written (30.00%)" in text
    norms = rows_of(path)[200:500].norm(dim=1)
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if "│" in line}
    shown = [float(cell) for cell in cells["norm"][1:]]
    expected = [norms.mean(), *norms.quantile(torch.tensor(table.Spread.SHARES), interpolation="lower"), norms.max()]
    assert shown == pytest.approx([float(number) for number in expected], rel=0.02)
    assert float(cells["accumulator"][1]) == pytest.approx(350.5, rel=0.01)


def test_stats_of_untouched_and_broken_rows(path, target):
    TableFile.create(path, 10, RowFormat(4)).close()
    assert run("stats", path) == (0, "0 of 10 rows were written (0.00%)\n")
    with TableFile.create(target, 10, RowFormat(1, trainable=False)) as file:
        rows = np.array([[1.0], [np.nan], [np.inf], [-0.0]], np.float32)
        file.write(3, rows.view(np.uint8))
    text = run("stats", target)[1]
    assert "4 of 10 rows were written (40.00%)\n2 of them hold NaN or infinity\n" in text
    assert "50.0%" in text  # of the others are zeros


def test_quantiles_of_portions():
    numbers = np.random.default_rng(0).lognormal(size=10_000)
    spread = table.Spread()
    for portion in np.array_split(numbers, 7):
        spread.add(portion)
    for share in (0.001, 0.2, 0.5, 0.999):
        assert spread.quantile(share) == pytest.approx(np.quantile(numbers, share), rel=0.01)
