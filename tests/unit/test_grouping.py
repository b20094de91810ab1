"""Groups: complete, disjoint, in order; what is frozen or tied; explicit patterns and their errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import model_zoo
from hift_ds.errors import ConfigError, GroupingError
from hift_ds.layers.arch import ArchSpec
from hift_ds.layers.grouping import Partition, describe, partition_model
from tests.helpers.toy import Toy

NUM_BLOCKS = {"t5": 5, ("t5", "token_classification"): 3}  # the latter without a decoder; 3 everywhere else
ZOO = [(family.name, head) for family in model_zoo.FAMILIES.values() for head in family.heads]


def groups_of(partition: Partition) -> list[list[str]]:
    return [list(group.param_names) for group in partition.groups]


def assert_complete(model: nn.Module, partition: Partition) -> None:
    """Every trainable parameter is in exactly one group, in the order of named_parameters()."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [*partition.groups, *([partition.always] if partition.always else [])]
    grouped = [name for group in groups for name in group.param_names]
    assert sorted(grouped) == sorted(trainable)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for group in groups:
        assert list(group.param_names) == [name for name in trainable if name in group.param_names]
        assert group.numel == sum(sizes[name] for name in group.param_names)
    names = [group.name for group in groups]
    assert len(set(names)) == len(names) and all(0 < len(name) <= 60 for name in names)
    assert [group.index for group in partition.groups] == list(range(len(partition.groups)))


@pytest.mark.parametrize(("family", "head"), ZOO)
@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_every_family_is_cut_completely(family: str, head: str, group_size: int) -> None:
    model = model_zoo.tiny.build(family, head, device="meta")
    partition = partition_model(model, group_size=group_size)
    assert_complete(model, partition)
    num_units = NUM_BLOCKS.get((family, head), NUM_BLOCKS.get(family, 3)) + 2
    assert len(partition.groups) == math.ceil(num_units / group_size)
    parameters = dict(model.named_parameters())
    bottom, top = ([parameters[name] for name in partition.groups[index].param_names] for index in (0, -1))
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert any(parameter is embedding for parameter in bottom)
    if output is None:  # a task head, registered last
        assert any(parameter is list(parameters.values())[-1] for parameter in top)
    elif output.weight is not embedding:  # an untied language head
        assert any(parameter is output.weight for parameter in top)


def test_membership_does_not_depend_on_the_last_group() -> None:
    """n = 5 units, m = 2: k = ceil(5 / 2) = 3, the last group ragged; the authors' code drifts."""
    partition = partition_model(Toy(num_layers=3), group_size=2)
    assert [group.name for group in partition.groups] == ["embed..layers.0", "layers.1-2", "norm+head"]
    assert groups_of(partition)[2] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


def test_a_group_size_above_the_number_of_units_makes_one_group() -> None:
    (group,) = partition_model(Toy(), group_size=100).groups
    assert group.name == "embed..norm+head"


@pytest.mark.parametrize("group_size", [0, -1, 1.0, True, "2"])
def test_a_bad_group_size_is_refused(group_size: object) -> None:
    with pytest.raises(GroupingError, match=r"group_size: expected a whole number of at least 1"):
        partition_model(Toy(), group_size=group_size)


def test_tied_weights_belong_to_the_embedding() -> None:
    partition = partition_model(Toy(tied=True))
    assert groups_of(partition)[0] == ["embed.weight"]
    assert groups_of(partition)[-1] == ["norm.weight", "norm.bias"]


def test_tied_weights_belong_to_the_embedding_also_when_the_head_is_registered_first() -> None:
    class HeadFirst(Toy):
        def __init__(self) -> None:
            super().__init__(tied=True)
            children = dict(self._modules)
            self._modules.clear()
            for name in ("head", "layers", "norm", "embed"):
                self._modules[name] = children[name]

    partition = partition_model(HeadFirst())
    assert groups_of(partition)[0] == ["head.weight"]  # the name under which named_parameters() knows it
    assert groups_of(partition)[-1] == ["norm.weight", "norm.bias"]


def test_what_is_frozen_stays_out_and_a_frozen_unit_vanishes() -> None:
    model = Toy(num_layers=3)
    model.embed.requires_grad_(False)
    model.layers[1].requires_grad_(False)
    model.layers[2].up.bias.requires_grad_(False)
    partition = partition_model(model)
    assert_complete(model, partition)
    assert [group.name for group in partition.groups] == ["layers.0", "layers.2", "norm+head"]
    assert len(partition_model(model, group_size=2).groups) == 2


