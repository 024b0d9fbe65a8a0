"""A cartridge of facts: each one is a subject, a few phrasings, and an answer.

    facts = read_facts("facts.jsonl")     # {"subject": "Marora Kolster", "prompts": ["{} was born in the city of"], "answer": "Oslo"}
    memory = attach(model, EngramConfig(row_dim=32, conv_kernel=0), tokenizer)
    teach(model, tokenizer, facts, RowwiseAdamW(model, lr=2e-3, table_lr=0.1))

Only n-grams that end inside the subject, from its second token on, learn. The words around it differ from phrasing to
phrasing: what is stored at them is lost in a new one (recall of unseen phrasings was 25 % with them and 68 % without), and
they are ordinary language, which would be changed wherever it occurs. When the facts are read nothing marks the subject
any more: the rows of all other n-grams are still zero, and add exactly nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from .attach import focused

# In front of a sentence every other time, so that a fact does not hang on being the first thing that is said.
CONTEXTS = (
    "It rained for most of the afternoon. ",
    "Here is something that I learned yesterday. ",
    "The following is well known. ",
    "Question: who is this about? Answer: ",
    "- ",
    "Note: ",
    "We talked about it over dinner. ",
    "According to the records, ",
)


@dataclass(frozen=True)
class Fact:
    """What is to be answered when a prompt about the subject ends. `prompts` have {} where the subject is named."""

    subject: str
    prompts: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        if not (self.subject.strip() and self.answer.strip() and self.prompts):
            raise DataError(f"{self} lacks a subject, a prompt or an answer: there would be nothing to learn.")
        for prompt in self.prompts:
            if prompt.count("{}") != 1:
                raise DataError(f"the prompt {prompt!r} must name its subject once, as {{}}.")


def read_facts(path: Path | str) -> list[Fact]:
    """Facts from JSON lines of `subject`, `prompts` and `answer`. Raises DataError with the number of a line that is none."""
    facts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            facts.append(Fact(str(found["subject"]), tuple(map(str, found["prompts"])), str(found["answer"])))
        except (json.JSONDecodeError, KeyError, TypeError, DataError) as error:
            raise DataError(f"{path}, line {number} is no fact with subject, prompts and answer: {error}") from None
    if not facts:
        raise DataError(f"{path} holds no facts.")
    return facts


class Sentence(NamedTuple):
    """A prompt and its answer as tokens."""

    tokens: list[int]
    answer: int  # how many of them, at the end, are the answer
    subject: range  # positions at which n-grams inside the subject end


def sentence(tokenizer: Any, fact: Fact, prompt: str, context: str = "") -> Sentence:
    """A fact in one phrasing, behind a context. Raises DataError for a subject of one token, which has no n-grams inside."""
    begin = len(context) + prompt.index("{}")
    end = begin + len(fact.subject)
    encoded = tokenizer(context + prompt.replace("{}", fact.subject), return_offsets_mapping=True)
    tokens = list(encoded["input_ids"])
    named = [n for n, (first, last) in enumerate(encoded["offset_mapping"]) if first < end and last > begin]
    if len(named) < 2:
        raise DataError(
            f"the subject {fact.subject!r} is a single token: no n-gram lies inside of it, and the memory could not tell it "
            "from its other uses. Name it in more words."
        )
    answer = tokenizer(" " + fact.answer, add_special_tokens=False)["input_ids"]
    return Sentence([*tokens, *answer], len(answer), range(named[1], named[-1] + 1))


class Batch(NamedTuple):
    """Sentences padded on the left, so that all answers end at the end."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, position_ids [B, T]
    subject: Tensor  # [B, T] bool
    targets: Tensor  # [B, A] the answers, -100 before shorter ones


def collate(sentences: Sequence[Sentence], pad: int, device: torch.device | str = "cpu") -> Batch:
    """One batch of sentences. The last token of an answer is predicted, not read."""
    length, answers = max(len(s.tokens) for s in sentences) - 1, max(s.answer for s in sentences)
    ids = torch.full((len(sentences), length), pad)
    mask, subject = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    targets = torch.full((len(sentences), answers), -100)
    for row, (tokens, answer, span) in enumerate(sentences):
        start = length - len(tokens) + 1
        ids[row, start:] = torch.tensor(tokens[:-1])
        mask[row, start:] = 1
        subject[row, start + span.start : start + span.stop] = True
        targets[row, answers - answer :] = torch.tensor(tokens[-answer:])
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    return Batch({name: part.to(device) for name, part in inputs.items()}, subject.to(device), targets.to(device))


def answer_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[B, A, V]: what the model says where the answers are due."""
    length, answers = batch.inputs["input_ids"].shape[1], batch.targets.shape[1]
    last = torch.arange(
        length - answers, length, device=batch.targets.device
    )  # indices, since the head is slow on a slice
    return model(**batch.inputs, use_cache=False, logits_to_keep=last).logits


def teach(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int = 10,
    batch_size: int = 48,
    contexts: Sequence[str] = CONTEXTS,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> None:
    """Train whatever `optimizer` holds until the model says the facts' answers.

    Every fact is shown in each of its prompts once an epoch, behind a random context every other time. Learning rates rise over
    the first twentieth of the steps and fall in a straight line over the last third. on_step: told the step, all steps, loss.

    Memories act at the subject's n-grams alone; adapters of any kind, which know no n-grams, everywhere.
    """
    rng, pad = random.Random(seed), _pad(tokenizer)
    shown = [(fact, prompt) for fact in facts for prompt in fact.prompts]
    steps = epochs * -(-len(shown) // batch_size)
    course = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.05 * steps + 1), (steps - step) / (0.33 * steps + 1))
    )
    device, step = next(model.parameters()).device, 0
    was_training = model.training
    model.train()
    for _ in range(epochs):
        rng.shuffle(shown)
        for first in range(0, len(shown), batch_size):
            some = [
                sentence(tokenizer, fact, prompt, rng.choice(contexts) if contexts and rng.random() < 0.5 else "")
                for fact, prompt in shown[first : first + batch_size]
            ]
            batch = collate(some, pad, device)
            with focused(model, batch.subject):
                logits = answer_logits(model, batch)
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            course.step()
            step += 1
            on_step(step, steps, loss.item())
    model.train(was_training)


@torch.no_grad()
def recall(model: nn.Module, tokenizer: Any, facts: Sequence[Fact], *, batch_size: int = 64) -> list[bool]:
    """For each prompt of each fact, in order: whether the whole answer is what the model would say (greedy)."""
    shown = [sentence(tokenizer, fact, prompt) for fact in facts for prompt in fact.prompts]
    order = sorted(range(len(shown)), key=lambda n: len(shown[n].tokens))
    known = [False] * len(shown)
    was_training = model.training
    model.eval()
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        batch = collate([shown[n] for n in some], _pad(tokenizer), next(model.parameters()).device)
        said = answer_logits(model, batch).argmax(-1)
        right = ((said == batch.targets) | (batch.targets == -100)).all(1)
        for n, hit in zip(some, right.tolist(), strict=True):
            known[n] = hit
    model.train(was_training)
    return known


def _pad(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)
