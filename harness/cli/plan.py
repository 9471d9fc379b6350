"""``harness plan``: what a run would be, without starting it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from harness.cli.common import add_run_file, positive

HELP = "Print batch arithmetic, memory per rank, the final DeepSpeed JSON and the recommended preset. Starts nothing."
EXAMPLE = "harness plan examples/quickstart.yaml --devices 8 --nodes 2 --device-memory 80GiB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--devices", type=positive, metavar="N", help="ranks per node (default: launch.processes)")
    parser.add_argument("--nodes", type=positive, default=1, metavar="M", help="nodes (default: 1)")
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="memory of a device, like 80GiB (default on a CPU: this machine's, divided by the ranks)",
    )
    parser.add_argument(
        "--accelerator", choices=("cpu", "cuda"), help="what the run will train on (default: what this machine has)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    from harness.config.load import load_run_config
    from harness.io.accelerator import accelerator, host_memory_bytes, num_devices
    from harness.plan import advice, report
    from harness.plan.held import held_weights
    from harness.plan.parameters import model_json, model_tensors
    from harness.plan.plan import make_plan

    device_bytes = advice.parse_bytes(args.device_memory) if args.device_memory else None
    kind = args.accelerator or accelerator()
    config = load_run_config(args.run_file, args.overrides, accelerator=kind)
    processes = config.launch.processes
    on_cpu = kind == "cpu"
    per_node = args.devices or (num_devices() if processes == "auto" else processes)
    if device_bytes is None and on_cpu:
        device_bytes = host_memory_bytes() // per_node
    plan = make_plan(config, world_size=per_node * args.nodes)
    candidates = []
    model = model_json(config.model.path or config.model.config or "")
    tensors = None if model is None else model_tensors(model, config.task, config.classification)
    if model is not None and tensors is not None:
        candidates = advice.candidates(
            config,
            held_weights(config, model, tensors),
            world_size=plan.world_size,
            device_bytes=device_bytes,
            logits_bytes=plan.logits_bytes or 0,
            on_cpu=on_cpu,
        )
    if args.json:
        chosen = report.recommended(candidates)
        extra = {"presets": [asdict(candidate) for candidate in candidates], "recommended": chosen and chosen.preset}
        print(json.dumps({**plan.to_json(), **extra}, indent=2))
    else:
        print(report.describe(plan, candidates, device_bytes=device_bytes))
    return 0
