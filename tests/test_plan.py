"""Plans for many ranks: counts against sets, formulas against hashed batches, bytes and seconds by hand, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import tyro
from ranks import run_ranks
from rich.console import Console

from engram_lm.cli.plan import Plan, first_documents
from engram_lm.errors import ConfigError, DataError
from engram_lm.hashing import HashConfig, hash_ngrams
from engram_lm.model.lookup import build_plan
from engram_lm.model.presets import get_preset
from engram_lm.study.growth import (
    Growth,
    distinct_ngrams,
    distinct_rows,
    head_sizes,
    measure_growth,
    owner_shares,
    simulate,
)
from engram_lm.study.plan import Machine, Prices, Tables, Traffic, id_bytes, place, traffic
from engram_lm.tables import DeviceTable, RowFormat
from engram_lm.tables.sharded import Lanes, ShardedTable, part_of
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train.loader import Loader, LoaderState
from engram_lm.train.shards import Split, split_in_memory
from engram_lm.train.sources import read_documents, standard_library
from engram_lm.train.tokenizer import train_tokenizer

SOURCE = str(Path(standard_library()) / "asyncio")
V41 = Tables.deepseek_v41()
HASH = HashConfig(orders=(2, 3, 4), heads=4, rows_per_head=20_000, layers=(1, 3), pad_id=0)
GROWTH = Growth(  # invented: 2-grams repeat, 3-grams do not
    orders=(2, 3),
    tokens=(1000, 2000, 4000),
    mean=((500.0, 1000.0), (750.0, 2000.0), (1125.0, 4000.0)),
    spread=((1.0, 1.0),) * 3,
    exponents=(float(np.log2(1.5)), 1.0),
    draws=2,
    text_tokens=8000,
)
TABLES = Tables(
    "ours", HashConfig(orders=(2, 3), heads=2, rows_per_head=10**6, layers=(0,)), RowFormat(64, "bf16"), 500, 10**6
)


@pytest.fixture(scope="module")
def text() -> tuple[Split, CanonicalVocabulary]:
    """Real text: 0.2 M tokens."""
    tokenizer = train_tokenizer((document.text for document in read_documents(SOURCE)), 512)
    return split_in_memory(read_documents(SOURCE), tokenizer), CanonicalVocabulary.from_tokenizer(tokenizer)


# --- counting -------------------------------------------------------------------------------------------------------


def test_ngrams_are_those_of_a_set(text: tuple[Split, CanonicalVocabulary]) -> None:
    """Of canonical ids, cut off where a document or a window begins."""
    split, vocabulary = text
    batch, _ = Loader(split, batch_size=20, length=500).next(LoaderState())
    assert batch.segments is not None
    assert any(len(set(segments.tolist())) > 1 for segments in batch.segments)
    seen: dict[int, set[tuple[int, ...]]] = {order: set() for order in HASH.orders}
    for tokens, segments in zip(vocabulary(batch.tokens).tolist(), batch.segments.tolist(), strict=True):
        for order, last in product(HASH.orders, range(len(tokens))):
            view = range(last, last - order, -1)
            inside = [at >= 0 and segments[at] == segments[last] for at in view]
            seen[order].add(tuple(tokens[at] if ok else -1 for at, ok in zip(view, inside, strict=True)))
    assert distinct_ngrams(HASH, vocabulary, batch) == [len(seen[order]) for order in HASH.orders]


@pytest.mark.parametrize("rows", [500, 20_000, 1_000_000])
def test_rows_follow_from_ngrams(text: tuple[Split, CanonicalVocabulary], rows: int) -> None:
    """Within 1 %, from tables that the batch fills to such in which hardly two n-grams meet."""
    split, vocabulary = text
    config = replace(HASH, rows_per_head=rows)
    batch, _ = Loader(split, batch_size=16, length=512).next(LoaderState())
    ids, _ = hash_ngrams(build_plan(config, vocabulary), vocabulary(batch.tokens), segments=batch.segments)
    truth = np.array([[len(head.unique()) for head in layer] for layer in ids.flatten(0, 1).permute(1, 2, 0)])
    expected = distinct_rows(head_sizes(config), np.array(distinct_ngrams(config, vocabulary, batch)))
    assert expected.shape == truth.shape == (2, 12)
    assert expected.sum() == pytest.approx(truth.sum(), rel=0.01)
    assert expected == pytest.approx(truth, rel=0.03)  # each head


def test_one_row_is_hit_once() -> None:
    assert distinct_rows(np.array([[1, 10**9]]), np.array([1000.0])) == pytest.approx(np.array([[1, 1000]]), rel=1e-5)


def test_owners_share_unevenly_as_counted(text: tuple[Split, CanonicalVocabulary]) -> None:
    split, vocabulary = text
    found = simulate(split, vocabulary, HASH, ranks=5, batch=4096, length=512)
    growth = measure_growth(split, vocabulary, HASH, batch=4096, largest=(5 * 4096,), length=512, draws=8)
    sizes = head_sizes(HASH)
    rows = distinct_rows(sizes, growth.at(4096))
    shares = owner_shares(sizes, rows, 5)
    assert shares.sum() == pytest.approx(1)
    assert shares.max() > 1.05 / 5
    assert shares.max() * 5 == pytest.approx(found.busiest, rel=0.02)
    assert rows.sum() == pytest.approx(found.distinct, rel=0.03)  # other batches
    assert distinct_rows(sizes, growth.at(5 * 4096)).sum() == pytest.approx(found.everywhere, rel=0.03)


def test_equal_heads_are_shared_evenly() -> None:
    sizes = np.full((2, 3), 1000)
    assert owner_shares(sizes, sizes / 7, 4) == pytest.approx(np.full(4, 1 / 4))
    assert owner_shares(np.array([[6, 2]]), np.array([[3.0, 1.0]]), 1).tolist() == [1]
    assert owner_shares(np.array([[50, 50]]), np.array([[10.0, 30.0]]), 4) == pytest.approx(
        [1 / 8, 1 / 8, 3 / 8, 3 / 8]
    )


def test_a_simulation_counts_what_each_rank_asks_of_each(text: tuple[Split, CanonicalVocabulary]) -> None:
    split, vocabulary = text
    found = simulate(split, vocabulary, HASH, ranks=3, batch=1024, length=512)
    plan = build_plan(HASH, vocabulary)
    batch, _ = Loader(split, batch_size=6, length=512).next(LoaderState())
    assert batch.segments is not None
    asked = []
    for rank in range(3):
        mine = slice(2 * rank, 2 * rank + 2)
        ids, _ = hash_ngrams(plan, vocabulary(batch.tokens[mine]), segments=batch.segments[mine])
        asked.append(set(ids.flatten().tolist()))
    owners = [[sum(rank * plan.num_rows // 3 <= row < (rank + 1) * plan.num_rows // 3 for row in rows) for rank in range(3)] for rows in asked]  # fmt: skip
    served = np.sum(owners, axis=0)
    assert found.distinct == pytest.approx(sum(map(len, asked)) / 3)
    assert found.everywhere == len(set().union(*asked))
    assert found.remote == pytest.approx((np.sum(owners) - np.trace(owners)) / 3)
    assert found.busiest == pytest.approx(served.max() / served.mean())


# --- growth ---------------------------------------------------------------------------------------------------------


def test_growth_is_measured_where_the_text_reaches(text: tuple[Split, CanonicalVocabulary]) -> None:
    split, vocabulary = text
    half = len(split.tokens) // 2
    growth = measure_growth(split, vocabulary, HASH, batch=4096, largest=(3 * 4096, 10**9), length=256)
    assert growth.tokens[:4] == (512, 1024, 2048, 4096)
    assert 3 * 4096 in growth.tokens
    assert half / 2 < growth.tokens[-1] <= half
    assert growth.reaches(growth.tokens[-1])
    assert not growth.reaches(growth.tokens[-1] + 1)
    mean, spread = np.array(growth.mean), np.array(growth.spread)
    assert (np.diff(mean, axis=0) > 0).all()  # a larger batch has more
    assert (np.diff(mean, axis=1) > 0).all()  # so has a larger order
    assert ((spread > 0) & (spread < mean / 4)).all()
    assert growth.at(3 * 4096) == pytest.approx(mean[growth.tokens.index(3 * 4096)])
    assert ((mean[3] < growth.at(5000)) & (growth.at(5000) < growth.at(3 * 4096))).all()


def test_batches_need_not_be_whole_sequences(text: tuple[Split, CanonicalVocabulary]) -> None:
    growth = measure_growth(*text, HASH, batch=4099, largest=(3 * 4099,), length=256, draws=2)
    assert growth.tokens[0] == 4099 // 8
    assert growth.reaches(3 * 4099)
    assert simulate(*text, HASH, ranks=3, batch=4099, length=256).distinct == pytest.approx(
        distinct_rows(head_sizes(HASH), growth.at(4099)).sum(), rel=0.05
    )


def test_beyond_the_text_a_power_law_goes_on(text: tuple[Split, CanonicalVocabulary]) -> None:
    """Predicted from a part of what is measured: too much rather than too little, and not by far."""
    split, vocabulary = text
    short = measure_growth(split, vocabulary, HASH, batch=4096, largest=(16_384,), length=256)
    known = measure_growth(split, vocabulary, HASH, batch=4096, largest=(65_536,), length=256)
    assert not short.reaches(65_536)
    assert known.reaches(65_536)
    excess = short.at(65_536) / known.at(65_536)
    assert ((excess > 0.98) & (excess < 1.25)).all()
    assert GROWTH.at(16_000) == pytest.approx([500 * 1.5**4, 16_000])


def test_what_cannot_be_counted_is_refused(text: tuple[Split, CanonicalVocabulary]) -> None:
    split, vocabulary = text
    with pytest.raises(DataError, match="fewer than a batch of 10,000,000"):
        measure_growth(split, vocabulary, HASH, batch=10**7)
    with pytest.raises(ConfigError, match="two draws"):
        measure_growth(split, vocabulary, HASH, batch=4096, draws=1)
    with pytest.raises(ConfigError, match="too few to tell how 4-grams grow"):
        measure_growth(split, vocabulary, HASH, batch=4096, length=3)
    with pytest.raises(ConfigError, match="from 1,000 tokens on"):
        GROWTH.at(999)


# --- tables ---------------------------------------------------------------------------------------------------------


def test_deepseeks_tables_have_their_published_size() -> None:
    served = replace(V41, form=replace(V41.form, trainable=False))
    assert (V41.num_rows, V41.reads) == (384_006_168 + 384_016_682, 48)
    assert served.nbytes == 202_758_032_400
    assert V41.nbytes == served.nbytes + 4 * V41.num_rows
    assert V41.reads * V41.form.row_bytes == 12_672
    tenfold = V41.scaled(10)
    assert tenfold.num_rows == pytest.approx(10 * V41.num_rows, rel=1e-4)
    assert (tenfold.reads, tenfold.form, tenfold.name) == (48, V41.form, "deepseek-v41 x 10")
    assert V41.scaled(1) == V41


def test_a_presets_tables_are_its_memorys() -> None:
    tables = Tables.of("engram-27b", get_preset("engram-27b"))
    assert tables.nbytes == tables.num_rows * (4 * 80 + 4)
    assert tables.dense is not None
    assert 1e9 < tables.dense < 4e9  # neither the tables' 5.8 billion nor the experts' 18
    with pytest.raises(ConfigError, match="dense-4b has no memory"):
        Tables.of("dense-4b", get_preset("dense-4b"))


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_traffic_by_hand() -> None:
    form = RowFormat(64, "bf16")
    assert traffic(800, 4, form) == Traffic(ids=600 * 4, rows=600 * 128, grads=600 * 256, counts=3 * 8)
    assert traffic(800, 4, form, id_bytes=8).ids == 600 * 8
    assert traffic(800, 4, replace(form, std=0.1)).rows == 600 * 132
    assert traffic(800, 4, replace(form, trainable=False)).grads == 0
    assert traffic(800, 1, form).total == 0
    assert (id_bytes(2**32, 2), id_bytes(2**32 + 1, 2), id_bytes(2**31, 1)) == (4, 8, 4)


def test_a_placement_by_hand() -> None:
    """Four ranks on two nodes, 1000 tokens each; heads so large that n-grams and rows are one for one."""
    machine = Machine(node=2, network=2, inside=4, bus=8, ram=16, disk=32, iops=0.5)
    made = place(TABLES, GROWTH, ranks=4, tokens=1000, machine=machine, prices=Prices(100, 10, 1), cached=0.75)
    assert made.reads == 4000
    assert made.distinct == pytest.approx(2 * (500 + 1000), rel=1e-3)
    assert made.everywhere == pytest.approx(2 * (1125 + 4000), rel=3e-3)
    assert (made.distinct_extrapolated, made.everywhere_extrapolated) == (False, False)
    assert made.rank_bytes == made.table_bytes / 4 == made.num_rows * 132 / 4
    assert made.step_bytes == pytest.approx(made.distinct * 64 * 8)
    assert made.busiest == pytest.approx(1000 / 750, rel=1e-3)  # the last two own the 3-grams
    assert made.sent == traffic(made.distinct, 4, TABLES.form)
    assert made.sent_undeduplicated == traffic(4000, 4, TABLES.form)
    assert made.network_bytes == pytest.approx(made.sent.total * 2 / 3)  # of three others, two are on the other node
    assert made.bus_bytes == pytest.approx(made.distinct * (128 + 256))
    assert made.disk_reads == pytest.approx(made.everywhere / 4 / 4)
    assert made.disk_written == pytest.approx(made.everywhere / 4 * (132 + 8))
    assert made.dense_bytes == 2 * 3 / 4 * 4 * 10**6
    assert [tier.price for tier in made.tiers] == pytest.approx(
        [made.table_bytes / 1e9 * price for price in (100, 10, 1)]
    )
    hbm, dram, nvme = (tier.seconds for tier in made.tiers)
    assert hbm.network == dram.network == pytest.approx(made.busiest * made.network_bytes / 2e9)
    assert hbm.inside == nvme.inside == pytest.approx(made.busiest * made.sent.total / 3 / 4e9)
    assert hbm.bus == hbm.ram == hbm.disk == dram.disk == 0
    assert dram.bus == pytest.approx(made.busiest * made.bus_bytes / 8e9)
    assert dram.ram == pytest.approx(made.busiest * (made.distinct * 128 + made.everywhere / 4 * 264) / 16e9)
    fullest = 4000 / (5125 / 2)
    assert nvme.disk == pytest.approx(fullest * (made.disk_reads / 0.5e6 + made.disk_written / 32e9), rel=3e-3)
    assert nvme.total == pytest.approx(sum((nvme.network, nvme.inside, nvme.bus, nvme.ram, nvme.disk)))


def test_a_slow_disk_is_held_up_by_bytes() -> None:
    made = place(TABLES, GROWTH, ranks=1, tokens=4000, machine=Machine(disk=0.001, iops=1000))
    assert made.tiers[2].seconds.disk == pytest.approx((made.disk_reads * 4096 + made.disk_written) / 1e6)


def test_one_rank_sends_nothing() -> None:
    made = place(TABLES, GROWTH, ranks=1, tokens=1000)
    assert (made.sent.total, made.network_bytes, made.dense_bytes, made.busiest) == (0, 0, 0, 1)
    assert made.everywhere == made.distinct
    assert made.tiers[0].seconds.total == 0


def test_a_table_that_is_only_read_sends_no_gradients() -> None:
    read = replace(TABLES, form=replace(TABLES.form, trainable=False))
    made = place(read, GROWTH, ranks=8, tokens=1000)
    assert (made.sent.grads, made.disk_written) == (0, 0)
    assert made.bus_bytes == pytest.approx(made.distinct * 128)
    assert made.step_bytes == pytest.approx(made.distinct * 256)


def test_within_a_node_nothing_goes_over_the_network() -> None:
    made = place(TABLES, GROWTH, ranks=4, tokens=1000, machine=Machine(node=8))
    assert made.network_bytes == made.tiers[0].seconds.network == 0
    assert made.tiers[0].seconds.inside > 0


def test_figures_beyond_the_text_are_marked() -> None:
    made = place(TABLES, GROWTH, ranks=8, tokens=4000)
    assert (made.distinct_extrapolated, made.everywhere_extrapolated) == (False, True)
    assert place(TABLES, GROWTH, ranks=8, tokens=4001).distinct_extrapolated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 12}, "do not fill nodes of 8"),
        ({"ranks": 0}, "do not fill nodes"),
        ({"ranks": 8, "cached": 1.5}, "lies between 0 and 1"),
    ],
)
def test_what_cannot_be_placed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(TABLES, GROWTH, tokens=1000, **options)


def test_impossible_machines_and_prices_are_refused() -> None:
    with pytest.raises(ConfigError, match="speeds above 0"):
        Machine(bus=0)
    with pytest.raises(ConfigError, match="at least 0"):
        Prices(nvme=-1)


def test_a_plan_meets_what_real_batches_ask(text: tuple[Split, CanonicalVocabulary]) -> None:
    """Rows that a rank sends and takes, by formula and by hashing: other batches of the same text."""
    split, vocabulary = text
    tables = replace(TABLES, hash=HASH)
    growth = measure_growth(split, vocabulary, HASH, batch=4096, largest=(4 * 4096,), length=512)
    found = simulate(split, vocabulary, HASH, ranks=4, batch=4096, length=512)
    made = place(tables, growth, ranks=4, tokens=4096)
    assert made.sent.ids / 4 == pytest.approx(found.remote, rel=0.03)


def step_of_rank(of_rank: list[np.ndarray], num_rows: int, form: RowFormat) -> tuple[int, int, int, int]:
    """Bytes that this rank sends in a step that reads and updates its distinct rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    part, rows = part_of(form, num_rows, rank, size)
    shard = DeviceTable(rows, part)
    table = ShardedTable(shard, num_rows, Lanes(*(dist.new_group() for _ in range(3))))
    ids = torch.from_numpy(of_rank[rank])
    fetch = table.prefetch(ids)
    table.apply(*fetch.collect(ids, fetch.rows()), lr=0.1)
    table.close()
    return table.sent.ids, table.sent.rows, table.sent.grads, table.sent.counts


