"""report.html: one file, everything in it, the numbers of the run; and the pictures' details."""

from __future__ import annotations

import base64
import json
import math
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from hift_ds.cli.main import main
from hift_ds.report.plots import figures, groups_figure, loss_figure, memory_figure, percent_text, round_ticks
from hift_ds.report.run_summary import GroupMemory, read_run

GROUPS = ["embed", "layers.0", "layers.1", "norm+lm_head"]


def write(folder, num_steps=40, **changes):
    """A run folder: metrics of ``num_steps`` steps in cycles over GROUPS, an evaluation every ten."""
    folder.mkdir(exist_ok=True)
    lines = []
    for step in range(num_steps + 1):
        group = (step - 1) % len(GROUPS)
        if step:
            lines.append({
                "step": step, "step_time_s": 2.0, "stalled_s": 0.01, "cycle": (step - 1) // len(GROUPS), "group": group,
                "group_name": GROUPS[group], "loss": 3 - 0.01 * step, "lr": 2e-5, "grad_norm": 2.0**group,
                "tokens_per_s": 500.0,
                "state_bytes_in": 5, "state_bytes_out": 5, "peak_memory_gib": 5.0 + group,
                "forecast_memory_gib": 5.5 + group,
                **changes,
            })  # fmt: skip
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": 3.5 - 0.02 * step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups = [
        {
            "index": i,
            "name": name,
            "numel": 1000,
            "params": [f"{name}.weight"],
            "moved": 0.0 if i == 1 else 30.0,
            "norm": 10.0,
        }
        for i, name in enumerate(GROUPS)
    ]
    (folder / "groups.json").write_text(json.dumps(groups))
    updates = {f"{name}.weight": (0 if i == 1 else 10) for i, name in enumerate(GROUPS)}
    coverage = {"num_steps": num_steps, "num_parameters": 4, "never_updated": ["layers.0.weight"], "updates": updates}
    (folder / "coverage.json").write_text(json.dumps(coverage))
    results = {
        "eval_loss": 2.7,
        "eval_loss_before": 3.5,
        "cycles": 10,
        "best_step": 30,
        "environment": {"torch": "9.9"},
    }
    (folder / "all_results.json").write_text(json.dumps(results))
    (folder / "run.yaml").write_text("model: {path: <b>base</b>}\ndata: {train: data.jsonl}\n")
    (folder / "deepspeed.json").write_text('{"hift": {"group_size": 1, "order": "bottom2up"}}')
    return folder


class Page(HTMLParser):
    """What a browser would see: texts, pictures, and anything that it would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for key, value in attributes if key in ("src", "href", "action", "data", "srcset")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_and_loads_nothing(tmp_path, capsys):
    folder = write(tmp_path / "first")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and "url(" not in text and "@import" not in text and "<script" not in text
    assert len(page.loads) == 3  # loss, groups, memory: the steps waited 0.5 % of their time, which is a number
    for source in page.loads:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG")
    words = " ".join(" ".join(page.texts).split())
    for expected in (
        "first", "<b>base</b> on data.jsonl, HiFT; finished at step 40", "3.500 → 2.700 held-out loss",
        "75% of the trainable",
        "1 trainable tensors were never updated, such as layers.0.weight",
        "8.00 GiB peak memory", "0.5% of the time steps waited",
        "500 tokens a second", "2.9000 (best, kept)", "norm+lm_head 1,000 10 300 8.00 8.50", "torch 9.9",
        f"hift-ds chat {folder}",
    ):  # fmt: skip
        assert expected in words, expected


def test_a_run_that_has_only_begun_has_a_page(tmp_path, capsys):
    folder = write(tmp_path / "begun")
    for name in ("all_results.json", "coverage.json", "groups.json", "run.yaml", "deepspeed.json"):
        (folder / name).unlink()
    assert main(["report", str(folder)]) == 0
    words = " ".join(Page((folder / "report.html").read_text()).texts)
    assert "not finished at step 40" in words and "What next" not in words
    (folder / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert main(["report", str(folder)]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_it(tmp_path):
    """Without a network; every picture decodes."""
    folder = write(tmp_path / "first")
    assert main(["report", str(folder)]) == 0
    page = folder / "report.html"
    probe = "<script>document.title = [...document.images].map(i => i.naturalWidth > 500).join()</script>"
    page.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:9", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", page.as_uri()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "<title>true,true,true</title>" in done.stdout, done.stderr[-500:]


# -- the pictures --------------------------------------------------------------------------------------------


def labels_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_title_best_model_and_whole_ticks(tmp_path):
    run = read_run(write(tmp_path / "first"))
    figure = figures(run)["loss"]
    top, bottom = figure.axes[:2]
    assert figure.get_suptitle() == "first"
    assert "best: 2.9 at step 30, kept" in labels_of(top)
    figure.draw_without_rendering()
    assert not bottom.yaxis.get_offset_text().get_text()  # nothing stands above the axis
    ticks = [float(tick.get_text()) for tick in bottom.get_yticklabels()]
    assert len(ticks) >= 3 and ticks[0] == 0 and ticks == pytest.approx(list(bottom.get_yticks()))


@pytest.mark.parametrize(("cycles", "lines"), [(10, 9), (40, 0)])
def test_cycles_do_not_hatch(tmp_path, cycles, lines):
    metrics = read_run(write(tmp_path / "first", num_steps=4 * cycles)).metrics
    upright = [
        line
        for line in loss_figure(metrics).axes[0].lines
        if len(set(line.get_xdata())) == 1 and line.get_zorder() == 0
    ]
    assert len(upright) == lines


def test_gradient_norms_have_round_ticks_and_percents_no_exponent(tmp_path):
    assert round_ticks(0.7, 31) == [1, 2, 5, 10, 20]
    assert round_ticks(1e-6, 1e3) == pytest.approx([10.0**e for e in range(-6, 4)][::2])
    assert round_ticks(1.1, 1.4) == [1.1, 1.4]
    assert round_ticks(3.1, 7.5) == [4, 5, 6, 7]
    assert [percent_text(value) for value in (183.7, 3700.0, 2.71, 0.0312)] == ["180", "3,700", "2.7", "0.031"]
    run = read_run(write(tmp_path / "first"))
    steps = [step for step in run.metrics.steps if step["group"] != 1]
    texts = [text.get_text().strip() for text in groups_figure(steps, run.groups).axes[1].texts]
    assert texts == ["300", "never trained", "300", "300"]
    texts = [text.get_text().strip() for text in groups_figure(run.metrics.steps, run.groups).axes[1].texts]
    assert texts[1] == "0"  # it had turns, and did not move


def test_memory_beside_its_forecast():
    axes = memory_figure([GroupMemory("embed", 7.0, 8.0), GroupMemory("head", 6.0, None)]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [7.0, 6.0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[8.0, 8.0]]
    assert math.isclose(axes.get_xlim()[1], 8.16) and "forecast: at most" in labels_of(axes)
    assert "peak memory" in axes.get_title(loc="left") and "process" not in axes.get_xlabel()


def test_equal_bars_of_a_run_on_a_cpu_are_explained(tmp_path):
    run = read_run(write(tmp_path / "cpu", peak_memory_gib=5.0, forecast_memory_gib=None, memory_of_process=True))
    axes = figures(run)["memory"].axes[0]
    assert axes.get_title(loc="left") == "cpu: memory of the process, no accelerator"
    assert "alike for every group" in axes.get_xlabel() and not axes.lines
