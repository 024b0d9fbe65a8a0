"""Our own models as models of `transformers`: saved, loaded, generated from and trained like any other.

DIRECTORY/
  config.json              the model's configuration, how rows are encoded, the digest of their addresses
  model.safetensors        dense weights (several files if they are large)
  vocabulary.safetensors   canonical id of each token id: no tokenizer is needed to address the table
  table.safetensors        the rows; see tables/file.py

Importing this module registers the model with AutoConfig and AutoModelForCausalLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.hub import cached_file

from .. import config as configs
from ..errors import CheckpointError, ConfigError, MismatchError
from ..model.lm import LanguageModel, ModelConfig
from ..model.lookup import Lookup, address_digest, build_plan
from ..tables import Fetch, TableConfig, build_table
from ..tables.file import TableFile
from ..tokens import CanonicalVocabulary
from ..train.run import TrainedModel, load_run
from ..train.tokenizer import separator_id
from .cache import EngramCache
from .rows import TrainedRows
from .saved import save_table

VOCABULARY, TABLE = "vocabulary.safetensors", "table.safetensors"
ROW_FACTS = ("encoding", "std", "seed")  # of a TableConfig: what the rows are, wherever they live
LOSS_ARGUMENTS = {"num_items_in_batch", "shift_labels", "ignore_index"}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class EngramLMConfig(PreTrainedConfig):
    """A ModelConfig as `transformers` keeps configurations.

    model: the fields of ModelConfig as JSON values, checked strictly. rows: encoding, std and seed of a TableConfig; None
    without a memory. address_digest: of vocabulary and plan (Lookup.digest). use_cache: whether a forward outside of
    training returns a cache unless told otherwise.

    Raises ConfigError for an unknown key, a missing one or a value that cannot be meant.
    """

    model_type = "engram_lm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own form)

    model: dict[str, Any] | None = None
    rows: dict[str, Any] | None = None
    address_digest: str = ""
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.model is not None:  # transformers makes empty ones to know the defaults
            self.model = configs.to_dict(self.core)
            self.rows = {name: getattr(self.stored_rows, name) for name in ROW_FACTS} if self.core.memory else None

    @staticmethod
    def of(model: ModelConfig, table: TableConfig | None = None) -> EngramLMConfig:
        """The configuration of a model whose rows are as `table` says."""
        table = table or TableConfig()
        return EngramLMConfig(model=configs.to_dict(model), rows={name: getattr(table, name) for name in ROW_FACTS})

    @property
    def core(self) -> ModelConfig:
        """The model's configuration."""
        return configs.from_dict(ModelConfig, self.model, "config.model")

    @property
    def stored_rows(self) -> TableConfig:
        """What the rows are; where they live is said when the model is loaded."""
        return configs.from_dict(TableConfig, self.rows or {}, "config.rows")

    @property
    def vocab_size(self) -> int:
        """Token ids."""
        return self.core.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.core.dim

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return self.core.layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.core.attention.heads

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the embedding's matrix."""
        return self.core.tie_embeddings


class EngramLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A LanguageModel with the table that its memory reads.

    lookup: vocabulary, plan and table; may be missing only from models without a memory, and until `attach`.

    Attributes:
        model: the LanguageModel; its parameters are all that an optimizer sees.
        lookup: where rows come from.
        rows: the same for training: gradients of rows end there, and its `step` updates the table.
    """

    config_class = EngramLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"ffn.bias"}  # noqa: RUF012  (selection biases of experts move by thousandths)

    def __init__(self, config: EngramLMConfig, lookup: Lookup | None = None) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.core)
        if self.device.type != "meta":  # where from_pretrained puts what it is going to load
            self.model.init_weights()
        self.lookup: Lookup | None = None
        self.rows: TrainedRows | None = None
        self.post_init()
        if lookup is not None:
            self.attach(lookup)

    def attach(self, lookup: Lookup) -> None:
        """Read rows from this table. Raises MismatchError when it is not the table that the configuration describes."""
        memory, rows = self.model.config.memory, self.config.stored_rows
        if memory is None:
            raise MismatchError("a table was given to a model without a memory: it would never have been read.")
        expected = address_digest(lookup.vocabulary, build_plan(memory.hash, lookup.vocabulary))
        known = self.config.address_digest or expected
        if lookup.digest != expected or lookup.digest != known:
            raise MismatchError(
                f"the table's vocabulary and plan are {lookup.digest}, the model's are {known}: every row would be read from "
                "the wrong place."
            )
        if (form := rows.form(memory.engram.row_dim)) != lookup.table.form:
            raise MismatchError(f"the table holds {lookup.table.form}, the model was made for {form}.")
        self.lookup, self.rows = lookup, TrainedRows(lookup)
        self.config.address_digest = lookup.digest

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EngramCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **loss_arguments: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids [B, T] -> logits [B, T, V], and the loss of labels [B, T] (-100: ignored), which are shifted here.

        attention_mask: [B, S], 0 for padding, for the cache's positions and these. position_ids: [B, T]; a document begins
        wherever they do not go up by one, and neither attention nor memory crosses its beginning; otherwise positions are
        relative. logits_to_keep: of how many positions at the end, or of which. The cache that is given goes on; without one,
        a new one is returned unless in training, with labels or with several documents.

        While gradients are enabled, rows are read through `rows`, so that a backward reaches them.

        Raises ConfigError for what the model cannot do, MismatchError for what does not belong together.
        """
        self._require_known(loss_arguments)
        if input_ids is None or inputs_embeds is not None:
            raise ConfigError(
                "inputs_embeds cannot be used: the memory is addressed by tokens, which embeddings do not tell. Give input_ids."
            )
        self._require_own(past_key_values)
        padding = padding_of(attention_mask, input_ids, past_key_values)
        segments = documents_of(position_ids, input_ids, padding)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None and segments is None
        cache = EngramCache() if past_key_values is None and use_cache else past_key_values
        hidden, state = self.model(
            input_ids,
            self._read(input_ids, cache, padding, segments),
            segments=segments,
            padding=padding,
            state=cache.state if cache else None,
            with_state=cache is not None,
        )
        if cache is not None:
            cache.append(input_ids, state)
        logits = self.model.logits(slice_logits_to_keep(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.model.config.vocab_size, **loss_arguments)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _read(
        self, tokens: Tensor, cache: EngramCache | None, padding: Tensor | None, segments: Tensor | None
    ) -> Tensor | Fetch | None:
        """The rows of tokens [B, T]. The few tokens before them are hashed again rather than remembered as a hash."""
        if self.model.config.memory is None:
            return None
        if self.lookup is None or self.rows is None:
            raise MismatchError("this model has a memory but no table: load it by from_pretrained, or attach a Lookup.")
        length = tokens.shape[1]
        if cache is not None and cache.tokens is not None and cache.state is not None:
            first = max(0, cache.tokens.shape[1] - self.lookup.plan.history_length)
            before = cache.state.padding
            if before is not None or padding is not None:
                nowhere = torch.zeros_like(tokens, dtype=torch.bool)
                before = torch.zeros_like(cache.tokens, dtype=torch.bool) if before is None else before
                padding = torch.cat([before[:, first:], nowhere if padding is None else padding], dim=1)
            tokens = torch.cat([cache.tokens[:, first:], tokens], dim=1)
        ids = self.lookup.ids(tokens, segments=segments, dead=padding)[0][:, -length:].contiguous()
        return self.rows.read(ids) if torch.is_grad_enabled() else self.lookup.table.prefetch(ids)

    def _require_own(self, cache: Any) -> None:
        if cache is not None and not isinstance(cache, EngramCache):
            raise ConfigError(
                f"past_key_values is a {type(cache).__name__}, which holds keys and values alone: the memory's n-grams and "
                "convolutions would have forgotten the text. Leave it out, or give an EngramCache()."
            )

    def _require_known(self, arguments: dict[str, Any]) -> None:
        asked = {name for name, value in arguments.items() if value is not None and value is not False}
        if unknown := sorted(asked - LOSS_ARGUMENTS):
            raise ConfigError(f"forward does not know {', '.join(unknown)}: it would have been ignored silently.")

    # --- generate ---------------------------------------------------------------------------------------------------

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """An EngramCache in place of transformers' own."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ConfigError(
                f"cache_implementation {kind!r} holds keys and values alone: the memory's n-grams and convolutions would have "
                "forgotten the text. Leave it out."
            )
        if (given := model_kwargs.get("past_key_values")) is not None:
            given._is_user_defined = True  # generate gives it back as it would be after the last token
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = EngramCache()

    # --- what transformers asks of a model --------------------------------------------------------------------------

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a new model has its weights already, and one that is loaded lacks none."""

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = torch.utils.checkpoint.checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        self.gradient_checkpointing = enable
        for number, block in enumerate(self.model.blocks):
            block.checkpoint = gradient_checkpointing_func if enable and number % every_n_layers == 0 else None

    def get_input_embeddings(self) -> nn.Module:
        """Of tokens, [V, D]."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace them by others of the same size."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head, or the embeddings where they are tied."""
        return self.model.embedding if self.model.head is None else self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head by another of the same size. Raises ConfigError when it is the embedding."""
        if self.model.head is None:
            raise ConfigError("the head is the embedding's matrix: set_input_embeddings replaces both.")
        self.model.head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """The embeddings as they are. Raises ConfigError for another number of tokens."""
        if new_num_tokens not in (None, self.model.config.vocab_size):
            raise ConfigError(
                f"the embeddings cannot be resized from {self.model.config.vocab_size} to {new_num_tokens} tokens: rows are "
                "addressed by hashes over this vocabulary, and with another one all of them would be read from the wrong place."
            )
        return self.get_input_embeddings()

    # --- directories ------------------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save the model with its vocabulary and table, which are as they are now, accumulators included.

        Raises CheckpointError when a table that is being trained in place lies there, or the disk is full; ConfigError for
        push_to_hub, which would have left the table behind (the method of that name takes it along).
        """
        if push_to_hub:
            raise ConfigError(
                "save_pretrained(push_to_hub=True) would upload before the table is saved: use push_to_hub()."
            )
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if self.lookup and is_main_process:
            directory = Path(save_directory)
            save_file({"canonical": self.lookup.vocabulary.lookup}, directory / VOCABULARY)
            save_table(self.lookup.table, directory / TABLE)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, table: TableConfig | None = None, **kwargs: Any
    ) -> EngramLMForCausalLM | tuple[EngramLMForCausalLM, dict[str, Any]]:
        """Load a saved model. table: where its rows are to live; on tier disk they are read in place and cannot be trained.

        Raises:
            CheckpointError: when weights, vocabulary or table are missing or damaged.
            MismatchError: when they do not belong together.
        """
        with_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        where = model.name_or_path
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, info[problem])):
                raise CheckpointError(
                    f"{where}: {problem.replace('_', ' ')} among the weights, {len(names)} in all, the first {names[0]}: the "
                    "model would have run with random numbers in their place."
                )
        if model.config.core.memory is not None:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            model.attach(load_lookup(where, model.config, table or TableConfig(), model.device, **hub))
        elif table is not None:
            raise ConfigError(f"{where}: a model without a memory has no table to place.")
        return (model, info) if with_info else model

    @classmethod
    def from_run(cls, directory: str | Path, device: str = "auto") -> EngramLMForCausalLM:
        """The model of a run directory's newest checkpoint; errors are those of `load_run`."""
        return cls.of(load_run(Path(directory), device))

    @classmethod
    def of(cls, trained: TrainedModel) -> EngramLMForCausalLM:
        """A trained model; it and the table are taken, not copied."""
        with torch.device("meta"):
            model = cls(EngramLMConfig.of(trained.config.model, trained.config.table))
        model.model = trained.model
        if trained.lookup:
            model.attach(trained.lookup)
        end = separator_id(trained.tokenizer)
        model.generation_config.update(bos_token_id=end, eos_token_id=end, pad_token_id=end)
        return model.eval()


