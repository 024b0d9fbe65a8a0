"""From a pretrained model and a text to a cartridge, beside controls that show what the memory does.

    results = retrofit(RetrofitConfig(model="...", data="texts/"), Path("runs/retrofit"))

Every arm starts from the same model and reads the same batches. OUT holds

    config.json  shards/             what was asked for; the text's tokens
    arms/NAME/seed-S/                metrics.jsonl; what was learned; result.json, last, when the arm is finished
    cartridge/                       the memory, ready to be mounted
    results.json                     everything that was measured
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from .. import config as configs
from ..errors import CheckpointError, MismatchError, TrainingError
from ..hashing import hash_ngrams
from ..memory import Engram
from ..model.lookup import build_plan
from ..tokens import CanonicalVocabulary
from ..train import checkpoint as checkpoints
from ..train.loader import IGNORED, Batch, Loader, LoaderState, windows
from ..train.loop import Metrics, differences, interruptible, on, progress_bar
from ..train.optim import OptimConfig, schedule
from ..train.shards import Split, TokenData, open_shards, split_in_memory, write_shards
from ..train.sources import read_documents
from ..train.tokenizer import tokenizer_digest
from .arms import Arm, addresses, engram_config, matched_rank, require_peft
from .base import Base, DocumentLosses, load_base, measure
from .config import DESCRIPTIONS, RetrofitConfig
from .decoder import find_decoder
from .summary import environment, summarise

COURSE = OptimConfig(warmup=0.05, decay=0.4, final=0.05)  # of every learning rate
CLIP = 1.0  # largest norm of all gradients of parameters together
EXAMPLES, PROMPT, CONTINUATION = 3, 32, 48  # held-out beginnings that every arm continues; tokens

Say = Callable[[str], None]


@dataclass(frozen=True)
class Text:
    """What is read: the domain's shards, and text outside the domain."""

    domain: TokenData
    outside: Split | None
    loaders: dict[int, Loader]  # by seed
    steps: int


class Stopped(Exception):
    """The user asked to stop."""


def retrofit(
    config: RetrofitConfig, out: Path, *, resume: bool = False, command: str = "", say: Say = print
) -> dict[str, Any] | None:
    """Train and measure every arm in `out`; returns what results.json holds, or None after Ctrl-C.

    resume: go on with what is in `out`: finished arms are kept, an arm that was interrupted begins again; more arms and
    seeds may be asked for than before. command: for the record.

    Raises CheckpointError when `out` holds a run and `resume` is not set, MismatchError when it is another one, DataError for
    a model or text that cannot be read, ConfigError for a model that is not decoder-only or a missing package, and
    TrainingError for a loss that is not finite.
    """
    if any(map(config.adapts, config.arms)):
        require_peft()
    with checkpoints.claim(out):
        begun = _require_room(config, out, resume)
        say(f"Loading {config.model}")
        base = load_base(config)
        text = _prepare(config, base, out, begun, say)
        checkpoints.write_whole(out / "config.json", configs.to_json(config))
        run = Runner(config, out, base, text, say)
        try:
            with interruptible() as stopped, progress_bar() as progress:
                run.all(stopped, progress)
        except Stopped:
            say(f"Stopped; finished arms are kept. The same command with --resume goes on in {out}.")
            return None
        results = run.results(command)
        checkpoints.write_whole(out / "results.json", json.dumps(results, indent=1))
        return results


def _require_room(config: RetrofitConfig, out: Path, resume: bool) -> bool:
    """Whether `out` holds a run to go on with. Raises when it holds one that must not be touched."""
    if not (out / "config.json").exists():
        return False
    if not resume:
        raise CheckpointError(
            f"{out} already holds a retrofit, which would be overwritten. Add --resume to go on with it, or choose another "
            "directory with --out."
        )
    before = configs.load(RetrofitConfig, out / "config.json")
    same = replace(before, arms=config.arms, seeds=config.seeds)
    changed = [
        f"{key}: {old!r} then, {new!r} now"
        for key, old, new in differences(configs.to_dict(same), configs.to_dict(config))
    ]
    if before.seeds[0] != config.seeds[0]:
        changed.append(f"first seed: {before.seeds[0]} then, {config.seeds[0]} now")
    if any(map(before.trains_base, before.arms)) != any(map(config.trains_base, config.arms)):
        changed.append("whether weights of the base train, and so its precision")
    if changed:
        raise MismatchError(f"{out} holds another retrofit ({'; '.join(changed)}): its arms could not be compared.")
    return True