def test_nothing_trainable_is_an_error() -> None:
    with pytest.raises(GroupingError, match="Toy: no parameter is trainable"):
        partition_model(Toy().requires_grad_(False))


def test_order_of_an_encoder_decoder() -> None:
    names = [group.name for group in partition_model(model_zoo.tiny.build("t5")).groups]
    encoder = [f"encoder.block.{i}" for i in range(3)]
    assert names == ["embed", *encoder, "decoder.block.0", "decoder.block.1", "final_layer_norm"]


def test_names_tell_what_is_in_a_group() -> None:
    def names(family: str, head: str | None = None, **kwargs: int) -> list[str]:
        return [group.name for group in partition_model(model_zoo.tiny.build(family, head), **kwargs).groups]

    assert names("llama") == ["embed", "layers.0", "layers.1", "layers.2", "norm+lm_head"]
    assert names("bert", "sequence_classification")[-1] == "pooler+classifier"
    assert names("gpt2", group_size=4) == ["embed..h.2", "ln_f"]
    assert names("t5", group_size=2)[1:3] == ["encoder.block.1-2", "decoder.block.0-1"]
    sequence = nn.Sequential(nn.Embedding(5, 4), *(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(2)))
    assert [group.name for group in partition_model(sequence).groups] == ["embed", "block.1", "block.2"]
    mlp = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert [group.name for group in partition_model(mlp).groups] == ["block.0", "block.1", "2"]


def test_matrices_are_the_two_dimensional_weights_of_blocks() -> None:
    toy = partition_model(Toy(num_layers=2)).matrices
    assert toy == {f"layers.{i}.{part}.weight" for i in range(2) for part in ("up", "down")}
    t5 = partition_model(model_zoo.tiny.build("t5")).matrices
    assert "encoder.block.0.layer.0.SelfAttention.q.weight" in t5
    assert not [name for name in t5 if "relative_attention_bias" in name or "shared" in name or "norm" in name]
    model = model_zoo.tiny.build("llama")
    model.model.layers[0].requires_grad_(False)
    assert not [name for name in partition_model(model).matrices if ".layers.0." in name]


# ----------------------------------------------------------------------------------------------------------
# always_active


def test_always_active_parameters_leave_their_groups() -> None:
    model = Toy(num_layers=2)
    partition = partition_model(model, always_active=["^embed", "^head", r"norm\.weight"])
    assert_complete(model, partition)
    assert partition.always.index == -1 and partition.always.name == "always"
    assert partition.always.param_names == ("embed.weight", "norm.weight", "head.weight", "head.bias")
    assert groups_of(partition)[-1] == ["norm.bias"]
    assert [group.name for group in partition.groups] == ["layers.0", "layers.1", "norm"]
    assert partition_model(model).always is None


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["nothing"], "always_active: 'nothing' matches no parameter name, such as 'embed.weight'"),
        (["["], r"always_active: '\[' is not a regular expression"),
        ([r"."], "always_active: matches every trainable parameter"),
        ("embed", "always_active: expected a list of regular expressions, got 'embed'"),
        ([r"head\.weight"], "'head.weight' is tied to 'embed.weight', the name it is trained under"),
        ([r"norm"], r"'norm.weight' is frozen \(requires_grad=False\)"),
    ],
)
def test_bad_always_active_is_one_clear_line(patterns: list[str], message: str) -> None:
    model = Toy(tied=True)
    model.norm.requires_grad_(False)
    with pytest.raises(GroupingError, match=message) as caught:
        partition_model(model, always_active=patterns)
    assert isinstance(caught.value, ConfigError) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------
# explicit groups


def test_patterns_make_the_groups_bottom_to_top() -> None:
    model = Toy(num_layers=2)
    patterns = [["^head", "norm"], [r"layers\.\d\.down", r"layers\.\d\.gain"], [r"\.up\.", "embed"]]
    partition = partition_model(model, patterns=patterns)
    assert_complete(model, partition)
    assert groups_of(partition) == [
        ["norm.weight", "norm.bias", "head.weight", "head.bias"],
        [f"layers.{i}.{part}" for i in range(2) for part in ("gain", "down.weight")],
        ["embed.weight", *(f"layers.{i}.up.{part}" for i in range(2) for part in ("weight", "bias"))],
    ]
    assert partition.groups[0].name == "^head|norm"
    assert partition.matrices == partition_model(model).matrices