@pytest.mark.parametrize("size", [2, 4])
def test_a_plan_meets_what_ranks_send(
    text: tuple[Split, CanonicalVocabulary], processes: ForkServerContext, size: int
) -> None:
    """Bytes counted by as many processes that train on the text, against those planned from other batches of it."""
    split, vocabulary = text
    growth = measure_growth(split, vocabulary, HASH, batch=4096, largest=(size * 4096,), length=512)
    planned = place(replace(TABLES, hash=HASH), growth, ranks=size, tokens=4096).sent
    plan, loader = build_plan(HASH, vocabulary), Loader(split, batch_size=8, length=512, seed=7)
    of_rank = [
        hash_ngrams(plan, vocabulary(batch.tokens), segments=batch.segments)[0].unique().numpy()
        for batch in loader.first(size)
    ]
    sent = np.mean(run_ranks(processes, size, step_of_rank, of_rank, plan.num_rows, TABLES.form), axis=0)
    assert sent == pytest.approx([planned.ids, planned.rows, planned.grads, planned.counts], rel=0.05)
    hindsight = traffic(sum(map(len, of_rank)) / size, size, TABLES.form)
    assert sent == pytest.approx([hindsight.ids, hindsight.rows, hindsight.grads, hindsight.counts], rel=0.01)


