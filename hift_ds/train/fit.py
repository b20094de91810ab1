"""What a run leaves open is chosen for the card that is there: group size, exact switches, micro-batch.

``hift.fit`` says for which card. A key that the run file or the DeepSpeed JSON gives is never changed, the rows of an
optimizer step neither. What was chosen is said in two lines, stands in ``fit.json`` of the run folder and beside each
checkpoint, and holds for the run: one that goes on keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hift_ds.dtypes import TORCH_NAMES, Dtype
from hift_ds.errors import HiFTError
from hift_ds.forecast import fit as forecast
from hift_ds.forecast.fit import Question, accumulation, gib
from hift_ds.forecast.setting import SWITCHES, Setting
from hift_ds.forecast.simulator import one_simulator
from hift_ds.forecast.steps import GIB
from hift_ds.store.choose import HOST_SHARE
from hift_ds.store.machine import host_bytes, processes_on_node
from hift_ds.train.card import Card
from hift_ds.train.group_size import ModelSizes, choose_groups, head_in_every_step
from hift_ds.train.settings import BatchSizes, Settings, deepspeed_config, gives_passes
from hift_ds.train.tasks import TASKS

FIT_FILE = "fit.json"
CHOSEN = "fit"  # its key in the settings beside a checkpoint
CPU_TOKENS = 1024  # in a pass on a CPU: more are not faster
SURE = 0.5  # of the usable memory: a bound below it needs no simulation
OF_THE_GROUPS = ("hift.group_size", "hift.update", "hift.always_active")  # chosen when a run begins, not again
_SECTION = {"residency": "state", "slice_numel": "state"} | dict.fromkeys(SWITCHES[1:], "activations")


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    Attributes:
        settings, dtype: of the run.
        model: what :func:`~hift_ds.hf.model_structure.read_config` takes.
        length: tokens of the longest row.
        num_rows: of the training data; None where that is not known.
    """

    settings: Settings
    dtype: Dtype
    model: str
    length: int
    num_rows: int | None


