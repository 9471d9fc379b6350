"""What the columns of each `data.format` become, from tables and from JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.config.schema import DataConfig, DataSource
from harness.data.sources import BadRow, Row, read_rows
from harness.errors import DataError

ASK = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(path: Path, row_format: str, **fields: Any) -> list[Row | BadRow]:
    data = DataConfig.model_validate({"train": [{"path": ""}], "format": row_format, **fields})
    return list(read_rows(DataSource(path=str(path)), data))


def jsonl(path: Path, *objects: Any) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects), encoding="utf-8")
    return path


def test_a_document_has_no_target(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "Once upon\na time", "id": 1})
    assert read(path, "text") == [Row(f"{path}:1", "Once upon\na time", "")]


def test_a_prompt_and_its_completion_are_two_turns(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("question\tanswer\n2+2?\t4\n")
    (row,) = read(path, "prompt", prompt_column="question", completion_column="answer")
    assert row == Row(f"{path}:2", "2+2?", "4", messages=(ASK, ANSWER))


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "parquet"])
def test_a_conversation_is_what_stands_before_the_last_answer_and_that(tmp_path: Path, kind: str) -> None:
    turns = [SYSTEM, ASK, ANSWER, {"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        jsonl(path, {"messages": turns})
    elif kind == "tsv":
        path.write_text(f"messages\n{json.dumps(turns)}\n")
    else:
        pq.write_table(pa.table({"messages": [turns]}), path)
    (row,) = read(path, "messages")
    assert isinstance(row, Row)
    assert row.messages == tuple(turns)
    assert (row.source, row.target) == ("system: Be brief.\nuser: 2+2?\nassistant: 4\nuser: 3+3?", "6")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "wrong_type"),
        ("not json", "malformed"),
        ({"role": "user"}, "wrong_type"),
        ([{"role": "user", "content": 4}], "wrong_type"),
        ([{"content": "no role"}], "wrong_type"),
        ([ASK], "nothing_to_learn"),
        ([{"role": "assistant", "content": "a\0b"}], "control_characters"),
        ([{"role": "assistant", "content": "\ud800"}], "not_utf8"),
        (None, "missing_field"),
    ],
)
def test_what_is_no_conversation(tmp_path: Path, value: Any, reason: str) -> None:
    (row,) = read(jsonl(tmp_path / "x.jsonl", {"messages": value}), "messages")
    assert isinstance(row, BadRow)
    assert row.reason == reason


@pytest.mark.parametrize(
    ("label", "text"), [("sport", "sport"), (3, "3"), (0.5, "0.5"), (["a", "b"], "a,b"), (True, "True")]
)
def test_labels_are_text(tmp_path: Path, label: Any, text: str) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "a", "label": label})
    assert read(path, "labelled") == [Row(f"{path}:1", "a", text)]


def test_numbers_of_a_parquet_file_are_labels_but_not_texts(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [7], "number": [1]}), path)
    assert read(path, "labelled") == [Row(f"{path}:1", "a", "7")]
    with pytest.raises(DataError, match="`number` holds int64, not text"):
        read(path, "labelled", text_column="number")


def test_a_pair_of_texts_with_a_label(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("premise\thypothesis\tlabel\nIt rains.\tIt is wet.\tyes\n")
    (row,) = read(path, "labelled", text_column="premise", text_pair_column="hypothesis")
    assert row == Row(f"{path}:2", "It rains.", "yes", source_pair="It is wet.")


def test_phrases_that_an_output_must_have_are_a_column_of_pairs(tmp_path: Path) -> None:
    path, other = tmp_path / "x.tsv", tmp_path / "y.tsv"
    path.write_text("source\ttarget\tc\na\tb\tb ||| x y\n")
    other.write_text("source\ttarget\na\tb\n")
    assert read(path, "pairs", constraints_column="c") == [Row(f"{path}:2", "a", "b", constraints="b ||| x y")]
    assert read(path, "pairs") == [Row(f"{path}:2", "a", "b")]
    assert read(other, "pairs", constraints_column="c") == [Row(f"{other}:2", "a", "b")]


def test_a_missing_column_is_told_with_the_key_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("texts\tlabel\na\tb\n")
    with pytest.raises(DataError, match=r"(?s)no column `text`.*did you mean `texts`.*data\.text_column"):
        read(path, "labelled")