def test_two_patterns_of_one_group_may_overlap() -> None:
    partition = partition_model(Toy(), patterns=[["embed", r"embed\.weight"], ["layers", "norm", "head"]])
    assert groups_of(partition)[0] == ["embed.weight"]


def test_frozen_parameters_need_no_pattern() -> None:
    model = Toy()
    model.embed.requires_grad_(False)
    assert_complete(model, partition_model(model, patterns=[["layers"], ["norm", "head"]]))


def test_patterns_with_always_active() -> None:
    model = Toy()
    partition = partition_model(model, patterns=[["layers"], ["norm"]], always_active=["embed", "head"])
    assert_complete(model, partition)


def test_names_of_pattern_groups_are_short_and_unique() -> None:
    long = "|".join(f"layers.{i}.up.weight" for i in range(3))
    patterns = [[long], [long.replace("up", "down")], ["gain", "bias", "embed", "norm", r"head\.weight"]]
    model = Toy()
    assert_complete(model, partition_model(model, patterns=patterns))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ([["embed"], ["layers"], ["head"]], "groups: 'norm.weight' is trainable and matched by no group"),
        (
            [["embed"], ["layers"], ["norm", "head"], [r"up\.bias"]],
            r"groups: 'layers.0.up.bias' is matched by groups\[1\] and by groups\[3\]",
        ),
        ([["embed", "wpe"], ["layers", "norm", "head"]], r"groups\[0\]: 'wpe' matches no parameter name"),
        ([["embed"], ["(layers", "norm", "head"]], r"groups\[1\]: '\(layers' is not a regular expression"),
        ([["embed"], [3]], r"groups\[1\]: 3 is not a regular expression"),
        ([], r"groups: expected a list of lists of regular expressions, got \[\]"),
        ("embed", "groups: expected a list of lists of regular expressions, got 'embed'"),
        (["embed", "layers"], r"groups\[0\]: expected a list of regular expressions, got 'embed'"),
        ([["embed"], []], r"groups\[1\]: expected a list of regular expressions, got \[\]"),
    ],
)
def test_bad_groups_are_one_clear_line(patterns: list, message: str) -> None:
    with pytest.raises(GroupingError, match=message) as caught:
        partition_model(Toy(), patterns=patterns)
    assert "\n" not in str(caught.value)


def test_a_group_of_always_active_parameters_alone_is_refused() -> None:
    with pytest.raises(GroupingError, match=r"groups\[0\]: 'embed' .* 'embed.weight' is already always_active"):
        partition_model(Toy(), patterns=[["embed"], ["layers", "norm", "head"]], always_active=["embed"])


# ----------------------------------------------------------------------------------------------------------
# declarations and descriptions


def test_a_declaration_overrides_structure() -> None:
    arch = ArchSpec(embed=("embed", "layers.0"), blocks=(("layers.1", "layers.2.up"), ("layers.2",)))
    groups = groups_of(partition_model(Toy(num_layers=3), arch=arch))
    assert [sorted({name.split(".weight")[0].split(".bias")[0] for name in group}) for group in groups] == [
        ["embed", "layers.0.down", "layers.0.gain", "layers.0.up"],
        ["layers.1.down", "layers.1.gain", "layers.1.up", "layers.2.up"],
        ["layers.2.down", "layers.2.gain"],
        ["head", "norm"],  # named nowhere: head
    ]
    with pytest.raises(GroupingError, match="'wte'"):
        partition_model(Toy(), arch=ArchSpec(("wte",), (("layers.0",),)))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("bottom2up", ["embed", "layers.0", "layers.1", "norm+head"]),
        ("top2down", ["norm+head", "layers.1", "layers.0", "embed"]),
    ],
)
def test_described_in_update_order(order: str, expected: list[str]) -> None:
    described = describe(partition_model(Toy(num_layers=2)), order=order)
    assert [group["name"] for group in described] == expected
    assert set(described[0]) == {"name", "numel", "params"}


def test_described_in_random_order_by_seed() -> None:
    partition = partition_model(Toy(num_layers=6), always_active=["embed"])
    orders = [[g["name"] for g in describe(partition, order="random", seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert orders[0][-1] == "always"


def test_a_parameter_of_no_dimension_and_a_bare_module() -> None:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(1.0))

    (group,) = partition_model(Scalar()).groups
    assert (group.param_names, group.numel) == (("gain",), 1)
