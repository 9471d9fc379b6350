"""What a merge is compared on, and when it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import RunConfig
from harness.errors import DataError
from harness.training.merge import NUM_ROWS, Bleu, bleu_gate, rows_to_translate
from tests.pairs import PAIRS
from tests.runs import tiny_run, write_pairs


@pytest.mark.parametrize("named", [("validation", "test"), ("test",), ()])
def test_rows_of_the_run_are_translated(named: tuple[str, ...], tmp_path: Path) -> None:
    files = {f"data__{name}": str(write_pairs(tmp_path / f"{name}.tsv", PAIRS[5:9])) for name in named}
    changes: dict[str, Any] = {"data__train": [{"path": str(write_pairs(tmp_path / "train.tsv", PAIRS))}], **files}
    config = RunConfig.model_validate(tiny_run(tmp_path, tmp_path, name="run", **changes))
    name, rows = rows_to_translate(config)
    assert name == (named[0] if named else "train")
    assert [(row.source, row.target) for row in rows] == (PAIRS[5:9] if named else PAIRS[:NUM_ROWS])
    assert len(PAIRS) > NUM_ROWS
    assert {(row.source_language, row.target_language) for row in rows} == {("en_XX", "de_DE")}


def test_both_scores_are_told_and_a_worse_one_refused() -> None:
    unmerged = Bleu(30.0, "32 rows of test")
    assert bleu_gate(unmerged, Bleu(30.09, "32 rows of test"), tolerance=0.1) == (
        "BLEU of 32 rows of test: 30.00 with the adapter, 30.09 merged"
    )
    for score in (29.8, 30.2, float("nan")):
        with pytest.raises(DataError, match=r"more than 0.1 points of BLEU .*30.00 with the adapter"):
            bleu_gate(unmerged, Bleu(score, ""), tolerance=0.1)
