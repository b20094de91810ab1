"""Where states rest and how they move changes no bit of the weights; compact forms change what they are said
to."""

import copy

import pytest
import torch

from hift_ds.errors import ConfigError
from tests.checkpoint.runs import Case, interrupted_and_whole
from tests.helpers.engines import ds_config, make_engine, train_step
from tests.helpers.toy import Toy, make_batches

BF16 = {"bf16": {"enabled": True}}


def trajectory(state, *, model=None, steps=17, between=None, hift=None, lr=1e-2, **config):
    """Weights after each step, and the engine's reports."""
    model = copy.deepcopy(model) if model is not None else Toy()
    engine = make_engine(model, ds_config(lr=lr, hift={"state": state, **(hift or {})}, **config))
    weights, reports = [], []
    try:
        for step, batch in enumerate(make_batches(steps)):
            train_step(engine, [batch])
            reports.append(engine.last_report)
            weights.append([p.detach().clone() for p in model.parameters()])
            if between:
                between(engine, step)
    finally:
        engine.destroy()
    return weights, reports


def same(a, b):
    return all(torch.equal(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))


@pytest.fixture(scope="module")
def resident():
    """What states that never move give, in fp32 and in bf16 with masters."""
    return {name: trajectory({"residency": "device"}, **more)[0] for name, more in {"fp32": {}, "bf16": BF16}.items()}


def ways(tmp_path):
    for residency in ("host", "disk"):
        for prefetch, slots in ((False, 1), (True, 1), (True, 2)):
            state = {"residency": residency, "prefetch": prefetch, "slots": slots}
            yield {**state, "path": str(tmp_path)} if residency == "disk" else state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_bit_depends_on_where_states_rest(precision, resident, tmp_path):
    for state in ways(tmp_path):
        weights, _ = trajectory(state, **(BF16 if precision == "bf16" else {}))
        assert same(weights, resident[precision]), state
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("hift-states")]


def test_a_step_ends_with_as_many_slices_of_the_next_group_under_way_as_there_are_slots():
    state = {"residency": "host", "slots": 3, "slice_numel": 17}
    engine = make_engine(Toy(), ds_config(hift={"state": state}, **BF16))
    for batch in make_batches(2 * len(engine.groups)):
        train_step(engine, [batch])
        chunks = [chunk.id for chunk in engine.optimizer.groups[engine.schedule.active].chunks]
        if engine.last_report.cycle:  # in the first they are made
            assert set(chunks[:3]) <= {slot.chunk for slot in engine.optimizer.store._slots}
    engine.destroy()


SETTINGS = {
    "one group": {"hift": {"groups": [["."]]}},
    "two groups, turns of two": {"hift": {"group_size": 3, "steps_per_group": 2}},
    "three groups, the last ragged": {"hift": {"group_size": 2}},
    "a new order each cycle": {"hift": {"order": "random", "reshuffle": True, "seed": 3}},
    "slices": {"hift": {}, "slice_numel": 17},
    "embedding and head always": {"hift": {"always_active": ["^embed", "^head"], "order": "top2down"}},
    "accumulation and clipping": {"gas": 1, "clip": 0.05},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_prefetch_changes_no_bit(setting, tmp_path):
    config = dict(SETTINGS[setting])
    slices = {"slice_numel": config.pop("slice_numel")} if "slice_numel" in config else {}
    expected, _ = trajectory({"residency": "device", **slices}, **config, **BF16)
    for state in ways(tmp_path):
        weights, _ = trajectory({**state, **slices}, **config, **BF16)
        assert same(weights, expected), state


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "Adagrad", "SGD"])
def test_prefetch_with_states_of_other_shapes_or_none(name, tmp_path):
    expected, _ = trajectory({"residency": "device"}, optimizer=name, steps=11)
    for state in ways(tmp_path):
        assert same(trajectory(state, optimizer=name, steps=11)[0], expected), state


def test_a_skipped_step_keeps_what_was_fetched_for_it(tmp_path):
    """fp16 with a scale that overflows: the group is retried, over and over, and nothing of its state has
    moved on."""
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}
    expected, reports = trajectory({"residency": "device"}, model=Toy().half(), steps=40, **fp16)
    assert sum(report.skipped for report in reports) >= 5
    for state in ways(tmp_path):
        assert same(trajectory(state, model=Toy().half(), steps=40, **fp16)[0], expected), state


def test_evaluation_and_reading_all_states_between_steps(resident, tmp_path):
    batch = make_batches(1, seed=9)[0]

    def between(engine, step):
        engine.eval()
        with torch.no_grad():
            engine(*batch)
        engine.train()
        if step % 3 == 1:
            engine.optimizer.store.synchronize()
            for group in engine.optimizer.groups.values():
                for chunk in group.chunks:
                    read = engine.optimizer.store.read(chunk.id)
                    assert len(read) == 3 and all(t.isfinite().all() for t in read.values())

    for state in ways(tmp_path):
        assert same(trajectory(state, between=between, **BF16)[0], resident["bf16"]), state


