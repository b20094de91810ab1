"""Tokenizers made on the spot: a byte-level one with ChatML, and sentencepiece models of several kinds."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# As in SmolLM2-Instruct: no generation markers, and a system message that nobody wrote.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe nice<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "Hello there, how are you today?",
    "The quick brown fox jumps over the lazy dog.",
    "Hi! I am fine, thank you.",
    "def f(x):",
    "    return x + 1",
    "        # indented",
    "Question: what is 2 + 2? Answer: 4",
    "naïve café déjà vu",
    "你好 世界",
    "Привет, мир",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z A B C H Q T 0 1 2 3 4 5",
] * 5

LLAMA_LIKE = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "vocab_size": 420,
    "character_coverage": 0.99,
}


def byte_level(template: str | None = CHATML, *, bos: bool = False, special: tuple[str, ...] = ()) -> Any:
    """One token a byte, plus the special tokens of ChatML, so that any text has ids one can count."""
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *special,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
    ]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", *special],
    )
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_folder(folder: Path, space_runs: bool = False, **options: Any) -> Path:
    """A folder with nothing but a trained ``tokenizer.model``.

    Args:
        space_runs: give it LLaMA's pieces of several spaces, early in the vocabulary and with the lowest
            score.
    """
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=trained, minloglevel=2, num_threads=1, **options
    )
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(trained.getvalue())
    if space_runs:
        known = {piece.piece for piece in proto.pieces}
        first_normal = next(index for index, piece in enumerate(proto.pieces) if piece.type == 1)
        runs = [piece for piece in ("▁" * length for length in range(2, 9)) if piece not in known]
        pieces = list(proto.pieces)
        for piece in runs:
            pieces.insert(
                first_normal,
                sentencepiece_model_pb2.ModelProto.SentencePiece(piece=piece, score=-1e9, type=1),
            )
        del proto.pieces[:]
        proto.pieces.extend(pieces)
        for piece in proto.pieces:
            if set(piece.piece) == {"▁"} and len(piece.piece) > 1:
                piece.score = -1e9
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


def texts(num: int, alphabet: str = "aeiouHT thn  \n\t.,!▁é你🙂'-0", seed: int = 0) -> list[str]:
    """Random texts rich in spaces, and every number of spaces around a word."""
    rng = random.Random(seed)
    made = ["".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40))) for _ in range(num)]
    return made + [" " * count + "x" + " " * count for count in range(40)] + CORPUS
