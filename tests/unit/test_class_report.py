"""The files of classified rows, the page, and the picture of the confusion matrix."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.errors import HarnessError
from harness.reports.class_page import MAX_MATRIX_LABELS
from harness.reports.class_report import write_predictions
from harness.reports.confusion import MAX_LABELS, confusion_image
from harness.reports.predictions import Predictions
from harness.scoring.classification import class_scores, one_hot
from harness.training.event_file import EventFile

LABELS = ["acq", "<b>earn</b>", "money & fx"]
TEXTS = ["<script>alert(1)</script>", "a & b", "two\nlines", "tab\there", "fine"]
GOLD = np.array([0, 1, 2, 1, 0])
PREDICTED = np.array([0, 1, 1, 0, 0])


def predictions(problem: Any = "single_label", **changes: Any) -> Predictions:
    logits = 4.0 * one_hot(PREDICTED, 3) + np.arange(3)
    gold: Any = GOLD
    if problem == "multi_label":
        gold = one_hot(GOLD, 3) | one_hot((GOLD + 1) % 3, 3)
    elif problem == "regression":
        logits, gold = np.array([[0.5], [1.0], [2.0], [3.0], [4.0]]), np.array([0.5, 1.5, 2.0, -3.0, 4.0])
    fields: dict[str, Any] = {
        "where": [f"test.tsv:{index + 2}" for index in range(5)],
        "texts": TEXTS,
        "second": [None] * 5,
        "labels": LABELS if problem != "regression" else ["value"],
        "problem": problem,
        "logits_NK": logits,
        "gold": gold,
    }
    return Predictions(**fields | changes)


def write(directory: Path, shown: Predictions, metrics: tuple[str, ...] = ("accuracy", "ece")) -> dict[str, Any]:
    if shown.problem == "regression":
        metrics = ("rmse", "pearson")
    scores = class_scores(shown.logits_NK, shown.gold, shown.problem, metrics)
    write_predictions(directory, shown, scores, seconds=1.5, losses={"loss": float("inf"), "nll": 0.25})
    return json.loads((directory / "scores.json").read_text())


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


class Page(HTMLParser):
    """Counts tags and refuses one that is left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)
        if tag not in {"meta", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text += data


def test_files_of_single_labels(tmp_path: Path) -> None:
    scores = write(tmp_path / "set", predictions())
    files = {"predictions.jsonl", "confusion.tsv", "scores.json", "report.html"}
    assert {path.name for path in (tmp_path / "set").iterdir()} == files
    lines = lines_of(tmp_path / "set")
    assert [line["where"] for line in lines] == [f"test.tsv:{index}" for index in range(2, 7)]
    assert [line["text"] for line in lines] == TEXTS
    assert [line["gold"] for line in lines] == [LABELS[index] for index in GOLD]
    assert [line["predicted"] for line in lines] == [LABELS[index] for index in PREDICTED]
    assert all(max(line["probabilities"], key=line["probabilities"].get) == line["predicted"] for line in lines)
    assert all(sum(line["probabilities"].values()) == pytest.approx(1.0, abs=1e-5) for line in lines)
    table = [line.split("\t") for line in (tmp_path / "set" / "confusion.tsv").read_text().splitlines()]
    assert table == [["", *LABELS], ["acq", "2", "0", "0"], [LABELS[1], "1", "1", "0"], [LABELS[2], "0", "1", "0"]]
    assert (scores["accuracy"], scores["sentences"], scores["nll"], scores["loss"]) == (0.6, 5, 0.25, None)
    assert scores["labels"]["acq"] == {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": 0.8, "support": 2}
    assert scores["calibration"]["ece"] == scores["ece"]
    assert scores["calibration"]["temperature"] > 1.0, "the model is surer than it is right"


def test_files_of_several_labels_and_of_numbers(tmp_path: Path) -> None:
    write(tmp_path / "several", predictions("multi_label"))
    assert lines_of(tmp_path / "several")[0]["gold"] == ["acq", "<b>earn</b>"]
    assert lines_of(tmp_path / "several")[0]["predicted"] == ["acq", "<b>earn</b>", "money & fx"]
    scores = write(tmp_path / "numbers", predictions("regression"))
    assert lines_of(tmp_path / "numbers")[1] == {"where": "test.tsv:3", "text": "a & b", "gold": 1.5, "predicted": 1.0}
    assert scores["rmse"] == pytest.approx((36.25 / 5) ** 0.5)
    for name in ("several", "numbers"):
        assert not (tmp_path / name / "confusion.tsv").exists()


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_the_page_shows_every_row_and_obeys_no_text(problem: str, tmp_path: Path) -> None:
    write(tmp_path / "set", predictions(problem, second=["<i>other</i>"] * 5))
    page = Page((tmp_path / "set" / "report.html").read_text(encoding="utf-8"))
    assert page.names.count("script") == 1
    assert "i" not in page.names
    for text in ("<script>alert(1)</script>", "a & b", "<i>other</i>", "test.tsv:6"):
        assert text in page.text
    assert ("<b>earn</b>" in page.text) == (problem != "regression")


def test_a_page_of_many_labels_lists_confusions(tmp_path: Path) -> None:
    labels = [f"label {index}" for index in range(MAX_MATRIX_LABELS + 1)]
    write(tmp_path / "set", predictions(labels=labels, logits_NK=9.0 * one_hot(PREDICTED, len(labels))))
    text = Page((tmp_path / "set" / "report.html").read_text(encoding="utf-8")).text
    assert "label 2 was called label 1" in text
    assert "label 1 was called label 2" not in text


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(HarnessError, match=r"thesis\.tex"):
        write(tmp_path, predictions())


def test_a_picture_has_a_cell_of_its_share_for_each_pair_of_labels() -> None:
    matrix = np.array([[30, 0], [10, 10]])
    picture = confusion_image(matrix, ["yes", "no"]).astype(int)
    assert picture.shape[0] == picture.shape[1]
    margin = picture.shape[0] - 6 - 2 * 48
    corners = [(line, column) for line in (0, 1) for column in (0, 1)]
    full, empty, half, same = (picture[margin + 48 * line + 3, margin + 48 * column + 3] for line, column in corners)
    assert full.tolist() == [31, 95, 191]
    assert empty.tolist() == [255, 255, 255]
    assert half.tolist() == same.tolist() == [143, 175, 223]
    assert (picture[:margin] < 128).any(), "names stand above the columns"


@pytest.mark.parametrize("num_labels", [1, 2, 40, MAX_LABELS])
def test_a_picture_is_never_huge(num_labels: int) -> None:
    matrix = np.zeros((num_labels, num_labels), dtype=np.int64)
    picture = confusion_image(matrix, ["a very long name of a label, much longer than there is room"] * num_labels)
    assert picture.dtype == np.uint8
    assert max(picture.shape) <= 1000


def test_tensorboard_reads_the_picture_back(tmp_path: Path) -> None:
    picture = confusion_image(np.array([[3, 1], [0, 4]]), ["yes", "no"])
    events = EventFile(tmp_path, 0)
    events.image(5, "validation/confusion", picture)
    events.close()
    (event,) = EventAccumulator(str(tmp_path)).Reload().Images("validation/confusion")
    assert (event.step, event.height, event.width) == (5, *picture.shape[:2])
