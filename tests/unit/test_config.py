import pytest

from hift_ds.config import HiFTConfig, check_against_deepspeed, parse_block
from hift_ds.errors import ConfigError


def test_defaults():
    config = parse_block({})
    assert (config.group_size, config.order, config.reshuffle, config.seed) == (1, "bottom2up", False, 0)
    assert (config.steps_per_group, config.groups, config.always_active) == (1, None, [])
    assert (config.lr_update, config.master_weights) == ("cycle", True)
    assert (config.state.residency, config.state.step_on, config.state.pin_memory) == ("host", "device", True)


@pytest.mark.parametrize(
    "block,expected",
    [
        ({"group_sise": 2}, "unknown key 'group_sise'; did you mean 'group_size'?"),
        ({"state": {"residence": "host"}}, "unknown key 'residence'; did you mean 'residency'?"),
        ({"group_size": 0}, "hift.group_size"),
        ({"group_size": "two"}, "got 'two'"),
        ({"order": "down2up"}, "hift.order"),
        ({"reshuffle": True}, "order: random"),
        ({"stochastic_rounding": True}, "master_weights: false"),
        ({"groups": [["a"]], "group_size": 2}, "groups and group_size"),
        ({"lr_update": "epoch"}, "hift.lr_update"),
        ({"steps_per_group": 0}, "hift.steps_per_group"),
        ("on", "expected an object"),
    ],
)
def test_bad_blocks_are_one_line_that_names_the_key(block, expected):
    with pytest.raises(ConfigError) as error:
        parse_block(block)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "block,ds,expected",
    [
        ({}, {"hybrid_engine": {"enabled": True}}, "hybrid_engine"),
        ({}, {"pipeline": {"stages": 2}}, "pipeline"),
        (
            {},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer",
        ),
        ({}, {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, '"stage": 3'),
        ({}, {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme_path"),
        (
            {},
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}},
            "expected cpu, nvme or none",
        ),
        ({}, {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({}, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
        ({}, {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "choose one"),
        ({}, {"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"master_weights": False}, {"fp16": {"enabled": True}}, "master_weights"),
        ({"master_weights": False, "stochastic_rounding": True}, {}, "stochastic_rounding"),
        ({}, {"tensor_parallel": {"autotp_size": 2}}, "autotp_size"),
        ({}, {"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({}, {"amp": {"enabled": True}}, "amp"),
        ({}, {"sparse_gradients": True}, "sparse_gradients"),
    ],
)
def test_contradictions_with_deepspeed_keys_are_refused_by_name(block, ds, expected):
    with pytest.raises(ConfigError, match=expected):
        check_against_deepspeed(parse_block(block), ds)


def test_plain_deepspeed_keys_are_fine():
    check_against_deepspeed(
        HiFTConfig(),
        {
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}},
            "bf16": {"enabled": True},
            "fp16": {"enabled": False},
            "gradient_clipping": 1.0,
        },
    )
