"""A bare sentencepiece ``tokenizer.model`` -> a ``tokenizers.Tokenizer`` with exactly sentencepiece's ids.

transformers 5 has a conversion of its own, and two of its steps change LLaMA's ids: it forgets the
word-boundary piece that sentencepiece puts before the first word ("Hi" becomes ``Hi`` instead of ``▁Hi``),
and it ranks merges by their place in the vocabulary instead of by their score (" Hi" becomes ``▁▁ Hi``
instead of ``▁ ▁Hi``). So the conversion is made here from what the model file says, and compared with
sentencepiece itself before it is used.

Text between two special tokens is encoded as one call of sentencepiece would encode it, word-boundary piece
included. That is how Meta's and Mistral's own code builds prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ds.errors import DataError
from hift_ds.hf.saved_tokenizer import PROBES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORD_BOUNDARY = "▁"
_UNIGRAM, _BPE = 1, 2  # trainer_spec.model_type
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # piece.type


def read_model_proto(path: Path) -> Any | None:
    """The parsed sentencepiece model, or None if the file is something else (Llama 3 has a tiktoken file so
    named)."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    return proto if proto.pieces and proto.trainer_spec.model_type in (_UNIGRAM, _BPE) else None


def convert(proto: Any, path: Path) -> Tokenizer:
    """The tokenizer of a sentencepiece model.

    Args:
        proto: from :func:`read_model_proto`.
        path: of the same model, for the comparison with sentencepiece and for messages.

    Raises:
        DataError: the model uses something that cannot be converted; names a text whose ids would differ.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer(_model(proto))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.decoder = _decoder(proto)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    _compare_with_sentencepiece(tokenizer, proto, path)
    return tokenizer


def add_special_tokens(tokenizer: Tokenizer, *, bos: str | None, eos: str | None) -> None:
    """Make ``tokenizer`` put these around every text, as LLaMA's does with its BOS. Tokens it lacks are left
    out."""
    from tokenizers.processors import TemplateProcessing

    front, back = ([token] if token and tokenizer.token_to_id(token) is not None else [] for token in (bos, eos))
    if front or back:
        tokenizer.post_processor = TemplateProcessing(
            single=[*front, "$A", *back],
            pair=[
                *front,
                "$A",
                *back,
                *(f"{token}:1" for token in front),
                "$B:1",
                *(f"{token}:1" for token in back),
            ],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*front, *back}],
        )


def _model(proto: Any) -> Any:
    from tokenizers import models

    spec = proto.trainer_spec
    if spec.model_type == _UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(pieces, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    return models.BPE(
        {piece.piece: index for index, piece in enumerate(proto.pieces)},
        _merges(proto),
        unk_token=proto.pieces[spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Pairs of pieces whose concatenation is a piece, best first.

    sentencepiece merges the pair with the highest score, the leftmost of equals. LLaMA's runs of spaces all
    have one score; ranking long left parts first gives the leftmost-first result for them.
    """
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    ranked = [
        (-score[whole], -cut, whole[:cut], whole[cut:])
        for whole in score
        for cut in range(1, len(whole))
        if whole[:cut] in score and whole[cut:] in score
    ]
    ranked.sort()
    return [(left, right) for _, _, left, right in ranked]


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(WORD_BOUNDARY))  # leaves an empty text empty, as sentencepiece does
    steps.append(normalizers.Replace(" ", WORD_BOUNDARY))
    return normalizers.Sequence(steps)


def _decoder(proto: Any) -> Any:
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(WORD_BOUNDARY, " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", left=1))
    return decoders.Sequence(steps)


def _compare_with_sentencepiece(tokenizer: Tokenizer, proto: Any, path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in PROBES:
        found, expected = tokenizer.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if found != expected:
            raise DataError(
                f"{path}: cannot convert this sentencepiece model faithfully: {text!r} would become {found}, "
                f"sentencepiece gives {expected}; put a tokenizer.json made by its authors beside it"
            )
