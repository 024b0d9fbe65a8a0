"""CKA is 0 for what is independent, 1 for what is equal up to rotation and scale, and refuses what it cannot estimate."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.analysis.cka import CKA, cka, compare_models, gram, hsic1, jackknife, soft_alignment
from engram_lm.analysis.hidden import hidden_states
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.train.loader import windows


def gaussians(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_hsic(k, l):
    """The U-statistic: a mean over all ordered quadruples of different samples."""
    i, j, q, r = np.array(list(itertools.permutations(range(len(k)), 4))).T
    k, l = k.numpy(), l.numpy()
    return np.mean(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]))


def biased_cka(x, y):
    """Of one minibatch, by the centred Gram matrices."""
    k, l = gram(x[None])[0], gram(y[None])[0]
    return float((k * l).sum() / (k.norm() * l.norm()))


def test_hsic1_is_the_mean_over_quadruples():
    x, y = gaussians(2, 7, 3), gaussians(3, 7, 5, seed=1)
    k, l = x @ x.mT + 3, y @ y.mT
    expected = [[slow_hsic(a, b) for b in l] for a in k]
    np.testing.assert_allclose(hsic1(k, l), expected, rtol=1e-9, atol=1e-9)


def test_independent_gaussians_are_not_alike():
    batches = [(gaussians(32, 64, seed=2 * i), gaussians(32, 64, seed=2 * i + 1)) for i in range(100)]
    assert abs(cka(batches)) < 0.01
    assert np.mean([biased_cka(*batch) for batch in batches]) == pytest.approx(0.667, abs=0.01)  # why it is not used


def test_the_same_is_1():
    batches = [(x, x) for x in (gaussians(32, 64, seed=i) for i in range(5))]
    assert cka(batches) == pytest.approx(1, abs=1e-12)
    assert cka(batches[:1]) == pytest.approx(1, abs=1e-12)


@settings(max_examples=12, deadline=None)
@given(st.integers(4, 12), st.integers(1, 9), st.integers(0, 99), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_rotation_scale_and_shift_do_not_matter(n, d, seed, scale, shift):
    x, y = gaussians(2, 3, n, d, seed=seed)
    x = torch.cat([x, x[:, :, :1] * 3], 2)  # [3, n, d + 1]
    found = CKA.of((part[None], other[None]) for part, other in zip(x, x[..., :d] + y, strict=True)).matrix()
    rotation = torch.linalg.qr(gaussians(d + 1, d + 1, seed=seed + 1)).Q
    moved = ((part @ rotation) * scale + shift for part in x)
    again = CKA.of((part[None], other[None]) for part, other in zip(moved, x[..., :d] + y, strict=True)).matrix()
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_means_come_before_the_ratio_and_all_pairs_at_once():
    batches = [(gaussians(2, n, 5, seed=n), gaussians(3, n, 4, seed=n + 50)) for n in (6, 8, 9)]
    grams = [(gram(x), gram(y)) for x, y in batches]
    found = CKA.of(batches)

    def expected(chosen):
        mean = lambda pairs: np.mean([slow_hsic(a, b) for a, b in pairs])  # noqa: E731
        return [
            [
                mean((k[a], l[b]) for k, l in chosen)
                / np.sqrt(mean((k[a], k[a]) for k, _ in chosen) * mean((l[b], l[b]) for _, l in chosen))
                for b in range(3)
            ]
            for a in range(2)
        ]

    np.testing.assert_allclose(found.matrix(), expected(grams), rtol=1e-8)
    np.testing.assert_allclose(found.without_each()[1], expected([grams[0], grams[2]]), rtol=1e-8)


def test_the_jackknife_tells_how_far_another_sample_lies():
    found = []
    for seed in range(60):
        x, noise = gaussians(2, 12, 10, 6, seed=seed)
        found.append(CKA.of(zip(x[:, None], (x + noise)[:, None], strict=True)))
    spread = torch.stack([each.matrix() for each in found]).std(0)
    claimed = torch.stack([jackknife(each.without_each()) for each in found]).mean(0)
    torch.testing.assert_close(claimed, spread, rtol=0.25, atol=0)


def test_autocast_does_not_round_it():
    batches = [(gaussians(8, 5).float(), gaussians(8, 5, seed=1).float())]
    expected = cka(batches)
    with torch.autocast("cpu", torch.bfloat16):
        assert cka(batches) == expected


def test_far_from_the_origin_digits_are_kept():
    x, y = gaussians(16, 8), gaussians(16, 8, seed=1)
    y = x + 0.3 * y
    assert cka([(x + 1e7, y - 1e7)]) == pytest.approx(cka([(x, y)]), abs=1e-6)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_too_few_samples_are_refused(n):
    with pytest.raises(DataError, match=rf"at least 4 samples, got {n}.*infinite or not a number"):
        cka([(gaussians(n, 3), gaussians(n, 3, seed=1))])


def test_what_has_no_value_is_refused():
    constant = torch.full((8, 3), 0.7)
    with pytest.raises(DataError, match="does not vary"):
        cka([(constant, gaussians(8, 3))])
    with pytest.raises(DataError, match="no minibatch"):
        cka([])
    with pytest.raises(MismatchError, match="8 samples on one side and 9"):
        cka([(gaussians(8, 3), gaussians(9, 3))])


def test_soft_alignment():
    similarity = torch.tensor([[0.9, 0.1, 0.3], [-0.2, 0.5, 0.5], [-0.1, -0.2, float("nan")]])
    two = soft_alignment(similarity, 2)
    assert two.tolist() == pytest.approx([0.3 * 2 / 1.2, 1.5, float("nan")], nan_ok=True)
    assert soft_alignment(similarity[:1], 1).tolist() == [0]
    assert soft_alignment(torch.stack([similarity, similarity]), 3).shape == (2, 3)
    for k in (0, 4):
        with pytest.raises(ConfigError, match=f"k = {k}"):
            soft_alignment(similarity, k)


# --- two models -----------------------------------------------------------------------------------------------


def batches():
    return list(windows(tiny.split(), 3, 11))


def deep(layers):
    return replace(tiny.BASE, layers=layers)


def test_a_model_is_like_itself():
    model, lookup = tiny.live(tiny.ENGRAM)
    found = compare_models(model, lookup, model, lookup, batches(), samples_per_batch=16)
    np.testing.assert_allclose(np.diag(found["cka"]), 1, atol=1e-6)
    np.testing.assert_allclose(np.diag(found["error"]), 0, atol=1e-6)
    np.testing.assert_allclose(found["cka"], np.transpose(found["cka"]), atol=1e-9)
    assert found["k"] == 1
    assert found["alignment"] == [0, 1, 2]
    assert found["alignment_error"] == [0, 0, 0]


def test_two_models_on_the_same_tokens():
    (a, lookup_a), (b, lookup_b) = tiny.live(tiny.EVERYTHING), tiny.live(deep(3), seed=1)
    everything = [(batch.targets >= 0).flatten() for batch in batches()]
    size = int(max(map(sum, everything)))
    full = [(batch, mask) for batch, mask in zip(batches(), everything, strict=True) if mask.sum() == size][:1]
    found = compare_models(a, lookup_a, b, lookup_b, [full[0][0]], samples_per_batch=size)
    states = []
    for model, lookup in ((a, lookup_a), (b, lookup_b)):
        seen = hidden_states(model, lookup, full[0][0].tokens, full[0][0].segments)
        states.append([h.flatten(0, 1)[full[0][1]] for h in seen])
    np.testing.assert_allclose(found["cka"], [[cka([(x, y)]) for y in states[1]] for x in states[0]], rtol=1e-6)
    assert (np.shape(found["cka"]), len(found["alignment"])) == ((3, 4), 3)
    assert (found["samples"], found["minibatches"]) == (size, 1)
    assert found["error"] == [[None] * 4] * 3
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_positions_of_few_batches_wait_for_more():
    model, lookup = tiny.live(tiny.ENGRAM)

    def first_three(batch):
        mask = torch.zeros_like(batch.targets, dtype=torch.bool)
        mask[0, :3] = True
        return mask

    given = batches()[:5]
    found = compare_models(model, lookup, *tiny.live(deep(2)), given, samples_per_batch=5, positions=first_three)
    assert (found["samples"], found["minibatches"]) == (5, 3)
    with pytest.raises(DataError, match="15 positions to compare, fewer than the 16"):
        compare_models(model, lookup, model, lookup, given, samples_per_batch=16, positions=first_three)
    with pytest.raises(DataError, match="0 positions"):
        compare_models(model, lookup, model, lookup, [])
    with pytest.raises(MismatchError, match=r"positions gave \[11\] for tokens \[3, 11\]"):
        compare_models(model, lookup, model, lookup, given, positions=lambda batch: batch.targets[0] >= 0)


def test_the_seed_decides_the_positions():
    pair = (*tiny.live(tiny.ENGRAM), *tiny.live(deep(2)))
    one, same, other = (compare_models(*pair, batches(), samples_per_batch=8, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one["cka"] != other["cka"]
    assert one["minibatches"] == len([batch for batch in batches() if (batch.targets >= 0).sum() >= 8])


def test_a_layer_that_does_not_vary_has_no_value():
    model, lookup = tiny.live(tiny.ENGRAM)
    token = int(torch.cat([batch.tokens.flatten() for batch in batches()]).bincount()[1:].argmax()) + 1
    found = compare_models(
        model,
        lookup,
        *tiny.live(deep(2)),
        batches(),
        samples_per_batch=6,
        positions=lambda batch: batch.tokens == token,
    )
    assert found["cka"][0] == [None] * 3  # the embedding of one token
    assert [row[0] for row in found["cka"]] == [None] * 3
    assert all(value is not None for row in found["cka"][1:] for value in row[1:])
    assert found["alignment"][0] is None


def test_models_that_cannot_be_compared():
    model, lookup = tiny.live(tiny.ENGRAM)
    larger = tiny.live(replace(tiny.BASE, vocab_size=50))
    with pytest.raises(MismatchError, match="48 and 50 tokens: the same id would mean another token"):
        compare_models(model, lookup, *larger, batches())
    with pytest.raises(ConfigError, match="samples_per_batch = 3"):
        compare_models(model, lookup, model, lookup, batches(), samples_per_batch=3)
    for k in (0, 4):
        with pytest.raises(ConfigError, match=f"k = {k}"):
            compare_models(model, lookup, model, lookup, batches(), samples_per_batch=8, k=k)


@pytest.mark.parametrize(("layers", "k"), [(2, 1), (9, 2), (40, 5)])
def test_alignment_takes_a_sixth_of_the_layers(layers, k):
    small = replace(deep(layers), dim=8, ffn_width=8)
    model, _ = tiny.live(small)
    assert compare_models(*tiny.live(tiny.BASE), model, None, batches()[:1], samples_per_batch=8)["k"] == k
