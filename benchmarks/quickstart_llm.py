"""Figures of the last `make demo-llm`: loss and scores before and after, size of what is trained, speed, times."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import write_result
from examples.demo import scores
from examples.demo_llm import RUN, evaluations


def main() -> None:
    plan: dict[str, Any] = json.loads((RUN / "plan.json").read_text(encoding="utf-8"))
    summary: dict[str, Any] = json.loads((RUN / "summary.json").read_text(encoding="utf-8"))
    seconds: dict[str, float] = json.loads((RUN / "demo.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    before, after = (scores(directory) for directory in evaluations())
    values = {
        "before": {name: round(before[name], 3) for name in ("loss", "chrf", "bleu")},
        "after": {name: round(after[name], 3) for name in ("loss", "chrf", "bleu")},
        "signatures": after["signatures"],
        "held_out_rows": after["sentences"],
        "steps": summary["steps"],
        "rows": sum(step["rows"] for step in steps),
        "parameters": plan["num_parameters"],
        "trained_parameters": plan["num_trained"],
        "target_tokens_per_second": round(summary["tokens_per_second"], 1),
        "peak_memory_per_rank_bytes": summary["peak_memory_bytes"],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    write_result("quickstart-llm", "make demo-llm && python -m benchmarks.quickstart_llm", values)


if __name__ == "__main__":
    main()