def _prepare(config: RetrofitConfig, base: Base, out: Path, begun: bool, say: Say) -> Text:
    """Shards of the domain in `out`, the outside text in memory."""
    tokenizer, directory = base.text_tokenizer, out / "shards"
    if begun:
        domain = open_shards(directory, tokenizer_digest(tokenizer))
    else:
        say(f"Tokenizing {config.data}")
        documents = read_documents(config.data)
        domain = write_shards(documents, tokenizer, directory, source=config.data, held_out=config.held_out)
    outside = split_in_memory(read_documents(config.outside), tokenizer) if config.outside else None
    loaders = {seed: Loader(domain.train, config.batch_size, config.length, seed) for seed in config.seeds}
    batch = config.batch_size * config.length
    epoch = loaders[config.seeds[0]].num_windows * config.length
    steps = math.ceil((config.tokens or config.epochs * epoch) / batch)
    say(
        f"{len(domain.train.tokens):,} tokens in {len(domain.train.starts):,} documents to train on, {len(domain.val.tokens):,} "
        f"in {len(domain.val.starts):,} held out; {steps:,} steps of {batch:,} tokens"
    )
    return Text(domain, outside, loaders, steps)


class Runner:
    """The arms of one retrofit, one after another."""

    def __init__(self, config: RetrofitConfig, out: Path, base: Base, text: Text, say: Say) -> None:
        self.config, self.out, self.base, self.text, self.say = config, out, base, text, say
        self.reference = self._logits_to_compare()

    def all(self, stopped: Callable[[], bool], progress: Progress) -> None:
        """Measure the base, then train and measure each arm once a seed; what is finished is kept."""
        self.stopped, self.progress = stopped, progress
        self._once("base", 0, lambda directory: self._measured("base"))
        for seed in self.config.seeds:
            for name in self.config.arms:
                self._once(name, seed, partial(self._arm, name, seed))

    def results(self, command: str) -> dict[str, Any]:
        """What was measured, of all arms."""
        base = self._result("base", 0)
        runs = [self._result(name, seed) for name in self.config.arms for seed in self.config.seeds]
        model, domain = self.base.model, self.text.domain
        return {
            "command": command,
            "config": configs.to_dict(self.config),
            "descriptions": DESCRIPTIONS,
            "environment": environment(self.base.device),
            "model": {
                "name": self.config.model,
                "class": type(model).__name__,
                "fingerprint": self.base.fingerprint,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            },
            "data": {
                "train": {"documents": len(domain.train.starts), "tokens": len(domain.train.tokens)},
                "held_out": {"documents": len(domain.val.starts), "tokens": len(domain.val.tokens)},
                "checksum": domain.meta.train.tokens_crc32,
                "steps": self.text.steps,
                "bits_per_nat_and_token": domain.val.tokens_per_byte / math.log(2),
            },
            "lora": self._rank_facts() if any(map(self.config.adapts, self.config.arms)) else None,
            "base": base,
            "runs": runs,
            "arms": summarise(base, runs),
        }

    # --- one arm ----------------------------------------------------------------------------------------------------

    def _directory(self, name: str, seed: int) -> Path:
        return self.out / "arms" / name / f"seed-{seed}"

    def _result(self, name: str, seed: int) -> dict[str, Any]:
        return json.loads((self._directory(name, seed) / "result.json").read_text(encoding="utf-8"))

    def _once(self, name: str, seed: int, run: Callable[[Path], dict[str, Any]]) -> None:
        """Run unless it is finished; its result is written last, and what an interrupted one left is removed."""
        directory = self._directory(name, seed)
        if (directory / "result.json").exists():
            if self._result(name, seed)["model"] != self.base.fingerprint:
                raise MismatchError(f"{directory} was trained on another model than {self.config.model} is now.")
            return
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        began = time.perf_counter()
        result = {"arm": name, "seed": seed, "model": self.base.fingerprint, **run(directory)}
        result["wall_seconds"] = time.perf_counter() - began
        checkpoints.write_whole(directory / "result.json", json.dumps(result))

    def _arm(self, name: str, seed: int, directory: Path) -> dict[str, Any]:
        """Train an arm, measure it with and without what it learned, save that, take it off."""
        rank = self._rank_facts()["rank"] if self.config.adapts(name) else 0
        arm = Arm(name, self.base, self.config, seed=seed, rank=rank, directory=directory)
        try:
            trained = self._train(arm, seed, directory)
            measured = self._measured(f"{name} {seed}" if len(self.config.seeds) > 1 else name)
            off = None if arm.trains_base else self._compare(arm)
            arm.save(directory, self._cartridge(name, seed, directory))
        except BaseException:
            arm.remove()
            raise
        arm.remove(directory)
        if arm.trains_base:  # the next arm starts from the pretrained weights again
            self.base = load_base(self.config)
        return {**trained, **measured, "off": off}

    def _cartridge(self, name: str, seed: int, directory: Path) -> Path:
        """The first seed's memory alone is what a retrofit is for; others stay with their arms."""
        first = name == "engram" and seed == self.config.seeds[0]
        target = self.out / "cartridge" if first else directory / "cartridge"
        shutil.rmtree(target, ignore_errors=True)  # of an interrupted start
        return target

    def _train(self, arm: Arm, seed: int, directory: Path) -> dict[str, Any]:
        """Take all steps; sizes, rates and speed."""
        config, steps, loader = self.config, self.text.steps, self.text.loaders[seed]
        optimizers, parts = arm.optimizers(), arm.parts()
        course = [
            torch.optim.lr_scheduler.LambdaLR(one, lambda step: schedule(COURSE, step, steps)) for one in optimizers
        ]
        parameters = [parameter for part, _ in parts.values() for parameter in part]
        due = set(np.linspace(0, steps, config.evaluations + 1).round().astype(int).tolist()[1:])
        metrics, state, size = Metrics(directory / "metrics.jsonl", 0), LoaderState(), config.batch_size * config.length
        task = self.progress.add_task(arm.name, total=steps, loss=math.nan, speed=0.0)
        metrics.add(step=0, tokens=0, val_loss=self._quick_loss())
        for step in range(1, steps + 1):
            began = time.perf_counter()
            batch, state = loader.next(state)
            loss = self._step(on(batch, self.base.device), optimizers, parameters, f"{arm.name}, step {step}")
            for one in course:
                one.step()
            seconds = time.perf_counter() - began
            metrics.add(step=step, tokens=step * size, loss=loss, seconds=seconds)
            if step in due:
                metrics.add(step=step, tokens=step * size, val_loss=self._quick_loss())
            self.progress.update(task, completed=step, loss=loss, speed=size / seconds)
            self._stop_if_asked()
        self.progress.remove_task(task)
        seconds = float(np.median([line["seconds"] for line in metrics.lines if "seconds" in line]))
        rows = self._rows_read(arm.name, seed) if arm.memory is not None and arm.memory.train_rows else 0
        rates = {part: lr for part, (_, lr) in parts.items()} | ({"rows": config.table_lr} if rows else {})
        counts = {part: sum(p.numel() for p in members) for part, (members, _) in parts.items()}
        return {
            "steps": steps,
            "tokens": steps * size,
            "tokens_per_second": size / seconds,
            "rates": rates,
            "parameters": counts | ({"rows": rows * config.row_dim} if rows else {}),
            "table_rows": arm.memory.lookup.table.num_rows if arm.memory is not None else 0,
            "rows_read": rows,
        }

    def _step(
        self, batch: Batch, optimizers: list[torch.optim.Optimizer], parameters: list[torch.nn.Parameter], where: str
    ) -> float:
        """One update; nats a token. Raises TrainingError for a loss that is not finite."""
        self.base.model.train()
        loss = self.base.losses(batch).sum() / (batch.targets != IGNORED).sum().clamp_min(1)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"{where}: the loss is {value}; nothing was saved of this arm. Lower its rate.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return value

    # --- measuring --------------------------------------------------------------------------------------------------

    def _measured(self, label: str) -> dict[str, Any]:
        """Loss by document inside and outside the domain, and continuations of held-out beginnings."""
        with self._bar(label) as tick:
            held_out = self._losses(self.text.domain.val, self.config.eval_tokens, tick)
            outside = self._losses(self.text.outside, self.config.eval_tokens, tick) if self.text.outside else None
        return {
            "held_out": held_out.json(),
            "outside": outside.json() if outside else None,
            "examples": self._examples(),
        }

    def _losses(self, split: Split, tokens: int, tick: Callable[[float], None] = lambda _: None) -> DocumentLosses:
        """Losses of evenly spread windows with so many tokens in all; 0 for all of them."""
        limit = max(1, tokens // self.config.length) if tokens else None
        batches = windows(split, self.config.batch_size, self.config.length, limit)
        return measure(self.base, batches, len(split.starts), tick)

    def _quick_loss(self) -> float:
        """A point of the validation curve."""
        held_out = self.text.domain.val
        return self._losses(held_out, (self.config.eval_tokens or len(held_out.tokens)) // 8 or 1).mean

    @contextmanager
    def _bar(self, label: str) -> Iterator[Callable[[float], None]]:
        """Progress over evaluation batches."""
        task = self.progress.add_task(f"{label}, measured", total=None, loss=math.nan, speed=0.0)

        def tick(loss: float) -> None:
            self.progress.update(task, advance=1, loss=loss)
            self._stop_if_asked()

        yield tick
        self.progress.remove_task(task)

    def _stop_if_asked(self) -> None:
        if self.stopped():
            raise Stopped

    @torch.no_grad()
    def _logits_to_compare(self) -> Tensor:
        """Of the first held-out window, as the model gives them now."""
        self.base.model.eval()
        batch = next(windows(self.text.domain.val, 1, self.config.length, 1))
        return self.base.logits(on(batch, self.base.device)).cpu()

    def _compare(self, arm: Arm) -> dict[str, Any]:
        """Whether the model without what the arm added is the base, bit for bit."""
        on_ = self._logits_to_compare()
        with arm.off():
            off = self._logits_to_compare()
        return {
            "equal": torch.equal(off, self.reference),
            "logits": off.numel(),
            "largest_difference": float((off.float() - self.reference.float()).abs().max()),
            "largest_difference_on": float((on_.float() - self.reference.float()).abs().max()),
        }

    @torch.no_grad()
    def _examples(self) -> list[dict[str, str]]:
        """Beginnings of some held-out documents, how they go on, and what the model writes, taking the likeliest tokens."""
        self.base.model.eval()
        val, decode = self.text.domain.val, self.base.tokenizer.decode
        examples = []
        for document in np.unique(np.linspace(0, len(val.starts) - 1, EXAMPLES).astype(int)):
            end = len(val.tokens) if document + 1 == len(val.starts) else int(val.starts[document + 1])
            tokens = val.tokens[val.starts[document] : end][: PROMPT + CONTINUATION].astype(np.int64)
            prompt = torch.from_numpy(tokens[:PROMPT])[None].to(self.base.device)
            written = self.base.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=CONTINUATION,
                do_sample=False,
                use_cache=True,
                pad_token_id=int(tokens[0]),
            )[0, prompt.shape[1] :]
            examples.append(
                {
                    "prompt": decode(tokens[1:PROMPT].tolist()),
                    "text": decode(tokens[PROMPT:].tolist()),
                    "written": decode(written.tolist()),
                }
            )
        return examples

    # --- equal budgets ----------------------------------------------------------------------------------------------

    def _rank_facts(self) -> dict[str, Any]:
        """The adapters' rank and what decides it: the memory's trained parameters with the first seed's batches."""
        if not hasattr(self, "_rank"):
            hash, seed = addresses(self.config, self.base), self.config.seeds[0]
            with torch.device("meta"):
                dim, width = find_decoder(self.base.model).dim, hash.rows_per_token
                one = Engram(engram_config(self.config), dim=dim, rows_per_token=width)
            dense = len(hash.layers) * sum(parameter.numel() for parameter in one.parameters())
            wanted = dense + self._rows_read("engram", seed) * self.config.row_dim
            rank, each, largest = matched_rank(self.base.model, wanted)
            rank = self.config.lora_rank or rank
            self._rank = {
                "rank": rank,
                "parameters": rank * each,
                "memory_parameters": wanted,
                "largest_rank": largest,
                "given": bool(self.config.lora_rank),
            }
        return self._rank

    def _rows_read(self, name: str, seed: int) -> int:
        """Distinct rows that an arm's training reads: those that it can change."""
        vocabulary = CanonicalVocabulary.from_tokenizer(self.base.tokenizer)
        plan = build_plan(addresses(self.config, self.base, name), vocabulary)
        read, state = np.zeros(plan.num_rows, dtype=bool), LoaderState()
        for _ in range(self.text.steps):
            batch, state = self.text.loaders[seed].next(state)
            read[hash_ngrams(plan, vocabulary(batch.tokens), segments=batch.segments)[0].numpy()] = True
        return int(read.sum())
