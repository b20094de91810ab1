"""The model of a run: the weights of its folder in the dtype that training wants, rows for new tokens, a head for its
task.

:func:`load_model` is called in :mod:`hift_ds.train.finetune`, when the data have been read. How a folder becomes a
model stands in :mod:`hift_ds.hf.safetensors_folder` and, for ZeRO-3, :mod:`hift_ds.engine.zero3.load`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainingArguments, set_seed

from hift_ds.data.packing import packed_samples_are_isolated
from hift_ds.dtypes import Dtype, torch_dtype
from hift_ds.engine.zero3.load import load_partitioned, load_partitioned_with_head, remember_rounded_weights
from hift_ds.errors import ConfigError
from hift_ds.hf.model_structure import build_on_meta, quiet_hugging_face
from hift_ds.hf.safetensors_folder import SafetensorsFolder, load_pretrained, load_pretrained_with_head
from hift_ds.out_of_memory import no_traceback_when_full
from hift_ds.train.preflight import CheckedRun
from hift_ds.train.run_config import RunConfig
from hift_ds.train.tasks import TASKS
from hift_ds.train.trainer import zero_stage

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from hift_ds.engine.engine import HiFTEngine

_WITHOUT_NEW_HEAD = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")  # theirs is the folder's own


def check_attention(config: PretrainedConfig, run: RunConfig) -> None:
    """See that the attention kernel which the run file names is there, and that the model takes it.

    Raises:
        ConfigError: it is not, or the model does not.
    """
    wanted = deepcopy(config)
    wanted._attn_implementation = run.model.attn_implementation
    try:
        build_on_meta(wanted, trust_remote_code=run.model.trust_remote_code)
    except ConfigError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(
            f"model.attn_implementation: {run.model.attn_implementation!r} cannot be used here ({reason[:200]}); leave "
            "the key out for transformers' choice"
        ) from error


@no_traceback_when_full("while the model is loaded")
def load_model(
    checked: CheckedRun,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    labels: Mapping[str, Any],
    say: Callable[[str], None],
) -> PreTrainedModel:
    """Load the model, straight to the accelerator where the dtype is final; else mapped from the files, which costs a
    rank no memory of its own until the engine casts: fp32 weights that train in 16 bits keep their bits in the masters.

    Args:
        labels: entries of the model's config that the data decide.
        say: prints a line, on the first rank.

    Raises:
        CheckpointError: the folder lacks a weight, or has one that the model does not know.
        ConfigError: new tokens with ZeRO-3; or packed samples would see each other (with ZeRO-3 the engine tells it:
            :class:`ChecksPacking`).
    """
    run, task = checked.run, TASKS[checked.run.task]
    in_shards = zero_stage(arguments) == 3
    adds_tokens = bool(run.model.added_tokens or run.model.added_special_tokens)
    if adds_tokens and in_shards:
        raise ConfigError(
            'model.added_tokens: with "zero_optimization.stage": 3 the embeddings are in shards, which get no more '
            "rows; use stage 0, 1 or 2"
        )
    if task.auto_class not in _WITHOUT_NEW_HEAD:
        labels = {"num_labels": 1} if run.task == "reward" else labels
        model = _load_with_head(checked, arguments, tokenizer, labels, say)
        if adds_tokens:
            _add_rows(model, tokenizer, run, say)
        return model
    if in_shards:
        assert isinstance(arguments.deepspeed, dict), "make_arguments gives one"
        return load_partitioned(
            checked.model.path, arguments.deepspeed, dtype=torch_dtype(checked.dtype), model_class=task.model_class(),
            trust_remote_code=run.model.trust_remote_code, **_attention(run),
        )  # fmt: skip
    model = load_pretrained(
        checked.model.path,
        dtype=torch_dtype(_dtype_in_memory(checked)),
        model_class=task.model_class(),
        device=None if _keeps_bits(checked) or arguments.device.type == "cpu" else arguments.device,
        trust_remote_code=run.model.trust_remote_code,
        **_attention(run),
    )
    if adds_tokens:
        _add_rows(model, tokenizer, run, say)
    if _has_masters(checked) and not _keeps_bits(checked):
        remember_rounded_weights(model, SafetensorsFolder(checked.model.path))
    if run.data.packing:
        _check_packing(model)
    return model


def _has_masters(checked: CheckedRun) -> bool:
    block = checked.settings.hift
    return block is not None and block.master_weights


def _keeps_bits(checked: CheckedRun) -> bool:
    """Weights in fp32 that train in 16 bits are loaded as they are, and cast once the masters have them."""
    return checked.model.dtype == "fp32" and checked.dtype != "fp32" and _has_masters(checked)


def _dtype_in_memory(checked: CheckedRun) -> Dtype:
    return "fp32" if _keeps_bits(checked) else checked.dtype


def _attention(run: RunConfig) -> dict[str, str]:
    return {"attn_implementation": run.model.attn_implementation} if run.model.attn_implementation else {}


def _check_packing(model: PreTrainedModel, engine: HiFTEngine | None = None) -> None:
    if not packed_samples_are_isolated(model, engine):
        raise ConfigError(
            f"data.packing: true, but in {type(model).__name__} with attention "
            f"{model.config._attn_implementation!r} the samples of a row see each other; "
            "set data.packing: false, or another model.attn_implementation"
        )


class ChecksPacking(TrainerCallback):
    """Sees before the first step that packed samples do not see each other in a model whose weights are in shards."""

    def __init__(self, get_engine: Callable[[], HiFTEngine | None]) -> None:
        self.get_engine = get_engine

    def on_train_begin(self, *args: Any, model: PreTrainedModel | None = None, **kwargs: Any) -> None:
        """Ask the engine, which gathers them.

        Raises:
            ConfigError: they would see each other.
        """
        assert model is not None, "the Trainer gives it"
        _check_packing(model, self.get_engine())


def _add_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: RunConfig, say: Callable[[str], None]
) -> None:
    """Give the embeddings rows for tokens that they lack; published ones often have a few more rows than tokens."""
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    if len(tokenizer) > rows:
        set_seed(run.train.seed)  # new rows are drawn around the mean of the others, the same on all ranks
        with quiet_hugging_face():
            model.resize_token_embeddings(len(tokenizer))
    say(
        f"added tokens: {len(tokenizer):,} in the vocabulary; embeddings {rows:,} -> {max(rows, len(tokenizer)):,} rows"
    )


def _load_with_head(
    checked: CheckedRun,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    labels: Mapping[str, Any],
    say: Callable[[str], None],
) -> PreTrainedModel:
    """Load a model with the task's head, which begins with random weights unless the folder has one that fits; the same
    on all ranks."""
    run, task, trust = checked.run, TASKS[checked.run.task], checked.run.model.trust_remote_code
    set_seed(run.train.seed)
    with quiet_hugging_face():  # what is new and what is unused is said below
        if zero_stage(arguments) == 3:
            assert isinstance(arguments.deepspeed, dict), "make_arguments gives one"
            model, new, unused = load_partitioned_with_head(
                checked.model.path, arguments.deepspeed, model_class=task.model_class(),
                dtype=torch_dtype(checked.dtype), trust_remote_code=trust, model_options=labels, **_attention(run),
            )  # fmt: skip
        else:
            model, new, unused = load_pretrained_with_head(
                checked.model.path, task.model_class(), trust_remote_code=trust,
                dtype=torch_dtype(_dtype_in_memory(checked)), **labels, **_attention(run),
            )  # fmt: skip
    if model.config.get_text_config().pad_token_id is None:  # decoders find the last token of a row by it
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if new:
        say(f"new weights, at random: {_some(new)}")
    if unused:
        say(f"weights of another head, not used: {_some(unused)}")
    return model


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
