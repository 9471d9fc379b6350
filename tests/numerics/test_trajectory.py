"""Twenty steps are the same twenty steps whatever the number of ranks, the ZeRO stage and the micro-batch size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import SHARD_ALL, run_ranks, steps_of, tiny_run

LAYOUTS = [(preset, tokens) for preset in ("zero0", "zero1", "zero2", "zero3") for tokens in (100, 200, 400)]


@pytest.mark.slow
def test_loss_gradient_and_rows_do_not_depend_on_the_layout(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    runs = {
        world_size: [
            tiny_run(
                tmp_path, tiny_models["mbart"], name=f"w{world_size}-{preset}-{tokens}",
                deepspeed={"preset": preset, "overrides": SHARD_ALL if preset == "zero3" else {}},
                batch__max_tokens_per_device=tokens,
            )
            for preset, tokens in LAYOUTS
        ]
        for world_size in (1, 2)
    }  # fmt: skip
    for world_size, group in runs.items():
        run_ranks(group, world_size)
    reference = steps_of(runs[1][0])
    assert len(reference) == 20
    assert reference[-1]["loss"] < reference[0]["loss"] - 0.1
    for run in [*runs[1], *runs[2]]:
        steps = steps_of(run)
        assert [step["row_digest"] for step in steps] == [step["row_digest"] for step in reference]
        for key in ("loss", "nll", "grad_norm"):
            assert [step[key] for step in steps] == pytest.approx([step[key] for step in reference], rel=1e-5), run[
                "name"
            ]
