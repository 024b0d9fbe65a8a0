"""All probes together: plain values, on samples that are small beside an evaluation."""

import json
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console
from tokenizers import Tokenizer

from engram_lm import config
from engram_lm.analysis import probes
from engram_lm.analysis.gates import GateView
from engram_lm.analysis.knockout import knock_outs
from engram_lm.analysis.probes import compare_runs, evaluate_once, excerpt, probe
from engram_lm.cli.probe import Probe
from engram_lm.errors import DataError, MismatchError
from engram_lm.train.loader import Loader, windows
from engram_lm.train.loop import Training
from engram_lm.train.run import build_lookup, fit_vocabulary, load_run, prepare_text
from engram_lm.train.tokenizer import tokenizer_digest


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs on the same text, one of them without a memory."""
    directory = tmp_path_factory.mktemp("runs")
    data, tokenizer = prepare_text(
        str(tiny.write_texts(directory / "texts")), directory, vocab_size=300, held_out=0.3, say=lambda line: None
    )
    for name, model in ("base", tiny.BASE), ("engram", tiny.ENGRAM):
        settings = fit_vocabulary(tiny.config(model), tokenizer)
        (directory / name).mkdir()
        lookup = build_lookup(settings, tokenizer, directory / name)
        facts = {"tokenizer_digest": tokenizer_digest(tokenizer)}
        batches = Loader(data.train, settings.batch_size, settings.length, settings.seed)
        tiny.finish(Training(settings, directory / name, batches, lookup, facts=facts))
    return directory, data


def test_the_command_prints_and_writes_what_the_probes_find(runs, tmp_path):
    directory, _ = runs
    console = Console(record=True, width=160)
    out = tmp_path / "probes.json"
    command = Probe(directory / "engram", directory / "base", text="the quick brown fox", out=out, device="cpu")
    assert command.run(console) == 0
    printed, found = console.export_text(), json.loads(out.read_text(encoding="utf-8"))

    assert found.keys() == {"knockout", "gates", "usage", "gate_view", "seconds", "lens", "cka"}
    assert found["usage"]["tokens"] == 6 * 4 * 10  # all that the run has read: less than what is held out
    variants = found["knockout"]["variants"]
    for words in (*variants, f"{variants['no memory']['loss']:.4f}", "block 1, 3-grams", str(out.name)):
        assert words in printed
    view = config.from_dict(GateView, found["gate_view"])
    assert "".join(token.text for token in view.tokens) == "<|endoftext|>the quick brown fox"
    assert all(len(ngram.rows) == 2 and ngram.collides >= 0 for token in view.tokens for ngram in token.ngrams)
    assert {name: len(lens["kl"]) for name, lens in found["lens"].items()} == {
        str(directory / "engram"): 3,
        str(directory / "base"): 3,
    }
    assert len(found["cka"]["alignment"]) == 3


def test_seconds_are_of_the_parts_and_of_a_whole_evaluation(runs, monkeypatch):
    """A clock that ticks once a look: every part takes a second, and the sample's evaluation too."""
    directory, data = runs
    run = load_run(directory / "engram", "cpu")
    clock = count()
    monkeypatch.setattr(probes.time, "perf_counter", lambda: float(next(clock)))
    found = probe(
        run.model,
        run.lookup,
        data.val,
        Loader(data.train, run.config.batch_size, run.config.length, run.config.seed).first(2),
        run.tokenizer,
        batch_size=4,
        length=10,
        tokens=50,
    )
    everything = -(-(len(data.val.tokens) - 1) // 10)
    sampled = max(4, int(probes.SHARE / 2 * everything / len(knock_outs(run.model))))
    assert sampled < everything / 5
    evaluation = everything / sampled
    seconds = {"knockout": 1, "usage": 1, "gates": 1, "gate_view": 1, "evaluation": pytest.approx(evaluation)}
    assert found["seconds"] == {**seconds, "ratio": pytest.approx(4 / evaluation)}
    assert found["usage"]["tokens"] == 2 * 4 * 10  # the first batches that hold 50
    limited = sum(int((batch.targets >= 0).sum()) for batch in windows(data.val, 4, 10, sampled))
    assert found["knockout"]["tokens"] == limited
    assert found["gate_view"]["source"].startswith("from held-out document")


def test_an_excerpt_is_of_a_document_that_is_long_enough():
    split = tiny.split()
    lengths = np.diff(split.starts, append=len(split.tokens))
    wanted = int(np.sort(lengths)[-2])
    tokens, source = excerpt(split, wanted)
    document = int(source.split()[-3]) - 1
    assert len(tokens) == wanted <= lengths[document]
    assert tokens.tolist() == split.tokens[split.starts[document] :][:wanted].tolist()
    assert len(excerpt(split, 10**6)[0]) == lengths.max()


def test_models_that_cannot_be_probed_are_refused(runs):
    directory, data = runs
    base, run = load_run(directory / "base", "cpu"), load_run(directory / "engram", "cpu")
    options = {"batch_size": 4, "length": 10}
    with pytest.raises(MismatchError, match="no memory"):
        probe(base.model, base.lookup, data.val, [], base.tokenizer, **options)
    with pytest.raises(DataError, match="no training text"):
        probe(run.model, run.lookup, data.val, [], run.tokenizer, **options)
    other = Tokenizer.from_str(run.tokenizer.to_str())
    other.add_tokens(["another"])
    with pytest.raises(MismatchError, match="different tokenizers"):
        compare_runs(base, replace(run, tokenizer=other), data.val, ("base", "engram"))


def test_an_evaluation_is_the_sum_of_losses(runs):
    directory, data = runs
    run = load_run(directory / "engram", "cpu")
    batches = list(windows(data.val, 4, 10))
    with torch.no_grad():
        rows = [run.lookup.rows(batch.tokens, segments=batch.segments)[0] for batch in batches]
        means = [
            run.model.loss(b.tokens, b.targets, r, segments=b.segments) for b, r in zip(batches, rows, strict=True)
        ]
    nats = sum(float(mean) * int((batch.targets >= 0).sum()) for mean, batch in zip(means, batches, strict=True))
    assert evaluate_once(run.model, run.lookup, batches, run.device) == pytest.approx(nats, rel=1e-5)
