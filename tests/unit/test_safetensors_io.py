"""Checkpoints in and out: names as the format has them, memory bounded, damage named."""

from __future__ import annotations

import json
import shutil
import stat
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hift_ds.errors import CheckpointError, ConfigError
from hift_ds.hf import export
from hift_ds.hf.export import export_model, parse_size
from hift_ds.hf.safetensors_folder import (
    check_weights,
    load_pretrained,
    note_filled,
    stream_weights,
    tensor_dtypes,
)
from hift_ds.hf.weight_distances import weight_distances
from hift_ds.hf.weight_names import plan_names, skeleton
from model_zoo import tiny
from tests.helpers import tiny_tokenizers

FAMILIES = ["llama", "mixtral", "gpt2", "opt", "t5", "gpt_neox", "bert", "roberta", "deberta_v2", "gemma3"]


def load_weights(model, folder):
    """Copy a folder's weights into ``model``, each straight to its parameter, which keeps its identity."""
    targets, filled = model.state_dict(keep_vars=True), {}
    with torch.no_grad():
        for name, tensor in stream_weights(model, folder):
            note_filled(filled, targets[name], name, folder, targets[name], tensor)
            targets[name].copy_(tensor)


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def llama():
    return tiny.build("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_export_writes_what_transformers_would_and_reloads_without_a_missing_weight(family, tmp_path):
    model = tiny.build(family)
    model.save_pretrained(tmp_path / "theirs")
    # Parameters in the wrong order and each tied one once, as an engine that gathers group by group gives
    # them.
    weights = list(model.named_parameters())[::-1] + [
        (name, value) for name, value in model.state_dict().items() if name not in dict(model.named_parameters())
    ]
    export_model(model, tmp_path / "ours", tensors=weights, max_shard_size="10KB")

    assert same(folder_tensors(tmp_path / "ours"), folder_tensors(tmp_path / "theirs"))
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_built_from_the_config_alone_gives_the_same_names_and_loads_the_same_weights(family, tmp_path):
    model = tiny.build(family, seed=3)
    model.save_pretrained(tmp_path)
    assert plan_names(skeleton(model.config)).saved == plan_names(model).saved

    other = tiny.build(family, seed=4)
    parameters = dict(other.named_parameters())
    load_weights(other, tmp_path)
    assert same(other.state_dict(), model.state_dict())
    assert all(parameters[name] is value for name, value in other.named_parameters())


def test_what_from_pretrained_reads_is_read(tmp_path, llama):
    """A shard in a folder of its own, and the tables of rotary positions that old folders have for each layer."""
    llama.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    parts = {
        "a.safetensors": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        "sub/b.safetensors": weights,
    }
    (tmp_path / "sub").mkdir()
    for file, part in parts.items():
        save_file(part, tmp_path / file, metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {k: f for f, part in parts.items() for k in part}}))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert same(load_pretrained(tmp_path).state_dict(), expected)
    other = tiny.build("llama", seed=4)
    load_weights(other, tmp_path)
    assert same(other.state_dict(), expected)
    for outside in ("../b.safetensors", str(tmp_path / "sub" / "b.safetensors")):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, outside)}))
        with pytest.raises(CheckpointError, match="outside of the folder"):
            check_weights(tmp_path)


def test_mixtral_leaves_with_the_names_of_the_published_checkpoints(tmp_path):
    export_model(tiny.build("mixtral"), tmp_path / "out")
    names = set(folder_tensors(tmp_path / "out"))
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert not any("gate_up_proj" in name or ".mlp." in name for name in names)


