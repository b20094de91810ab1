"""transfers.png: hidden and waited-for seconds of state transfers, from a metrics file alone."""

import json

import numpy as np
import pytest

from hift_ds.engine.step_notes import SlowSteps, _together
from hift_ds.report.metrics import share_waited
from hift_ds.report.page import report_page
from hift_ds.report.plots import plot_run
from hift_ds.report.progress import Pace
from hift_ds.report.run_summary import read_run
from hift_ds.report.transfers import are_worth_a_picture, stretch_means, summary, transfers_figure
from hift_ds.step_report import CAUSES, StepReport


def records(num, **more):
    return [
        {"step": i + 1, "step_time_s": 2.0, "transfer_s": 1.0, "stalled_s": 0.25,
         "state_bytes_in": 5 << 20, "state_bytes_out": 3 << 20, **more}
        for i in range(num)
    ]  # fmt: skip


WAITS = {"states_in": 0.2, "states_out": 0.05, "reduction": 0.5, "between_steps": 0.1, "gather": 0.002}


def test_the_sentence():
    """All that steps waited for is in the one number; without causes, as files of old are, those for states."""
    states = "10.0 s of copying optimizer states, 75% of it while the model computed; steps waited "
    assert summary(records(10)) == states + "12.5% of their time: 12.5% for states to arrive"
    assert summary(records(10, waits_s=WAITS)) == (
        states + "42.6% of their time: 25.0% for gradients and weights between ranks, 10.0% for states to arrive"
    )
    assert summary(records(3, transfer_s=0.0, stalled_s=0.0)) == "steps waited 0.0% of their time"
    hidden = "2.0 s of copying optimizer states, 100% of it while the model computed"
    assert summary([{"step": 1, "transfer_s": 2.0}]) == hidden


def test_the_number_is_the_same_everywhere(tmp_path):
    """In the metrics' causes, under the picture, in the line while it runs, and on the page."""
    steps = records(10, waits_s=WAITS)
    share = sum(sum(step["waits_s"].values()) for step in steps) / sum(step["step_time_s"] for step in steps)
    assert share_waited(steps)[0] == pytest.approx(share) and f"{share:.1%}" in summary(steps)
    pace = Pace(10, 0, 5)
    for record in steps:
        pace.add(record)
    assert f"{share:.0%} waiting, mostly for gradients and weights between ranks" in pace.parts(steps[-1])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    run = read_run(tmp_path)
    assert run.waited == pytest.approx(share) and f"{share:.1%}</b><span>of the time steps waited" in report_page(run)


def test_bars_are_causes_and_hidden_transfers_on_top():
    figure = transfers_figure(records(4, waits_s=WAITS))
    top, bottom = figure.axes
    labels = [text.get_text() for text in top.get_legend().get_texts()]
    first = [bar for bar in top.patches if abs(bar.get_x() + bar.get_width() / 2 - 1) < 0.01]
    assert len(first) == len(labels) - 1 == 6 and len(top.patches) == 4 * 6
    heights = [0.5, 0.2, 0.1, 0.05, 0.002, 0.75]
    assert [bar.get_height() for bar in first] == pytest.approx(heights)
    assert [bar.get_y() for bar in first] == pytest.approx(np.cumsum([0, *heights[:-1]]))
    by_label = dict(zip([handle.get_label() for handle in top.containers], heights, strict=True))
    assert by_label["waited for gradients and weights between ranks"] == 0.5
    assert by_label["waited for other things"] == 0.002 and by_label["copying while the model computed"] == 0.75
    assert [line.get_ydata()[0] for line in bottom.lines] == [5, 3]


def test_without_causes_the_picture_has_the_waits_for_states():
    top, _ = transfers_figure(records(4)).axes
    assert sorted({round(bar.get_height(), 6) for bar in top.patches}) == [0.25, 0.75] and len(top.patches) == 8


def test_what_did_not_move_is_not_drawn():
    figure = transfers_figure(records(4, waits_s={"reduction": 0.2}, state_bytes_in=0, state_bytes_out=0))
    (only,) = figure.axes
    assert only.get_xlabel() == "optimizer step"


