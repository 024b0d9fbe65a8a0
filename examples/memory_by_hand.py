"""The memory without a model around it: address, fetch, fuse, and one training update, with every shape printed.

python examples/memory_by_hand.py
"""

import torch
import torch.nn.functional as F

from engram_lm.hashing import HashConfig, hash_ngrams
from engram_lm.memory import Engram, EngramConfig
from engram_lm.model.lookup import build_plan
from engram_lm.tables import HostTable, RowFormat, deduplicate, expand
from engram_lm.tokens import CanonicalVocabulary
from engram_lm.train.tokenizer import train_tokenizer

TEXT = "Only Alexander the Great could tame the horse Bucephalus. only alexander THE GREAT could tame the Horse."


def show(name: str, value: object) -> None:
    print(f"{name:<28}{list(value.shape) if isinstance(value, torch.Tensor) else value}")


torch.manual_seed(0)
tokenizer = train_tokenizer([TEXT] * 10, vocab_size=400)
tokens = torch.tensor([tokenizer.encode(TEXT).ids])
show("tokens [B, T]", tokens)

# Words that differ in case or in a leading space only are one word to the memory.
vocabulary = CanonicalVocabulary.from_tokenizer(tokenizer, cache=False)
canonical = vocabulary(tokens)
show("token ids", len(vocabulary.lookup))
show("canonical ids", vocabulary.size)

# Address: from tokens alone. One memory layer, 2-grams and 3-grams, four heads each: K = 8 rows a token.
config = HashConfig(orders=(2, 3), heads=4, rows_per_head=1000, layers=(1,), pad_id=0)
plan = build_plan(config, vocabulary)
ids, _ = hash_ngrams(plan, canonical)
show("rows of each head", plan.sizes[0].tolist())
show("ids [B, T, L, K]", ids)

# Fetch: each distinct row once, as a leaf that will receive the gradient.
table = HostTable(plan.num_rows, RowFormat(dim=16))
unique, inverse = deduplicate(ids)
leaf = table.fetch(unique).requires_grad_()
rows = expand(leaf, inverse)
show("reads", ids.numel())
show("distinct rows [U, d]", leaf)
show("rows [B, T, L, K, d]", rows)

# Fuse: a gate decides, position by position, how much of what was found enters the residual stream.
engram = Engram(EngramConfig(row_dim=16), dim=64, streams=1, rows_per_token=config.rows_per_token)
embedding, head = torch.randn(400, 64), torch.randn(400, 64) / 8
hidden = embedding[tokens][:, :, None]
delta, _ = engram(hidden, rows[:, :, 0])
show("hidden [B, T, M, D]", hidden)
show("delta [B, T, M, D]", delta)
show("largest |delta|", float(delta.detach().abs().max()))  # rows start at zero, so the memory is silent


def next_token_loss(rows: torch.Tensor) -> torch.Tensor:
    out = hidden + engram(hidden, rows[:, :, 0])[0]
    return F.cross_entropy(out[0, :-1, 0] @ head.T, tokens[0, 1:])


# Update: the gradient has the shape of the leaf, never that of the table. The last token's rows have nothing to predict.
before = next_token_loss(rows)
before.backward()
table.update(unique, leaf.grad, lr=0.3)
after = next_token_loss(table.fetch(ids))
show("gradient [U, d]", leaf.grad)
show("rows moved", f"{int(table.fetch(torch.arange(table.num_rows)).any(dim=1).sum())} of {table.num_rows}")
show("loss before, after", f"{before.item():.3f}, {after.item():.3f}")
