"""``harness schema``: the JSON Schema of the run file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "Print the JSON Schema of the run file. Editors with YAML support use it to complete and check keys."
EXAMPLE = (
    "harness schema --output run.schema.json   # then in the run file: # yaml-language-server: $schema=run.schema.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to FILE instead of standard output")


def run(args: argparse.Namespace) -> int:
    from harness.config.schema import RunConfig
    from harness.io.atomic import write_json

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    if args.output:
        write_json(args.output, schema)
    else:
        print(json.dumps(schema, indent=2))
    return 0
