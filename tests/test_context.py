"""A sequence divided over ranks: losses and every gradient are those of one process that holds all of it."""

import statistics
from dataclasses import replace
from functools import cache, partial
from multiprocessing.context import ForkServerContext
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from tiny import BASE, ENGRAM, EVERYTHING, HASH, MODELS, live, lookup_of, text
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engram_lm.errors import MismatchError
from engram_lm.memory import EngramConfig
from engram_lm.model import LanguageModel, MemoryConfig
from engram_lm.train.context import ContextRanks, chunk_ids
from engram_lm.train.precision import Precision, autocast

V41 = MemoryConfig(HASH, EngramConfig(row_dim=4, gate="copysign_sqrt", conv_kernel=0))
LAYOUTS = {
    **MODELS,  # the convolution sees 9 positions of the past
    "no convolution": replace(EVERYTHING, memory=V41),
    "gqa, streams": replace(ENGRAM, streams=4, tie_embeddings=True),
    "mla, dense": replace(EVERYTHING, moe=None, streams=1),
}


class Case(NamedTuple):
    """Two sequences, which any of 1, 2, 3 or 4 ranks can share."""

    length: int
    seed: int = 0
    segments: Tensor | None = None  # [2, length]
    silenced: bool = False  # the memory, at some positions


def documents(length: int, seed: int) -> Tensor:
    """Segments that end anywhere; a number may come back."""
    ends = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.2
    return (ends.cumsum(1) % 3).int()


CASES = [
    Case(12),  # chunks of 3, 4 or 6 positions: shorter than what the convolution sees
    Case(12, 1, documents(12, 1), silenced=True),
    Case(12, 2, torch.tensor([[1] * 12, [1] * 11 + [2]])),  # only the last rank sees a document end
    Case(48, 3),
    Case(48, 4, documents(48, 4)),
    Case(48, 5, torch.ones(2, 48, dtype=torch.int32), silenced=True),
]


class Job(NamedTuple):
    """What is computed, and how."""

    layout: str
    case: int
    dtype: torch.dtype = torch.float64
    precision: Precision = "float32"
    recompute: bool = False  # run blocks again in backward, rather than keep what they need there


class Result(NamedTuple):
    """What came of a job, in one process or on one rank."""

    losses: Tensor  # [2, t]
    gradients: dict[str, Tensor]  # of parameters
    rows: Tensor | None  # [2, t, L, K, d]: gradient of the rows read


@cache
def compute(job: Job, ranks: ContextRanks | None = None) -> Result:
    """Forward and backward through a rank's chunk of the sequences, or through all of them in one process."""
    case = CASES[job.case]
    model, lookup = live(LAYOUTS[job.layout], case.seed)
    model.to(job.dtype).train()
    model.neighbours = ranks
    for block in model.blocks if job.recompute else ():
        block.checkpoint = partial(checkpoint, use_reentrant=False)
    first, last = 0, case.length
    if ranks:
        first, last = (case.length * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    here = slice(first, last)

    tokens = text(case.length, 2, case.seed)
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    segments = None if case.segments is None else case.segments[:, here]
    keep = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(case.seed)) > 0.3
    rows = None
    if lookup:
        ids = chunk_ids(lookup, tokens, case.segments, first, last)
        rows = lookup.table.fetch(ids).to(job.dtype).requires_grad_()
    with autocast(job.precision, torch.device("cpu")):
        hidden, _ = model(tokens[:, here], rows, segments=segments, keep=keep[:, here] if case.silenced else None)
        logits = model.logits(hidden).to(job.dtype).mT
        losses = F.cross_entropy(logits, targets[:, here], ignore_index=-100, reduction="none")
    losses.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Result(losses.detach(), gradients, None if rows is None else rows.grad)


