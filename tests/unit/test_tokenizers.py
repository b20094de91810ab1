"""Ids against sentencepiece itself, what is saved against what AutoTokenizer reads back."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from hift_ds.data.sentencepiece_conversion import PROBES, read_model_proto
from hift_ds.data.tokenizers import choose_pad_token, load_tokenizer, save_tokenizer
from hift_ds.errors import CheckpointError, ConfigError, DataError
from tests.helpers.tiny_tokenizers import LLAMA_LIKE, byte_level, sentencepiece_folder, texts

KINDS = {
    "llama": {**LLAMA_LIKE, "space_runs": True},
    "bpe_without_bytes": {**LLAMA_LIKE, "byte_fallback": False, "vocab_size": 200},
    "no_dummy_prefix": {**LLAMA_LIKE, "add_dummy_prefix": False},
    "unigram": {
        **LLAMA_LIKE,
        "model_type": "unigram",
        "allow_whitespace_only_pieces": False,
        "vocab_size": 340,
    },
    "no_bos": {**LLAMA_LIKE, "bos_id": -1},
}


def processor_of(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local tokenizer reached for the network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_sentencepiece(tmp_path, kind):
    folder = sentencepiece_folder(tmp_path, **KINDS[kind])
    processor, tokenizer = processor_of(folder), load_tokenizer(folder)
    for text in [*texts(600), *PROBES]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == processor.encode(text), repr(text)
        if processor.unk_id() not in ids:  # sentencepiece writes a question mark for those
            assert tokenizer.decode(ids) == processor.decode(ids), repr(text)


def test_a_default_unigram_model_that_normalises_its_text(tmp_path):
    folder = sentencepiece_folder(tmp_path, model_type="unigram", vocab_size=95, character_coverage=0.99)
    processor, tokenizer = processor_of(folder), load_tokenizer(folder)
    for text in texts(300, alphabet="aeiou HThn  \n\tＡｂ①"):
        assert tokenizer(text, add_special_tokens=False).input_ids == processor.encode(text), repr(text)


def test_hi_begins_with_bos_and_the_word_boundary(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, **KINDS["llama"]))
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Hi").input_ids)
    assert pieces[0] == "<s>" and pieces[1].startswith("▁") and "".join(pieces[1:]) == "▁Hi"
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]


def test_space_runs_do_not_win_over_words(tmp_path):
    """LLaMA scores its pieces of spaces lowest though their ids come first: ' Hi' is ▁ ▁Hi and not ▁▁ Hi"""
    folder = sentencepiece_folder(tmp_path, **KINDS["llama"])
    tokenizer = load_tokenizer(folder)
    assert "▁▁" in tokenizer.get_vocab()
    assert tokenizer.tokenize(" Hi") == ["▁", "▁Hi"]


def test_a_model_without_bos_gets_none(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path, **KINDS["no_bos"]))
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids


def test_text_between_special_tokens_is_encoded_as_sentencepiece_encodes_it_alone(tmp_path):
    folder = sentencepiece_folder(tmp_path, **KINDS["llama"])
    tokenizer, processor = load_tokenizer(folder), processor_of(folder)
    ids = tokenizer("<s>Hi there</s> you", add_special_tokens=False).input_ids
    assert ids == [1, *processor.encode("Hi there"), 2, *processor.encode(" you")]


def test_settings_beside_a_bare_model_are_kept(tmp_path):
    folder = sentencepiece_folder(tmp_path, **KINDS["llama"])
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "chat_template": "{{ messages[0]['content'] }}",
        "model_max_length": 77,
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("Hi").input_ids
    assert ids[0] != tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert (tokenizer.chat_template, tokenizer.model_max_length) == ("{{ messages[0]['content'] }}", 77)
    assert tokenizer.pad_token == "</s>"


def test_a_model_that_cannot_be_converted_is_refused_with_a_text(tmp_path):
    folder = sentencepiece_folder(tmp_path, **LLAMA_LIKE, user_defined_symbols=["AA"])
    with pytest.raises(DataError, match="AAAAAAAA.* would become .* sentencepiece gives"):
        load_tokenizer(folder)


@pytest.mark.parametrize("model_type", [None, "llama", "mistral", "mixtral", "gemma", "phi3", "opt", "unheard_of"])
def test_what_is_saved_gives_the_same_ids_to_auto_tokenizer(tmp_path, model_type):
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path / "in", **KINDS["llama"]))
    out = tmp_path / "out"
    out.mkdir()
    if model_type:
        (out / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_tokenizer(tokenizer, out)
    again = AutoTokenizer.from_pretrained(out)
    for text in texts(100):
        assert again(text).input_ids == tokenizer(text).input_ids, repr(text)
    assert again.pad_token == tokenizer.pad_token
    # names that transformers 4 and llama.cpp's converter know
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (out / "tokenizer.model").read_bytes() == (tmp_path / "in" / "tokenizer.model").read_bytes()
    assert load_tokenizer(out)("Hi").input_ids == tokenizer("Hi").input_ids


def test_a_saved_tokenizer_that_reads_back_differently_is_an_error(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path / "in", **KINDS["llama"]))
    out = tmp_path / "out"
    out.mkdir()
    # transformers reads every Qwen2 tokenizer as a byte-level one
    (out / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(CheckpointError, match="AutoTokenizer reads other ids"):
        save_tokenizer(tokenizer, out)


def test_exports_write_tokenizers_with_that_care(tmp_path):
    import model_zoo
    from hift_ds.hf.export import export_model

    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path / "in", **KINDS["llama"]))
    llama = model_zoo.tiny.build("llama", vocab_size=len(tokenizer))
    export_model(llama, tmp_path / "out", tokenizer=tokenizer)
    written, given = (tmp_path / folder / "tokenizer.model" for folder in ("out", "in"))
    assert written.read_bytes() == given.read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(" Hi").input_ids == tokenizer(" Hi").input_ids
    # A folder with both files, as Llama-2's: tokenizer.json counts, tokenizer.model goes along.
    export_model(llama, tmp_path / "again", tokenizer=load_tokenizer(tmp_path / "out"))
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == given.read_bytes()
    qwen = model_zoo.tiny.build("qwen2", vocab_size=len(tokenizer))
    with pytest.raises(CheckpointError, match=r"the weights are in .*AutoTokenizer reads other ids") as caught:
        export_model(qwen, tmp_path / "qwen", tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "qwen" / "model.safetensors").is_file()  # no reason to lose them
    assert not list((tmp_path / "qwen").glob("tokenizer*"))


def test_no_code_is_run_for_a_tokenizer_that_is_none_of_its_own(tmp_path, monkeypatch):
    """auto_map in the settings: what is saved neither executes nor names code that it does not bring."""
    byte_level().save_pretrained(tmp_path / "in")
    settings = json.loads((tmp_path / "in" / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    settings["local_files_only"] = True
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    evil = f"open({str(tmp_path / 'executed')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Tokenizer\n"
    (tmp_path / "in" / "evil.py").write_text(evil)
    out = tmp_path / "out"
    out.mkdir()
    (out / "evil.py").write_text(evil)
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "in")
    tokenizer.init_kwargs["auto_map"] = settings["auto_map"]
    save_tokenizer(tokenizer, out)
    assert not (tmp_path / "executed").exists()
    assert not {"auto_map", "local_files_only"} & set(json.loads((out / "tokenizer_config.json").read_text()))
    assert AutoTokenizer.from_pretrained(out)("Hi").input_ids == tokenizer("Hi").input_ids


def test_a_hugging_face_folder_keeps_its_ids_and_template(tmp_path):
    original = byte_level()
    original.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("Hi <|im_end|>").input_ids == original("Hi <|im_end|>").input_ids
    assert tokenizer.chat_template == original.chat_template
    assert len(tokenizer) == len(original)


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        (("<|finetune_right_pad_id|>",), "<|finetune_right_pad_id|>"),
        ((), "<|unk|>"),
    ],
)
def test_padding_takes_a_token_that_exists(vocabulary, expected):
    tokenizer = byte_level(special=("<|unk|>", *vocabulary))
    size = len(tokenizer)
    tokenizer.pad_token = None
    tokenizer.unk_token = "<|unk|>"
    tokenizer.pad_token = choose_pad_token(tokenizer)
    assert tokenizer.pad_token == expected and len(tokenizer) == size


def test_the_end_token_pads_only_if_nothing_else_can():
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.unk_token = None
    assert choose_pad_token(tokenizer) == "<|im_end|>"
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no pad, unknown or end token"):
        choose_pad_token(tokenizer)


def test_missing_and_damaged_folders(tmp_path):
    with pytest.raises(ConfigError, match="model.tokenizer: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no tokenizer in .*expected one of tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ConfigError, match="cannot load the tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_model_that_is_no_sentencepiece_model_is_left_to_transformers(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_text("IQ== 0\nIg== 1\n")  # tiktoken's format, as in Llama 3's original files
    assert read_model_proto(file) is None
    if importlib.util.find_spec("tiktoken") is None:
        with pytest.raises(ConfigError, match="cannot load the tokenizer .*tiktoken"):
            load_tokenizer(tmp_path)


def mistral_models() -> list[Path]:
    found = importlib.util.find_spec("mistral_common")
    folders = [Path(folder) / "data" for folder in found.submodule_search_locations] if found else []
    return sorted(file for folder in folders for file in folder.glob("*.model*"))


@pytest.mark.skipif(not mistral_models(), reason="needs the package mistral-common, which ships real models")
@pytest.mark.parametrize("model", mistral_models(), ids=lambda file: file.name)
def test_published_models(tmp_path, model):
    shutil.copy(model, tmp_path / "tokenizer.model")
    tokenizer, processor = load_tokenizer(tmp_path), processor_of(tmp_path)
    for text in texts(3000):
        assert tokenizer(text, add_special_tokens=False).input_ids == processor.encode(text), repr(text)
    first, second = tokenizer("Hi").input_ids
    assert (first, tokenizer.convert_ids_to_tokens(second)) == (1, "▁Hi")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_tokenizer(tokenizer, out)
    again = AutoTokenizer.from_pretrained(out)
    for text in texts(300, seed=1):
        assert again(text).input_ids == tokenizer(text).input_ids