def export_run(directory: str | Path, out: str | Path) -> Path:
    """Write a run's newest checkpoint as a directory of `transformers`, with the tokenizer; errors are those of `load_run`."""
    trained = load_run(Path(directory), "cpu")
    EngramLMForCausalLM.of(trained).save_pretrained(out)
    end = trained.tokenizer.id_to_token(separator_id(trained.tokenizer))
    PreTrainedTokenizerFast(
        tokenizer_object=trained.tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
    return Path(out)


def padding_of(attention_mask: Tensor | None, tokens: Tensor, cache: EngramCache | None) -> Tensor | None:
    """Which of tokens [B, T] are padding, [B, T] bool, by a mask [B, S] of the cache's positions and these; None for none.

    Raises MismatchError for a mask of another shape, or one that contradicts what the cache was filled with.
    """
    if attention_mask is None:
        return None
    state = cache.state if cache else None
    start = state.position if state else 0
    if attention_mask.shape != (len(tokens), start + tokens.shape[1]):
        raise MismatchError(
            f"attention_mask is {list(attention_mask.shape)}, but there are {start} positions in the cache and "
            f"{tokens.shape[1]} new ones of {len(tokens)} sequences: padding would have been taken for text."
        )
    padding = attention_mask == 0
    before = padding[:, :start]
    if bool((before ^ state.padding if state and state.padding is not None else before).any()):
        raise MismatchError(
            "attention_mask hides other positions than those that were padding when the cache was filled: what was read "
            "then cannot be hidden now. Read the text again."
        )
    now = padding[:, start:]
    return now if bool(now.any()) else None


def documents_of(position_ids: Tensor | None, tokens: Tensor, padding: Tensor | None) -> Tensor | None:
    """Document numbers [B, T] by positions [B, T] or [1, T]; None for a single document.

    One begins where positions of two neighbouring tokens do not go up by one.
    """
    if position_ids is None or tokens.shape[1] < 2:
        return None
    begins = (position_ids.diff(dim=1) != 1).expand(len(tokens), -1)
    if padding is not None:
        begins = begins & ~padding[:, 1:] & ~padding[:, :-1]
    if not bool(begins.any()):
        return None
    return nn.functional.pad(begins, (1, 0)).cumsum(1)


def load_lookup(where: str, config: EngramLMConfig, table: TableConfig, device: torch.device, **hub: Any) -> Lookup:
    """Vocabulary and table of a saved model, by path or by name on the hub; the table on the tier that `table` names."""
    memory, defaults = config.core.memory, TableConfig()
    assert memory is not None
    for name in ROW_FACTS:
        if getattr(table, name) not in (getattr(defaults, name), getattr(config.stored_rows, name)):
            raise ConfigError(
                f"table.{name} = {getattr(table, name)!r}, but {where} holds rows of {name} {getattr(config.stored_rows, name)!r}."
            )
    try:
        vocabulary = CanonicalVocabulary(load_file(find(where, VOCABULARY, hub))["canonical"].astype(np.int64))
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{where}: {VOCABULARY} is damaged ({error}).") from None
    plan = build_plan(memory.hash, vocabulary)
    digest = address_digest(vocabulary, plan)
    path = Path(table.file) if table.file else find(where, TABLE, hub)
    with TableFile.open(path, digest=digest) as file:
        clock = file.clock
    placed = replace(table, **{name: getattr(config.stored_rows, name) for name in ROW_FACTS})
    if table.tier == "disk":
        placed = replace(placed, file=str(path))
    found = build_table(
        placed,
        plan.num_rows,
        memory.engram.row_dim,
        digest=digest,
        directory=path.parent,
        device=device,
        write=False,
    )
    lookup = Lookup(vocabulary, plan, found)
    if table.tier != "disk":
        found.load(path.parent, clock)
    return lookup


def find(where: str, name: str, hub: dict[str, Any]) -> Path:
    """A file of a saved model. Raises CheckpointError when it is not there."""
    path = cached_file(where, name, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        raise CheckpointError(
            f"{where}: holds no {name}, so the memory would have been empty. Save the model again, or copy the file that "
            "belongs to it."
        )
    return Path(path)


AutoConfig.register(EngramLMConfig.model_type, EngramLMConfig, exist_ok=True)
AutoModelForCausalLM.register(EngramLMConfig, EngramLMForCausalLM, exist_ok=True)
