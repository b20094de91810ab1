"""The group size that a run gets where its file says nothing: by the length of the run and the memory of the device."""

from __future__ import annotations

import json

import pytest

from hift_ds.train import finetune as finetuning
from hift_ds.train.finetune import finetune
from hift_ds.train.group_size import ENOUGH_TURNS, FEWEST_GROUPS, choose_group_size
from hift_ds.train.run_config import load_run_config
from tests.unit.test_launch import inputs, own_cache, write_run  # noqa: F401  (fixtures)

UNITS = 32
GROUPS = [[10 * m] * (UNITS // m) + [10 * (UNITS % m)] * (UNITS % m > 0) for m in range(1, 12)]


def test_the_smallest_groups_that_get_enough_turns():
    for steps in (10, 64, 65, 100, 200, 511, 512, 10_000):
        choice = choose_group_size(GROUPS, steps)
        sizes = [m for m, groups in enumerate(GROUPS, start=1) if len(groups) >= FEWEST_GROUPS]
        enough = [m for m in sizes if steps >= ENOUGH_TURNS * len(GROUPS[m - 1])]
        expected = len(GROUPS[min(enough) - 1]) if enough else FEWEST_GROUPS
        assert choice.num_groups == len(GROUPS[choice.group_size - 1]) == expected, steps
    assert choose_group_size(GROUPS, 512).group_size == 1
    assert choose_group_size(GROUPS, 511).group_size == 2


def test_memory_limits_it_and_one_unit_is_always_allowed():
    choice = choose_group_size(GROUPS, 64, lambda numel: numel <= 30)
    assert (choice.group_size, choice.fits_more) == (3, False)
    assert "larger groups would not fit" in choice.line()
    assert choose_group_size(GROUPS, 64, lambda numel: False).group_size == 1


def test_a_size_that_makes_no_fewer_groups_is_not_taken():
    assert choose_group_size([[1] * 5, [2, 2, 1], [3, 2]], 3).group_size == 1  # three groups are too few
    assert choose_group_size([[1] * 9, [2] * 4 + [1], [3] * 3], 3).group_size == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 2), ({"group_size": 1}, 1), ({"groups": [["embed"], ["layers", "norm", "head"]]}, 1)],
)
def test_a_run_says_what_it_chose_and_goes_on_with_it(inputs, tmp_path, capsys, monkeypatch, given, expected):  # noqa: F811
    monkeypatch.setattr(finetuning, "_load_model", _stop)
    # nine units: embedding, seven blocks, norm with head
    import model_zoo
    from tests.helpers.tiny_tokenizers import byte_level

    folder = tmp_path / "model"
    model_zoo.tiny.build("llama", vocab_size=280, max_position_embeddings=256, num_hidden_layers=7).save_pretrained(
        folder
    )
    byte_level().save_pretrained(folder)
    seen = []
    settle = finetuning.settle_group_size

    def watch(checked, arguments, *rest):
        settle(checked, arguments, *rest)
        seen.append(arguments.deepspeed_plugin.deepspeed_config["hift"]["group_size"])
        assert arguments.deepspeed["hift"]["group_size"] == seen[-1]
        checked.run.output_dir.mkdir(exist_ok=True)
        (checked.run.output_dir / "deepspeed.json").write_text(json.dumps({"hift": {"group_size": 3}}))
        settle(checked, arguments, 400, True, print)  # of a run that began with three units in a group
        again = arguments.deepspeed["hift"]["group_size"]
        assert again == (seen[-1] if given else 3)

    monkeypatch.setattr(finetuning, "settle_group_size", watch)
    file = write_run(inputs, tmp_path / "run", model__path=str(folder), hift=given)
    with pytest.raises(_Stopped):
        finetune(load_run_config(file))
    assert seen == [expected]
    assert ("group size 2: 5 layer groups, 2.4 turns each" in capsys.readouterr().out) == (not given)


class _Stopped(Exception):
    pass


def _stop(*args):
    raise _Stopped
