"""``hift-ds export`` from an engine's own checkpoint (no config in it) and from a folder that says more."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import model_zoo.tiny as tiny
from hift_ds.cli.main import main
from tests.helpers.engines import ds_config, make_engine


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the input, engine checkpoint, bf16 weights, fp32 masters) of a tied LLaMA after three steps."""
    folder = tmp_path_factory.mktemp("export")
    model = tiny.build("llama", tie_word_embeddings=True)
    model.save_pretrained(folder / "input")
    batch = tiny.batch(model, rows=2)
    engine = make_engine(model, ds_config(rows=2, lr=1e-3, bf16={"enabled": True}))
    for _ in range(3):
        engine.backward(engine(**batch).loss)
        engine.step()
    engine.save_checkpoint(str(folder / "saved"))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masters = {}
    for group in engine.optimizer.groups.values():
        for chunk in group.chunks:
            tensors = engine.optimizer.store.read(chunk.id)
            for piece, record in zip(chunk.pieces, engine.optimizer.states.records[chunk.id], strict=True):
                masters[group.members[piece.member].name] = record.master.view(tensors).clone()
    engine.destroy()
    return folder / "input", folder / "saved", weights, masters


@pytest.mark.parametrize("inner", ["", "global_step3"])
def test_weights_as_trained_reload_with_transformers(trained, tmp_path, inner):
    source, saved, weights, _ = trained
    shutil.copy(source / "config.json", saved / "config.json")
    assert main(["export", str(saved / inner), str(tmp_path / "out"), "--max-shard-size", "4KB"]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    (saved / "config.json").unlink()


def test_auto_takes_the_inputs_dtype_and_fp32_the_masters(trained, tmp_path):
    source, saved, _, masters = trained
    arguments = ["export", str(saved), str(tmp_path / "out"), "--model", str(source)]
    for dtype in ("auto", "fp32"):
        assert main([*arguments, "--dtype", dtype]) == 0
        exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").named_parameters())
        assert all(torch.equal(exported[name].detach().flatten(), masters[name].flatten()) for name in masters)
    assert main([*arguments, "--dtype", "bf16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_run_folder_names_the_model_whose_dtype_counts(trained, tmp_path, monkeypatch):
    source, saved, _, masters = trained
    run = tmp_path / "run"
    shutil.copytree(saved / "global_step3", run / "checkpoint-3" / "global_step3")
    (run / "run.yaml").write_text("model: {path: input}\n")  # relative to the working directory
    shutil.copy(source / "config.json", run / "checkpoint-3" / "config.json")
    (run / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    (run / "checkpoint-3" / "latest").write_text("global_step3")
    monkeypatch.chdir(source.parent)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").named_parameters())
    assert all(torch.equal(exported[name].detach().flatten(), masters[name].flatten()) for name in masters)
    monkeypatch.chdir(tmp_path)  # the model is not here: as trained
    assert main(["export", str(run), str(tmp_path / "trained")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype="auto").dtype == torch.bfloat16


def test_the_sentencepiece_model_of_the_input_goes_along(trained, tmp_path):
    """The Trainer's checkpoints hold the tokenizer that was made of it, and not the model itself."""
    from hift_ds.data.tokenizers import load_tokenizer
    from tests.helpers.tiny_tokenizers import LLAMA_LIKE, sentencepiece_folder

    source, saved, _, _ = trained
    given = shutil.copytree(source, tmp_path / "input")
    tokenizer = load_tokenizer(sentencepiece_folder(given, **LLAMA_LIKE))
    checkpoint = tmp_path / "run" / "checkpoint-3"
    shutil.copytree(saved / "global_step3", checkpoint / "global_step3")
    (tmp_path / "run" / "run.yaml").write_text(f"model: {{path: {given}}}\n")
    shutil.copy(source / "config.json", checkpoint)
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    (checkpoint / "latest").write_text("global_step3")
    assert not (checkpoint / "tokenizer.model").exists()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    exported = tmp_path / "out" / "tokenizer.model"
    assert exported.read_bytes() == (given / "tokenizer.model").read_bytes()
    assert load_tokenizer(tmp_path / "out")("Hi there").input_ids == tokenizer("Hi there").input_ids


def test_what_cannot_be_exported_is_one_line(trained, tmp_path, capsys):
    source, saved, *_ = trained
    out = str(tmp_path / "out")
    for arguments, expected in (
        ([str(tmp_path / "nowhere"), out], "no such folder"),
        ([str(tmp_path), out], "no whole checkpoint"),
        ([str(saved), out], "--model DIR"),
    ):
        assert main(["export", *arguments]) == 2
        message = capsys.readouterr().err
        assert expected in message and message.count("\n") == 1
    with_tags = saved.parent / "run.yaml"
    with_tags.write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'executed'}']")
    assert main(["export", str(saved), out]) == 2
    message = capsys.readouterr().err
    assert "run.yaml is not what a run wrote" in message and message.count("\n") == 1
    assert not (tmp_path / "executed").exists()
    with_tags.unlink()
    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    weights = damaged / "global_step3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["export", str(damaged), out, "--model", str(source)]) == 2
    assert "model.safetensors" in capsys.readouterr().err