def test_weights_that_convert_only_together_wait_for_each_other(tmp_path):
    """hrm_text keeps query, key, value and gate apart in memory and fused on disk."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if "hrm_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have the model")
    config = AutoConfig.for_model(
        "hrm_text",
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        num_layers_per_stack=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    plan = plan_names(model)
    assert max(len(names) for names in plan.sets) > 1
    assert len(plan.sets) > 1, "the whole model in one set is not streaming"

    model.save_pretrained(tmp_path / "theirs")
    export_model(model, tmp_path / "ours", tensors=list(model.named_parameters())[::-1])
    assert same(folder_tensors(tmp_path / "ours"), folder_tensors(tmp_path / "theirs"))
    other = AutoModelForCausalLM.from_config(config)
    load_weights(other, tmp_path / "ours")
    assert same(other.state_dict(), model.state_dict())


def test_every_saved_tensor_belongs_to_exactly_one_parameter():
    for family in ("mixtral", "gpt2", "gpt_neox"):
        model = tiny.build(family)
        plan = plan_names(model)
        owned = [saved for name, _ in model.named_parameters() for saved in plan.saved_names(name)]
        buffers = {name for name, _ in model.named_buffers()}
        assert sorted(owned) == sorted(set(plan.saved) - buffers)


def test_shards_respect_the_limit_and_the_index_finds_every_tensor(llama, tmp_path):
    files = export_model(llama, tmp_path / "out", max_shard_size=6000)
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in folder_tensors(tmp_path / "out").values())
    for file in files:
        held = load_file(file)
        assert sum(t.nbytes for t in held.values()) <= 6000 or len(held) == 1
        assert all(index["weight_map"][name] == file.name for name in held)
    assert set(index["weight_map"]) == set(folder_tensors(tmp_path / "out"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3


def test_no_more_than_a_shard_and_one_conversion_set_is_held(tmp_path):
    model = skeleton(tiny.config("mixtral"))
    sizes = {name: p.numel() * 4 for name, p in model.named_parameters()}
    limit = 20_000
    alive: dict[str, int] = {}
    peak = 0

    def gathered():
        nonlocal peak
        for name, parameter in model.named_parameters():
            tensor = torch.ones(parameter.shape)
            alive[name] = sizes[name]
            weakref.finalize(tensor.untyped_storage(), alive.pop, name)
            peak = max(peak, sum(alive.values()))
            yield name, tensor
            del tensor

    export_model(model, tmp_path / "out", tensors=gathered(), max_shard_size=limit)
    assert sum(sizes.values()) > 3 * limit, "the model must not fit the bound by chance"
    assert peak <= limit + 2 * max(sizes.values())


def test_dtypes_are_those_of_the_input_tensor_by_tensor(llama, tmp_path):
    source = llama.state_dict()
    mixed = {n: t.to(torch.float32 if "norm" in n else torch.bfloat16) for n, t in source.items()}
    (tmp_path / "in").mkdir()
    save_file(mixed, tmp_path / "in" / "model.safetensors")
    export_model(llama, tmp_path / "out", dtype=tensor_dtypes(tmp_path / "in"))
    assert {n: t.dtype for n, t in folder_tensors(tmp_path / "out").items()} == {n: t.dtype for n, t in mixed.items()}

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_one_dtype_for_all_leaves_integers_alone(tmp_path):
    model = tiny.build("llama")
    model.register_buffer("counts", torch.arange(3))
    export_model(model, tmp_path / "out", dtype=torch.float16)
    dtypes = {t.dtype for n, t in folder_tensors(tmp_path / "out").items() if n != "counts"}
    assert dtypes == {torch.float16}
    assert folder_tensors(tmp_path / "out")["counts"].dtype == torch.int64


def test_a_tie_transformers_does_not_know_is_written_under_both_names(llama, tmp_path):
    llama.model.layers[1].mlp.up_proj.weight = llama.model.layers[0].mlp.up_proj.weight
    export_model(llama, tmp_path / "out", tensors=llama.named_parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(again.state_dict(), llama.state_dict())


def test_a_failed_export_leaves_the_good_one_and_no_litter(llama, tmp_path):
    out = tmp_path / "out"
    export_model(llama, out, max_shard_size="10KB")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def breaks():
        yield from list(llama.named_parameters())[:9]
        raise RuntimeError("rank 1 died")

    with pytest.raises(RuntimeError, match="rank 1 died"):
        export_model(llama, out, tensors=breaks(), max_shard_size="5KB")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_exporting_again_removes_stale_shards_and_nothing_else(llama, tmp_path):
    out = tmp_path / "out"
    export_model(llama, out, max_shard_size="5KB")
    (out / "notes.txt").write_text("mine")
    export_model(llama, out)
    assert [p.name for p in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine"
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (out / "config.json").stat().st_mode
    )


def test_a_model_can_be_exported_over_the_files_it_is_mapped_from(llama, tmp_path):
    export_model(llama, tmp_path / "m")
    mapped = load_pretrained(tmp_path / "m")
    with torch.no_grad():
        mapped.model.norm.weight.add_(1.0)
    assert same(folder_tensors(tmp_path / "m"), llama.state_dict()), "training must not write into the input"
    export_model(mapped, tmp_path / "m")
    assert same(folder_tensors(tmp_path / "m"), mapped.state_dict())


def test_incomplete_or_foreign_weights_are_refused(llama, tmp_path):
    weights = list(llama.named_parameters())
    with pytest.raises(CheckpointError, match="1 weights of LlamaForCausalLM were not given.*lm_head.weight"):
        export_model(llama, tmp_path / "a", tensors=[w for w in weights if w[0] != "lm_head.weight"])
    with pytest.raises(CheckpointError, match="'module.x'.*no parameter of that name"):
        export_model(llama, tmp_path / "a", tensors=[("module.x", torch.ones(1))])
    assert not (tmp_path / "a").exists()


def test_lack_of_space_is_found_before_anything_is_written(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, 1 are free"):
        export_model(llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_generation_settings_transformers_refuses_to_save_go_through(llama, tmp_path):
    llama.generation_config.temperature = 0.6
    llama.generation_config.do_sample = False
    export_model(llama, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


def test_the_tokenizer_goes_along_under_a_class_name_that_transformers_4_knows(llama, tmp_path):
    tokenizer = tiny_tokenizers.byte_level()
    export_model(llama, tmp_path / "out", tokenizer=tokenizer)
    assert (
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "naïve <|im_end|> 你好"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)


def test_sizes():
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size("1.5GiB") == 3 * 2**29
    assert parse_size("200mb") == 2 * 10**8
    assert parse_size(123) == 123
    for bad in ("5 apples", "-1GB", "0", "GB"):
        with pytest.raises(ConfigError, match="max_shard_size"):
            parse_size(bad)


# --- bad input ----------------------------------------------------------------------------------------


@pytest.fixture
def sharded(llama, tmp_path):
    export_model(llama, tmp_path / "in", max_shard_size="6KB")
    return tmp_path / "in"


def test_headers_tell_shapes_and_dtypes(llama, sharded):
    headers = check_weights(sharded)
    assert {n: h.shape for n, h in headers.items()} == {n: tuple(t.shape) for n, t in llama.state_dict().items()}
    assert sum(h.numel for h in headers.values()) == sum(p.numel() for p in llama.parameters())


@pytest.mark.parametrize("load", [check_weights, load_pretrained])
def test_damaged_folders_are_named(sharded, load):
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-7])
    with pytest.raises(CheckpointError, match=f"{victim.name}: truncated or not a safetensors file"):
        load(sharded)
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim.name} is missing"):
        load(sharded)
    victim.write_bytes(whole)
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost"] = victim.name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lacks tensor 'model.ghost'"):
        load(sharded)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        load(sharded)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pickled \(pytorch_model.bin\).*use_safetensors=False"):
        check_weights(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        check_weights(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        check_weights(tmp_path)


def change(folder: Path, edit) -> None:
    tensors = folder_tensors(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


WRONG = {
    "missing": (lambda t: t.pop("model.norm.weight"), "lacks.*model.norm.weight"),
    "unexpected": (lambda t: t.update(extra=torch.ones(2)), "tensor 'extra'"),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        r"model.norm.weight.*shape \(3,\)",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_weights_of_another_model_are_refused(llama, tmp_path, what):
    edit, message = WRONG[what]
    export_model(llama, tmp_path / "in")
    change(tmp_path / "in", edit)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path / "in")
    with pytest.raises(CheckpointError, match=message):
        list(stream_weights(llama, tmp_path / "in"))


def test_a_new_head_is_allowed_when_asked_for(llama, tmp_path):
    from transformers import AutoModelForSequenceClassification

    export_model(llama, tmp_path / "in")
    with pytest.raises(CheckpointError, match="lacks tensor 'score.weight'"):
        load_pretrained(tmp_path / "in", model_class=AutoModelForSequenceClassification)
    model = load_pretrained(
        tmp_path / "in",
        model_class=AutoModelForSequenceClassification,
        allow_missing=["^score"],
        allow_unexpected=["^lm_head"],
    )
    assert model.score.weight.shape[0] == 2


def test_tied_weights_that_differ_in_the_checkpoint_are_not_merged_in_silence(tmp_path):
    model = tiny.build("gpt2")
    export_model(model, tmp_path / "in")
    head = model.transformer.wte.weight.detach().clone()
    change(tmp_path / "in", lambda t: t.update({"lm_head.weight": head}))
    load_weights(model, tmp_path / "in")
    change(tmp_path / "in", lambda t: t.update({"lm_head.weight": head + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_weights(model, tmp_path / "in")


def test_distances_between_two_folders(llama, tmp_path):
    export_model(llama, tmp_path / "before", max_shard_size="6KB")
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.add_(0.5)
    export_model(llama, tmp_path / "after", dtype=torch.float64)
    for chunk in (7, 1 << 24):
        moved = weight_distances(tmp_path / "before", tmp_path / "after", chunk_numel=chunk)
        assert moved.keys() == before.keys()
        for name, (distance, norm) in moved.items():
            expected = 0.5 * before[name].numel() ** 0.5 if name.endswith("layers.1.mlp.down_proj.weight") else 0.0
            assert distance == pytest.approx(expected, rel=1e-6)
            assert norm == pytest.approx(before[name].double().norm().item(), rel=1e-6)

    change(tmp_path / "after", lambda t: t.update(buffer=t.pop("model.norm.weight")))
    assert weight_distances(tmp_path / "before", tmp_path / "after").keys() == before.keys() - {"model.norm.weight"}
    change(tmp_path / "after", lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:5].clone()}))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight': shape \(67, 16\) before, \(5, 16\) after"):
        weight_distances(tmp_path / "before", tmp_path / "after")


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "t5", "gpt_neox"])
def test_distances_by_parameter_whatever_the_files_call_it(family, tmp_path):
    model = tiny.build(family)
    export_model(model, tmp_path / "after")
    # As published checkpoints are: no base-model prefix, a tied weight's other name, a buffer nobody wants.
    prefix = model.base_model_prefix + "."
    change_to = {n.removeprefix(prefix): t for n, t in folder_tensors(tmp_path / "after").items()}
    if family == "gpt2":
        change_to["lm_head.weight"] = change_to.pop("wte.weight")
        change_to["h.0.attn.masked_bias"] = torch.ones(1)
    (tmp_path / "before").mkdir()
    save_file(change_to, tmp_path / "before" / "model.safetensors", metadata={"format": "pt"})
    moved = list(model.parameters())[-2]
    with torch.no_grad():
        norm = moved.double().norm().item()
        moved.mul_(1.5)
    export_model(model, tmp_path / "after")

    distances = weight_distances(tmp_path / "before", tmp_path / "after", model=skeleton(model.config))
    measured = {id(model.get_parameter(name)): pair for name, pair in distances.items()}
    assert measured.keys() == {id(p) for p in model.parameters()}
    for parameter in model.parameters():
        distance = measured[id(parameter)][0]
        assert distance == pytest.approx(0.5 * norm if parameter is moved else 0.0, rel=1e-5)


def test_an_export_names_no_code_that_it_does_not_bring(llama, tmp_path):
    """auto_map of an input whose class transformers has itself, as Phi-3's."""
    llama.config.auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    try:
        export_model(llama, tmp_path / "out")
    finally:
        del llama.config.auto_map
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