# -- compact forms -----------------------------------------------------------------------------------------


def test_split_master_changes_no_bit(resident, tmp_path):
    """In slices, from an fp32 checkpoint (masters with all their bits) and with one weight that gets no
    gradient."""
    for state in [{"residency": "device"}, *ways(tmp_path)]:
        weights, reports = trajectory({**state, "codec": "split_master"}, **BF16)
        assert same(weights, resident["bf16"]), state
    sliced, _ = trajectory({"residency": "device", "slice_numel": 17}, **BF16)
    assert same(trajectory({"codec": "split_master", "slice_numel": 17}, **BF16)[0], sliced)
    exact, compact = (trajectory({"residency": "host", "codec": c}, **BF16)[1] for c in ("fp32", "split_master"))
    for before, after in zip(exact, compact, strict=True):
        assert after.state_bytes_out < before.state_bytes_out


@pytest.mark.parametrize("codec", ["bf16_moments", "split_master+int8_moments"])
def test_a_codec_rounds_alike_wherever_states_rest(codec, resident, tmp_path):
    expected, _ = trajectory({"residency": "device", "codec": codec}, **BF16)
    assert not same(expected, resident["bf16"])
    moved = max((x.float() - y.float()).abs().max() for x, y in zip(expected[-1], resident["bf16"][-1], strict=True))
    assert moved < 0.02  # of weights around 0.3 that moved by 0.04
    for state in ways(tmp_path):
        assert same(trajectory({**state, "codec": codec}, **BF16)[0], expected), state


def test_split_master_needs_bf16_weights_and_masters():
    with pytest.raises(ConfigError, match="split_master needs bf16"):
        make_engine(Toy(), ds_config(hift={"state": {"codec": "split_master"}}))
    with pytest.raises(ConfigError, match="split_master needs bf16"):
        make_engine(Toy(), ds_config(hift={"state": {"codec": "split_master"}}, fp16={"enabled": True}))


# -- accounting --------------------------------------------------------------------------------------------


def test_the_report_counts_the_bytes_of_the_groups(tmp_path):
    """AdamW with masters: 12 bytes a parameter, out those of the group that was updated, in those of the
    next."""
    _, reports = trajectory({"residency": "host"}, **BF16)
    engine = make_engine(Toy(), ds_config(**BF16))
    numels = [group.numel for group in engine.groups]
    engine.destroy()
    for step, report in enumerate(reports):
        arriving = 12 * numels[(step + 1) % 5] + (12 * numels[0] if step == 0 else 0)
        assert 0 <= report.state_bytes_in - arriving <= 2 * 3 * 256  # parts are aligned
        assert 0 <= report.state_bytes_out - 12 * numels[step % 5] <= 3 * 256
        assert report.transfer_s >= 0 and report.stalled_s >= 0
    assert any(report.transfer_s > 0 for report in reports[1:])
    _, still = trajectory({"residency": "device"}, **BF16)
    assert all(r.state_bytes_in == r.state_bytes_out == 0 for r in still)


# -- resuming ----------------------------------------------------------------------------------------------


def resumed(codec, residency, tmp_path, **hift):
    state = {"codec": codec, "residency": residency, "slots": 2}
    if residency == "disk":
        state["path"] = str(tmp_path / "states")
    interrupted_and_whole(Case(ds_config(hift={"state": state, **hift}, **BF16)), tmp_path)


@pytest.mark.parametrize("codec", ["split_master", "bf16_moments", "split_master+int8_moments"])
def test_a_resumed_run_rounds_alike(codec, tmp_path):
    for residency in ("device", "host", "disk"):
        resumed(codec, residency, tmp_path / residency)


def test_a_resumed_run_rounds_alike_in_slices_and_turns_saved_beside_training(tmp_path):
    more = {"steps_per_group": 2, "checkpoint": {"asynchronous": True}}
    resumed("split_master+bf16_moments", "disk", tmp_path, order="random", reshuffle=True, **more)


def test_split_master_with_partitioned_weights(tmp_path):
    """Their shards are at hand between updates, but not the whole weights of an optimizer that looks at
    shapes."""
    state = {"codec": "split_master", "residency": "host"}
    interrupted_and_whole(Case(ds_config(stage=3, hift={"state": state}, **BF16), at=(7,)), tmp_path)
    with pytest.raises(ConfigError, match="stage 3"):
        make_engine(Toy(), ds_config(stage=3, optimizer="Muon", hift={"state": state}, **BF16))