# --- the command ----------------------------------------------------------------------------------------------------


def ask(*arguments: str) -> Plan:
    return tyro.cli(Plan, args=list(arguments), config=(tyro.conf.AvoidSubcommands,))


def shown(command: Plan) -> str:
    console = Console(width=240)
    with console.capture() as captured:
        assert command.run(console) == 0
    return captured.get()


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    said = shown(
        ask("tiny", "--data", SOURCE, "--ranks", "2", "64", "--tokens", "2048", "--length", "512", "--scale", "1", "10",
            "--simulate", "--json", str(out), "--machine.node", "2")
    )  # fmt: skip
    assert "tiny x 10" in said
    assert "tokens^" in said
    assert "~" in said  # 64 ranks read more than the text has
    assert said.count("hashed") == 2
    assert said.count("too short to hash") == 2
    written = json.loads(out.read_text())
    assert [column["plan"]["ranks"] for column in written["columns"]] == [2, 64, 2, 64]
    first = written["columns"][0]
    assert first["plan"]["distinct"] == pytest.approx(first["found"]["distinct"], rel=0.05)
    assert written["columns"][1]["found"] is None
    assert written["growth"]["draws"] == 8
    assert written["prices"]["dram"] == Prices().dram


def test_the_command_changes_tables() -> None:
    tables = ask("--rows", "1_000_000", "--dim", "64", "--encoding", "bf16", "--orders", "2", "3", "--heads", "4",
                 "--layers", "1", "--serving").tables()  # fmt: skip
    assert tables.name == "like deepseek-v41"
    assert (tables.hash.orders, tables.hash.heads, len(tables.hash.layers)) == ((2, 3), 4, 1)
    assert 990_000 < tables.num_rows <= 1_000_000
    assert tables.form == RowFormat(64, "bf16", trainable=False)
    assert ask("tiny").tables() == Tables.of("tiny", get_preset("tiny"))
    assert ask().tables() == V41


def test_the_command_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="no text would be read"):
        shown(ask("tiny", "--data", SOURCE, "--characters", "0"))
    with pytest.raises(ConfigError, match="has no memory"):
        shown(ask("dense-4b", "--data", SOURCE))


def test_only_the_first_characters_are_read() -> None:
    few = list(first_documents(SOURCE, 10_000))
    assert sum(len(document.text) for document in few) == 10_000
    assert few[0] == next(read_documents(SOURCE))