def this_group(groups: int) -> ContextRanks:
    """The default group's ranks in `groups` groups of neighbours, and this one's place."""
    size = dist.get_world_size() // groups
    members = [dist.new_group(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    group, rank = divmod(dist.get_rank(), size)
    return ContextRanks(rank, size, members[group])


def compute_all(jobs: list[Job], groups: int) -> list[Result]:
    ranks = this_group(groups)
    return [compute(job, ranks) for job in jobs]


def divided(processes: ForkServerContext, world: int, jobs: list[Job], groups: int = 1) -> list[tuple[Result, ...]]:
    """For each job what each rank has of it; every group does all of them."""
    return list(zip(*run_ranks(processes, world, compute_all, jobs, groups), strict=True))


def joined(*parts: Result) -> dict[str, Tensor]:
    """Losses and gradients that ranks found together: those of parameters are summed, the others side by side."""
    losses, gradients, rows = zip(*parts, strict=True)
    assert all(of_rank.keys() == gradients[0].keys() for of_rank in gradients)
    found = {name: torch.stack([of_rank[name] for of_rank in gradients]).sum(0) for name in gradients[0]}
    return found | {"losses": torch.cat(losses, 1)} | ({} if rows[0] is None else {"rows": torch.cat(rows, 1)})


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() < 1e-11 * tensor.norm().clamp_min(1), f"{what}: {name}"


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all numbers together, as a fraction of the expected ones' norm."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name] - tensor).square().sum()) for name, tensor in expected.items())
    return (apart / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_chunks_together_are_the_whole(processes: ForkServerContext, world: int):
    jobs = [Job(layout, case) for layout in LAYOUTS for case in range(len(CASES))]
    for job, parts in zip(jobs, divided(processes, world, jobs), strict=True):
        assert_same(joined(*parts), joined(compute(job)), job)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 4])
def test_chunks_round_no_worse_than_the_whole(processes: ForkServerContext, world: int, precision: Precision):
    layouts = [name for name, model in LAYOUTS.items() if model.moe is None]  # rounding may choose other experts
    exact = [Job(layout, case) for layout in layouts for case in range(len(CASES))]
    jobs = [job._replace(dtype=torch.float32, precision=precision) for job in exact]
    ratios = []
    for truth, job, parts in zip(exact, jobs, divided(processes, world, jobs), strict=True):
        expected = joined(compute(truth))
        whole, chunks = distance(joined(compute(job)), expected), distance(joined(*parts), expected)
        assert chunks < 10 * whole, (
            f"{job}: {chunks} from the truth, one process {whole}"
        )  # some gates are at their edge
        ratios.append(chunks / whole)
    assert statistics.median(ratios) < 1.2


def test_groups_do_not_meddle_and_blocks_can_be_recomputed(processes: ForkServerContext):
    jobs = [Job("everything", case, recompute=True) for case in range(len(CASES))]
    for job, parts in zip(jobs, divided(processes, 4, jobs, groups=2), strict=True):
        for group in (parts[:2], parts[2:]):
            assert_same(joined(*group), joined(compute(job)), job)


LENGTHS, TAILS = (1, 2, 5), (0, 1, 3, 7, None)


def exchange() -> list[tuple[int, Tensor, Tensor]]:
    """Rank, what it gets, and its gradient when each rank wants its positions as often as its rank, counted from 1."""
    ranks, results = this_group(1), []
    for length in LENGTHS:
        for most in TAILS:
            x = numbered(length, ranks.size)[:, ranks.rank * length :][:, :length].requires_grad_()
            seen = ranks.with_past(x, most)
            (seen * (1 + ranks.rank)).sum().backward()
            results.append((ranks.rank, seen.detach(), x.grad))
    return results


def numbered(length: int, size: int) -> Tensor:
    """[2, size * length, 3]: every number is another."""
    return torch.arange(6.0 * size * length).view(2, size * length, 3)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_get_the_past_and_give_gradients_back(processes: ForkServerContext, world: int):
    settings = [(length, most) for length in LENGTHS for most in TAILS]
    for (length, most), of_ranks in zip(
        settings, zip(*run_ranks(processes, world, exchange), strict=True), strict=True
    ):
        whole = numbered(length, world)
        wanted = torch.zeros_like(whole)
        for rank, seen, _ in of_ranks:
            first = 0 if most is None else max(0, rank * length - most)
            assert torch.equal(seen, whole[:, first : (rank + 1) * length])
            wanted[:, first : (rank + 1) * length] += 1 + rank
        assert torch.equal(torch.cat([gradient for *_, gradient in of_ranks], dim=1), wanted)


@pytest.mark.parametrize("extra", [{"with_state": True}, {"padding": torch.zeros(1, 4, dtype=torch.bool)}])
def test_what_speaks_of_whole_texts_does_not_go_with_neighbours(extra: dict[str, Any]):
    model = LanguageModel.build(BASE)
    model.neighbours = ContextRanks()
    with pytest.raises(MismatchError, match="neighbours"):
        model(text(4), **extra)


@given(
    orders=st.sets(st.integers(1, 5), min_size=1),
    scheme=st.sampled_from(["engram", "ple"]),
    shuffled=st.booleans(),
    batch=st.integers(1, 3),
    ends=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ids_of_a_chunk_are_those_of_the_whole(
    orders: set[int], scheme: Any, shuffled: bool, batch: int, ends: tuple[int, int], packed: bool, seed: int
):
    config = replace(HASH, orders=tuple(sorted(orders)), scheme=scheme)
    lookup = lookup_of(replace(ENGRAM, memory=MemoryConfig(config, EngramConfig(row_dim=4))))
    assert lookup
    lookup = replace(lookup, shuffled=shuffled)
    tokens = text(20, batch, seed) % 5  # the end of a text among them
    segments = torch.randint(0, 4, (batch, 20), generator=torch.Generator().manual_seed(seed)) if packed else None
    first, last = sorted(ends)
    whole, _ = lookup.ids(tokens, segments=segments)
    assert torch.equal(chunk_ids(lookup, tokens, segments, first, last), whole[:, first:last])
