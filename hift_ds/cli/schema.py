"""``hift-ds schema``: the JSON schema of a run file, which editors complete and check YAML with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  hift-ds schema > hift_run.schema.json
Then, as the first line of a run file, for editors with the YAML language server (VS Code, Neovim, Emacs, JetBrains):
  # yaml-language-server: $schema=hift_run.schema.json
"""


def run_file_schema() -> dict[str, Any]:
    """The JSON schema of every section and key, with types, defaults and descriptions; the "hift" block included."""
    from hift_ds.config import HiFTConfig
    from hift_ds.train.run_config import RunConfig

    schema = RunConfig.model_json_schema(ref_template="#/$defs/{model}")
    block = HiFTConfig.model_json_schema(ref_template="#/$defs/{model}")
    schema["$defs"] |= block.pop("$defs", {})
    schema["$defs"]["HiFTConfig"] = block
    described = schema["properties"]["hift"]
    schema["properties"]["hift"] = {
        **{key: value for key, value in described.items() if key in ("title", "description", "default")},
        "anyOf": [{"$ref": "#/$defs/HiFTConfig"}, {"const": False}],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="write it there instead")


def run(args: argparse.Namespace) -> int:
    text = json.dumps(run_file_schema(), indent=1)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
        print(args.output)
    else:
        print(text)
    return 0