def test_gradients_in_host_memory_and_second_updates():
    """Lines and bars of their own, only where there are any."""
    steps = records(4, grad_bytes_out=7 << 20, grad_bytes_in=0, tried=True, undone=False, undone_s=0.0)
    steps[2] |= {"grad_bytes_in": 2 << 20, "undone": True, "undone_s": 0.5}
    top, bottom = transfers_figure(steps).axes
    assert [line.get_ydata()[2] for line in bottom.lines] == [5, 3, 7, 2]
    assert [text.get_text() for text in bottom.get_legend().get_texts()] == [
        "optimizer states in", "optimizer states out", "gradients to the host", "gradients back",
    ]  # fmt: skip
    again = [bar for bar in top.patches if bar.get_height() == 0.5]
    assert len(again) == 1 and again[0].get_y() == 1.0 and again[0].get_x() + again[0].get_width() / 2 == 3
    assert summary(steps).endswith("; 1 of 4 updates on trial made again (0.5 s)")
    assert len(transfers_figure(records(4)).axes[1].lines) == 2
    still = records(4, state_bytes_in=0, state_bytes_out=0, stalled_s=0.0)
    assert not are_worth_a_picture(still)
    assert are_worth_a_picture([still[0] | {"undone": True, "undone_s": 0.1}])


def test_long_runs_are_averaged_and_gaps_left_out():
    means, width = stretch_means(np.arange(1000.0))
    assert width == 5 and len(means) == 200 and means[1] == 7
    means, width = stretch_means(np.array([1.0, np.nan, np.nan]))
    assert width == 1 and means[0] == 1 and np.isnan(means[1:]).all()
    figure = transfers_figure([{"step": i, "state_bytes_in": 1} for i in range(1001)])
    assert all(len(axes.patches) <= 400 for axes in figure.axes)


@pytest.mark.parametrize(
    ("moved", "waited", "drawn"), [(5, 0.25, True), (0, 0.25, True), (5, 0.02, False)],
)  # fmt: skip
def test_drawn_if_steps_waited(moved, waited, drawn, tmp_path):
    steps = records(3, state_bytes_in=moved, state_bytes_out=0, loss=1.0, waits_s={"reduction": waited})
    assert are_worth_a_picture(steps) is drawn
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert (tmp_path / "transfers.png" in plot_run(tmp_path)) is drawn
    assert (tmp_path / "transfers.png").is_file() is drawn


def test_the_progress_line_says_how_much_was_waited():
    pace = Pace(10, 0, 5)
    for record in records(4, loss=1.0):
        pace.add(record)
    assert "12% waiting, for states to arrive" in pace.parts(record)
    pace = Pace(10, 0, 5)
    pace.add(records(1, stalled_s=0.001)[0])
    assert not [part for part in pace.parts({}) if "waiting" in part]


def report_of(cycle, waits):
    names = ("step", "position", "group", "lr", "grad_norm", "loss_scale", "state_bytes_in", "state_bytes_out",
             "grad_numel_sent", "transfer_s", "stalled_s", "peak_bytes")  # fmt: skip
    return StepReport(cycle=cycle, group_name="", skipped=False, waits=waits, **dict.fromkeys(names, 0))


@pytest.mark.parametrize("cause", CAUSES)
def test_a_cycle_that_is_slower_than_its_work_says_why_once(cause):
    """From the second cycle on, above 5 % of the rest, for each leading cause once."""
    slow, other = SlowSteps(), next(name for name in CAUSES if name != cause)
    lines = [slow.add(report_of(cycle, {cause: 0.05, other: 0.02}), 1.0) for cycle in (0, 0, 1, 1, 2, 2, 3)]
    assert [bool(line) for line in lines] == [False] * 4 + [True, False, False]
    assert lines[4] == (
        f"steps waited 7.0% of their time in cycle 1: 0.05 s a step for {CAUSES[cause]}, 0.02 s a step for "
        f"{CAUSES[other]}"
    )
    assert not any(SlowSteps().add(report_of(cycle, {cause: 0.04}), 1.0) for cycle in (0, 1, 2))


def test_a_synchronized_device_is_not_counted_twice():
    assert _together({"synchronized": 0.3}, {"between_steps": 0.4, "reduction": 0.0}) == {
        "between_steps": pytest.approx(0.1), "synchronized": 0.3,
    }  # fmt: skip