@dataclass(frozen=True)
class Chosen:
    """The answer: plain data, the same on all ranks.

    Attributes:
        keys: of a run file, with their values.
        lines: for the terminal.
        record: for ``fit.json``.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    record: dict[str, Any] = field(default_factory=dict)


@one_simulator()
def choose(facts: Facts, card: Card | None, before: Mapping[str, Any] | None = None) -> Chosen:
    """Group size by the length of the run, then switches and micro-batch by the card.

    Args:
        card: None: nobody has said which; then everything that saves memory is on.
        before: ``record`` of the run that goes on.
    """
    settings = facts.settings
    if settings.hift is None:
        return Chosen()
    given = {"fit": settings.run.fit, "ranks": settings.world_size, "rows": settings.batch.global_batch_size}
    kept = _still_open(settings, (before or {}).get("chosen") or {})
    if before is not None and all(before.get(name) == value for name, value in given.items()):
        words = ", ".join(f"{key}={value}" for key, value in kept.items())
        again = (f"as when this run began: {words}",) if words else ()
        return Chosen(kept, again, {**before, "chosen": kept})
    auto_class = TASKS[settings.run.task].auto_class
    model = ModelSizes.read(facts.model, settings.run.model.trust_remote_code, auto_class)
    if before is not None:  # the groups cannot be others, whatever the card
        keys = {key: value for key, value in kept.items() if key in OF_THE_GROUPS}
        lines = [f"as when this run began: {key}={value}" for key, value in keys.items()]
    else:
        keys, said = choose_groups(settings, facts.dtype, facts.length, facts.num_rows, model, card)
        head, why = head_in_every_step(settings, model)
        keys, lines = keys | head, [*said, *why]
    record = {**given, "card": card.words if card else None}
    if settings.run.fit is not None:
        found = _fitted(replace(facts, settings=apply(settings, keys)), model, card)
        keys |= found.keys
        lines.extend(found.lines)
        record |= found.record
    return Chosen(keys, tuple(lines), {**record, "chosen": keys})


def apply(settings: Settings, keys: Mapping[str, Any]) -> Settings:
    """The settings with what was chosen."""
    for key, value in keys.items():
        section, *path = key.split(".")
        if key == "train.micro_batch_size":
            total = settings.batch.global_batch_size
            batch = BatchSizes(value, total // (value * settings.world_size), total)
            settings = replace(settings, batch=batch)
        elif section == "deepspeed":
            settings = replace(settings, written={**settings.written, path[0]: value})
        elif section == "hift" and settings.hift is not None:
            settings = replace(settings, hift=_with(settings.hift, path, value))
    return settings


def _with(block: Any, path: list[str], value: Any) -> Any:
    name, *below = path
    return block.model_copy(update={name: _with(getattr(block, name), below, value) if below else value})


def free_keys(settings: Settings, *, is_host: bool) -> frozenset[str]:
    """Which of the choices nobody has made."""
    block = settings.hift
    assert block is not None
    zero = settings.written.get("zero_optimization")
    free = {name for name in SWITCHES if name not in getattr(block, _SECTION[name]).model_fields_set}
    if "blocks_kept" in block.activations.model_fields_set or settings.run.is_given("train.gradient_checkpointing"):
        free.discard("checkpointing")
    if is_host or (zero or {}).get("stage", 0) == 3:
        free.discard("offload")
    if not is_host:
        free |= {"residency"} if not block.state.model_fields_set & {"residency", "step_on", "path"} else set()
        free |= {"streaming"} if zero is None and settings.world_size == 1 else set()
    return frozenset(free)


# -- the choice ------------------------------------------------------------------------------------------------


def setting_of(facts: Facts) -> Setting:
    """What the run does as it is written, for the simulation."""
    settings = facts.settings
    assert settings.hift is not None
    config = deepspeed_config(settings, facts.dtype)
    config["hift"] |= {"group_size": settings.hift.first_group_size, "tokens_per_step": None}
    if TASKS[settings.run.task].has_own_head:  # the simulated model has the head that its config names
        config["hift"]["always_active"] = _matching(config["hift"]["always_active"], facts)
    if settings.run.train.gradient_checkpointing:
        config["hift"]["activations"]["checkpointing"] = True
    return Setting(
        facts.model, config, TORCH_NAMES[facts.dtype], settings.batch.micro_batch_size, facts.length,
        world_size=settings.world_size, micro_batches=min(settings.batch.gradient_accumulation_steps, 2),
        padded=not settings.run.data.packing,
        eager_attention=settings.run.model.attn_implementation == "eager",
        trust_remote_code=settings.run.model.trust_remote_code,
    )  # fmt: skip


def _matching(patterns: Sequence[str], facts: Facts) -> list[str]:
    """Those that match a parameter of the model that the simulation builds."""
    if not patterns:
        return []
    model = ModelSizes.read(facts.model, facts.settings.run.model.trust_remote_code).model
    names = [name for name, _ in model.named_parameters()]
    return [pattern for pattern in patterns if any(re.search(pattern, name) for name in names)]


def _fitted(facts: Facts, model: ModelSizes, card: Card | None) -> Chosen:
    settings = facts.settings
    setting, free = setting_of(facts), free_keys(settings, is_host=card is not None and card.is_host)
    rows = settings.batch.global_batch_size // settings.world_size
    if card is None:
        leanest, on = forecast.leanest_setting(setting, free)
        keys = _keys(settings, leanest if gives_passes(settings) else replace(leanest, batch=1), on)
        return Chosen(keys, ("fit: no GPU here and none named (--card 24): everything that saves memory is on",))
    batches: tuple[int, ...] = (settings.batch.micro_batch_size,)
    if not gives_passes(settings):
        tokens = CPU_TOKENS if card.is_host else forecast.MOST_TOKENS
        batches = forecast.divisors_up_to(rows, tokens // facts.length)
    usable = card.usable_bytes - (_states_at_rest(settings, model) if card.is_host else 0)
    largest = replace(setting, batch=batches[-1])
    assert settings.hift is not None
    text, group = model.config.get_text_config(), model.largest_group(settings.hift)
    scores = setting.eager_attention or not getattr(model.model, "_supports_sdpa", False)
    bound = forecast.upper_bound_bytes(text, model.numel, group, largest, holds_scores=scores)
    if bound is not None and bound <= SURE * usable:
        keys = _keys(settings, largest, ())
        what = f"micro-batch {batches[-1]} x {accumulation(rows // batches[-1])}, {forecast.NOTHING_ON}"
        if "residency" in free and bound + forecast.STATE_BYTES * model.numel // settings.world_size <= SURE * usable:
            bound += forecast.STATE_BYTES * model.numel // settings.world_size
            keys["hift.state.residency"] = "device"
            what += f", {forecast.NAMES['residency']}"
        line = f"fit: {card.words}, at most {gib(bound)} needed: {what}"
        return Chosen(keys, (line, *_host_lines(settings, model, card)), {"bound_gib": bound / GIB})
    if card.is_host and bound is None:
        return Chosen({}, (f"fit: {card.words}; the model's config does not name its sizes: nothing was chosen",))
    question = Question(setting, free, batches, rows, usable, card.speeds, model.num_blocks)
    try:
        fit = forecast.find_fit(question)
    except HiFTError as error:
        return Chosen({}, (f"fit: no forecast could be made, so that nothing was chosen ({error})",))
    return _answer(settings, model, card, fit, rows, usable)


def _answer(settings: Settings, model: ModelSizes, card: Card, fit: forecast.Fit, rows: int, usable: int) -> Chosen:
    one = fit.chosen
    keys = _keys(settings, one.setting, one.on)
    line = f"fit: {card.words}: {one.words(rows)}; peak forecast {gib(one.peak_bytes)}"
    if not fit.fits:
        why = f"nothing that is left open fits {gib(usable)}: shorter rows (data.max_length), smaller groups, more GPUs"
        if len({other.setting.batch for other in fit.compared}) == 1 and one.setting.batch > 1:
            why += "; or leave train.micro_batch_size out"
    elif fit.fastest.setting != one.setting:
        why = f"probably faster, but too large: {fit.fastest.words()}; peak forecast {gib(fit.fastest.peak_bytes)}"
    else:
        why = "no faster setting was left out for want of memory"
    compared = [
        {"on": list(other.on), "micro_batch_size": other.setting.batch, "blocks_kept": other.blocks_kept,
         "forecast_gib": round(other.peak_bytes / GIB, 3), "modelled_step_s": other.seconds}
        for other in fit.compared
    ]  # fmt: skip
    record = {"usable_gib": usable / GIB, "forecast_gib": one.peak_bytes / GIB, "fits": fit.fits, "compared": compared}
    return Chosen(keys, (line, f"fit: {why}", *_host_lines(settings, model, card)), record)


def _keys(settings: Settings, setting: Setting, on: tuple[str, ...]) -> dict[str, Any]:
    """The run file's keys that make ``setting`` of the run as it is written."""
    block = setting.engine_config["hift"]
    keys: dict[str, Any] = {}
    for name in on:
        if name == "streaming":
            keys["deepspeed.zero_optimization"] = dict(forecast.STREAMED)
        else:
            keys[f"hift.{_SECTION[name]}.{name}"] = block[_SECTION[name]][name]
    if kept := block["activations"]["blocks_kept"] if "checkpointing" in on else 0:
        keys["hift.activations.blocks_kept"] = kept
    if not gives_passes(settings):
        keys["train.micro_batch_size"] = setting.batch
    return keys


