"""``hift-ds predict RUN --data IN -o OUT``: answers to the rows of a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hift_ds.cli.arguments import add_model_arguments
from hift_ds.errors import ConfigError

EXAMPLES = """examples:
  hift-ds predict runs/first --data questions.jsonl -o answers.jsonl
  hift-ds predict path/to/model --data test.csv -o answers.jsonl --max-new-tokens 64 --batch-size 32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data", required=True, metavar="IN", help="rows as data.train takes them; an answer may be missing"
    )
    parser.add_argument("-o", "--output", required=True, metavar="OUT.jsonl", help="each row with a key prediction")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at once (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token each time (default)"
    )


def run(args: argparse.Namespace) -> int:
    from hift_ds.checkpoint.files import write_errors
    from hift_ds.data.sources import check_source, parse_sources
    from hift_ds.hf.model_folder import max_sequence_length
    from hift_ds.report.quiet import quiet_libraries
    from hift_ds.train.head_predictions import ANSWERS, predict_with_head
    from hift_ds.train.predict import predict
    from hift_ds.train.settings import length_or_default
    from hift_ds.train.trained_model import find_trained, generation_options

    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    quiet_libraries(is_main=True)
    trained = find_trained(args.model, trust_remote_code=args.trust_remote_code)
    data = trained.run.data if trained.run is not None else None
    named = {} if data is None else {"format": data.format, "columns": data.columns}
    [source] = parse_sources(args.data, "--data", **named)
    check_source(source)
    if Path(args.output).resolve() == Path(source.path).expanduser().resolve():
        raise ConfigError(f"--output: {args.output!r} is the file that is read; name another")
    model, tokenizer = trained.load(dtype=args.dtype, device=args.device, writes_text=False)
    if trained.task in ANSWERS:
        generation = generation_options(model, tokenizer, args.temperature) if trained.task == "seq2seq" else {}
        limit, wanted = max_sequence_length(model.config.to_dict()), None if data is None else data.max_length
        answers = predict_with_head(
            model, tokenizer, source, trained.task, batch_size=args.batch_size,
            max_length=length_or_default(wanted, limit), max_new_tokens=args.max_new_tokens, **generation,
        )  # fmt: skip
    else:
        answers = predict(
            model, tokenizer, source, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
        )  # fmt: skip
    out, count = Path(args.output), 0
    with write_errors(out.absolute().parent, "answers"), out.open("w", encoding="utf-8") as file:
        for row in answers:  # as they come: what an interrupted run has done stays
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            count += 1
    print(f"{count:,} answers in {out}")
    return 0
