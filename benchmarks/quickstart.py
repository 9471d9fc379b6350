"""Figures of the last `make demo`: scores of base and fine-tuned model, speed, start-up and its parts."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import write_result
from examples.demo import BASE_SCORES, RUN, scores


def main() -> None:
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    start = next(record for record in records if record["event"] == "start")
    first = next(record for record in records if record["event"] == "step")
    evaluations = [record for record in records if record["event"] == "evaluation"]
    summary: dict[str, Any] = json.loads((RUN / "summary.json").read_text(encoding="utf-8"))
    base = scores(BASE_SCORES)
    startup = {name: round(value, 2) for name, value in start.items() if name.endswith("_s") and name != "time_s"}
    startup["first_step_s"] = round(first["time_s"] - start["time_s"], 2)
    values = {
        "base": {name: round(base[name], 2) for name in ("bleu", "chrf")},
        "fine_tuned": {name: round(summary["test"][name], 2) for name in ("bleu", "chrf")},
        "sentences": base["sentences"],
        "signature": base["signatures"]["bleu"],
        "steps": summary["steps"],
        "target_tokens_per_second": round(summary["tokens_per_second"]),
        "wall_time_s": round(summary["wall_time_s"], 1),
        "decoding_share": round(sum(record["decode_seconds"] for record in evaluations) / summary["wall_time_s"], 3),
        "time_to_first_step": startup,
    }
    write_result("quickstart", "make demo && python -m benchmarks.quickstart", values)


if __name__ == "__main__":
    main()