def _states_at_rest(settings: Settings, model: ModelSizes) -> int:
    """Bytes of this rank's masters and moments in host memory."""
    assert settings.hift is not None
    disk = settings.hift.state.residency == "disk"
    return 0 if disk else forecast.STATE_BYTES * model.numel // settings.world_size


def _host_lines(settings: Settings, model: ModelSizes, card: Card) -> tuple[str, ...]:
    """A warning where this machine has no room for the states."""
    assert settings.hift is not None
    if settings.hift.state.residency != "host" or not card.is_here:
        return ()
    needed, free = _states_at_rest(settings, model) * processes_on_node(), host_bytes().available
    if needed <= HOST_SHARE * free:
        return ()
    return (
        f"fit: fp32 masters and optimizer states take {gib(needed)} of host memory, of which {gib(free)} are free: "
        "hift.state.residency=disk hift.state.path=FOLDER keeps them on a local disk, hift.state.codec makes them "
        "smaller",
    )


# -- a run that goes on ----------------------------------------------------------------------------------------


def _still_open(settings: Settings, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that were chosen when the run began, without those that somebody has set since."""
    block = settings.hift
    if block is None:
        return {}
    free = free_keys(settings, is_host=False)

    def is_open(key: str) -> bool:
        name = key.rpartition(".")[2]
        if key in OF_THE_GROUPS:
            said = block.model_fields_set
            return name not in said and not (name == "always_active" and "groups" in said)
        if settings.run.fit is None:
            return False
        if name == "micro_batch_size":
            return not gives_passes(settings)
        return {"zero_optimization": "streaming", "blocks_kept": "checkpointing"}.get(name, name) in free

    return {key: value for key, value in chosen.items() if is_open(key)}
