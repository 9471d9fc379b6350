"""The cache of encoded rows: what goes in comes out, once, whole or not at all, under a key that means its content."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.config.schema import DataConfig
from harness.data import cache
from harness.data.cache import Encoded, Prepared, cache_key, load_rows, prepare_rows, write_reports
from harness.data.encoded import EncodedRows, RowWriter
from harness.data.leakage import source_digest
from harness.data.rows import Row
from harness.errors import DataError, ResourceError

LONGEST = 12  # characters the fake tokeniser below allows


class ByteTokenizer:
    """One token a byte; counts its calls."""

    def __init__(self) -> None:
        self.num_rows = 0

    def __call__(self, rows: list[Row]) -> list[tuple[Row, Encoded]]:
        self.num_rows += len(rows)
        sides = [(list(row.source.encode()), list(row.target.encode())) for row in rows]
        encoded = [Encoded(a[:LONGEST], b[:LONGEST], len(a), max(len(a), len(b)) > LONGEST) for a, b in sides]
        return list(zip(rows, encoded, strict=True))


@pytest.fixture
def train(tmp_path: Path) -> Path:
    path = tmp_path / "train.tsv"
    pairs = [("one", "eins"), ("two", "zwei"), ("", "leer"), ("t" * 13, "zu lang"), ("three", "drei"), ("two", "zwei")]
    path.write_text("source\ttarget\n" + "".join(f"{source}\t{target}\n" for source, target in pairs))
    return path


def data_config(*paths: Path, **fields: Any) -> DataConfig:
    fields.setdefault("cleaning", {"max_bad_fraction": 0.9})
    return DataConfig.model_validate({"train": [{"path": str(path)} for path in paths]} | fields)


def prepare(data: DataConfig, root: Path, encode: Any = None, name: str = "train", **changes: Any) -> Prepared:
    arguments = {"fingerprint": "bytes", "cache_root": root / "cache", "is_training": True} | changes
    return prepare_rows(name, data.train, data, encode=encode or ByteTokenizer(), **arguments)


def decoded(rows: EncodedRows) -> list[tuple[str, str, int]]:
    examples = rows.take(range(len(rows)))
    return [(bytes(a.tolist()).decode(), bytes(b.tolist()).decode(), start) for a, b, start in examples]


def test_training_rows_are_cleaned_encoded_and_reported(train: Path, tmp_path: Path) -> None:
    prepared = prepare(data_config(train), tmp_path)
    assert decoded(prepared.rows) == [("one", "eins", 3), ("two", "zwei", 3), ("three", "drei", 5)]
    assert prepared.rows.source_sizes.tolist() == [3, 3, 5]
    assert prepared.rows.target_sizes.tolist() == [4, 4, 4]
    assert (prepared.rows.source_sizes.dtype, prepared.rows.source_index.dtype) == (np.int32, np.int16)
    report = prepared.report
    assert (report.rows_read, report.rows_kept, report.truncated) == (6, 3, 0)
    assert report.left_out == {"empty": 1, "too_long": 1, "duplicate": 1}
    lines = [json.loads(line) for line in prepared.quarantine.read_text().splitlines()]
    assert {(one["where"], one["reason"]) for one in lines} == {
        (f"{train}:4", "empty"),
        (f"{train}:5", "too_long"),
        (f"{train}:7", "duplicate"),
    }


def test_evaluation_rows_are_all_kept_with_their_texts(train: Path, tmp_path: Path) -> None:
    prepared = prepare(data_config(train, target_language="de"), tmp_path, name="test", is_training=False)
    assert len(prepared.rows) == prepared.report.rows_kept == prepared.report.rows_read == 6
    assert (prepared.report.truncated, prepared.report.left_out) == (1, {})
    assert prepared.rows.texts("source") == ["one", "two", "", "t" * 13, "three", "two"]
    assert prepared.rows.texts("target")[3] == "zu lang"
    assert prepared.rows.texts("where")[5] == f"{train}:7"
    assert prepared.rows.texts("source_language") == [None] * 6
    assert prepared.rows.texts("target_language") == ["de"] * 6
    assert prepared.rows.source_sizes.tolist() == [3, 3, 0, LONGEST, 5, 3]


def test_evaluation_row_that_cannot_be_read_is_refused(train: Path, tmp_path: Path) -> None:
    with train.open("ab") as file:
        file.write(b"\xff\tx\n")
    with pytest.raises(DataError, match="not_utf8") as caught:
        prepare(data_config(train), tmp_path, is_training=False)
    assert caught.value.where == f"{train}:8"


def test_second_call_encodes_nothing_and_tells_the_same(train: Path, tmp_path: Path) -> None:
    first = prepare(data_config(train), tmp_path)
    again = ByteTokenizer()
    second = prepare(data_config(train), tmp_path, again, name="other")
    assert again.num_rows == 0
    assert decoded(second.rows) == decoded(first.rows)
    assert second.rows.digest == first.rows.digest
    assert second.report.to_json() == first.report.to_json() | {"name": "other"}
    assert decoded(load_rows(first.rows.directory)) == decoded(first.rows)


@pytest.mark.parametrize(
    "change",
    [
        {"max_source_length": 99},
        {"max_target_length": 99},
        {"source_prefix": "translate: "},
        {"source_language": "en"},
        {"target_language": "de"},
        {"cleaning": {"drop_duplicates": False, "max_bad_fraction": 0.9}},
        {"train": [{"path": "TRAIN", "target_language": "de"}]},
        {"train": [{"path": "TRAIN"}, {"path": "TRAIN"}]},
    ],
    ids=str,
)
def test_key_changes_with_every_setting_that_changes_a_row(train: Path, change: dict[str, Any]) -> None:
    for source in change.get("train", []):
        source["path"] = str(train)
    before, after = data_config(train), data_config(train, **change)
    keys = [cache_key(data.train, data, "t", is_training=True) for data in (before, after)]
    assert keys[0] != keys[1]


def test_key_changes_with_content_tokenizer_and_held_out_rows_only(train: Path) -> None:
    data = data_config(train)
    weighted = data_config(train, train=[{"path": str(train), "weight": 3.0}], temperature=5.0, test="x.tsv")
    key = cache_key(data.train, data, "t", is_training=True)
    assert cache_key(weighted.train, weighted, "t", is_training=True) == key
    others = [
        cache_key(data.train, data, "u", is_training=True),
        cache_key(data.train, data, "t", is_training=False),
        cache_key(data.train, data, "t", is_training=True, held_out=frozenset({b"x"})),
    ]
    train.write_text(train.read_text().replace("one", "One"))
    others.append(cache_key(data.train, data, "t", is_training=True))
    assert len({key, *others}) == 5


def test_cleaning_does_not_change_the_key_of_an_evaluation_set(train: Path) -> None:
    strict, loose = data_config(train), data_config(train, cleaning={"drop_copies": False})
    keys = {cache_key(data.train, data, "t", is_training=False) for data in (strict, loose)}
    assert len(keys) == 1


def test_mixture_knows_the_source_of_each_row(train: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"source": "two", "target": "zwei"}\n{"source": "six", "target": "sechs"}\n')
    prepared = prepare(data_config(train, other), tmp_path)
    assert prepared.rows.source_index.tolist() == [0, 0, 0, 1]
    assert prepared.report.rows_per_source == [3, 1]


def test_digest_follows_the_tokens_and_nothing_else(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = prepare(data_config(train), tmp_path).rows.digest
    moved = tmp_path / "moved.tsv"
    shutil.copy(train, moved)
    monkeypatch.setattr(cache, "ROWS_PER_BATCH", 2)
    small_batches = prepare(data_config(moved), tmp_path).rows
    assert small_batches.digest == digest
    assert decoded(small_batches)[2] == ("three", "drei", 5)
    moved.write_text(moved.read_text().replace("drei", "dreI"))
    assert prepare(data_config(moved), tmp_path).rows.digest != digest


def test_token_that_moves_from_one_row_to_the_next_changes_the_digest(tmp_path: Path) -> None:
    digests = set()
    for name, pairs in (("a", ["ab\tx", "c\tx"]), ("b", ["a\tx", "bc\tx"])):
        path = tmp_path / f"{name}.tsv"
        path.write_text("\n".join(["source\ttarget", *pairs]))
        digests.add(
            prepare(
                data_config(path),
                tmp_path,
                lambda rows: [(row, Encoded(list(row.source.encode()), [1])) for row in rows],
            ).rows.digest
        )
    assert len(digests) == 2


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=st.data())
def test_take_any_rows_in_any_order(tmp_path: Path, choices: st.DataObject) -> None:
    tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5)
    example = st.builds(Encoded, tokens, tokens, st.integers(0, 9), st.just(False))
    batches = choices.draw(st.lists(st.lists(example, max_size=4), min_size=1, max_size=4).filter(any))
    with RowWriter(tmp_path, with_texts=False) as writer:
        for index, batch in enumerate(batches):
            writer.write([(Row("x:1", "", "", None, None), one) for one in batch], index)
        writer.finish({})
    written = [one for batch in batches for one in batch]
    rows = EncodedRows(tmp_path)
    ids = choices.draw(st.lists(st.integers(0, len(written) - 1), max_size=10))
    taken = [(a.tolist(), b.tolist(), start) for a, b, start in rows.take(ids)]
    assert taken == [(written[i].input_ids, written[i].labels, written[i].marker) for i in ids]
    assert rows.source_sizes.tolist() == [len(one.input_ids) for one in written]
    assert rows.target_sizes.tolist() == [len(one.labels) for one in written]
    assert rows.source_index.tolist() == [index for index, batch in enumerate(batches) for _ in batch]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DataError("no such language"), MemoryError()])
def test_interrupted_build_leaves_nothing(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(cache, "ROWS_PER_BATCH", 2)
    tokenizer = ByteTokenizer()

    def fails_later(rows: list[Row]) -> list[Encoded]:
        if tokenizer.num_rows:
            raise error
        return tokenizer(rows)

    with pytest.raises(type(error)):
        prepare(data_config(train), tmp_path, fails_later)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(prepare(data_config(train), tmp_path).rows) == 3


def test_leftovers_of_a_killed_build_are_not_read_and_removed(train: Path, tmp_path: Path) -> None:
    data = data_config(train)
    key = cache_key(data.train, data, "bytes", is_training=True)
    leftover = tmp_path / "cache" / f"{key}.building"
    leftover.mkdir(parents=True)
    (leftover / "rows.arrow").write_bytes(b"half")
    with pytest.raises(DataError):
        load_rows(leftover)
    assert len(prepare(data, tmp_path).rows) == 3
    assert not leftover.exists()


def test_full_disk_is_explained(train: Path, tmp_path: Path) -> None:
    def full(_: list[Row]) -> list[Encoded]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match="no space left"):
        prepare(data_config(train), tmp_path, full)


@pytest.mark.parametrize("name", ["rows.arrow", "source_sizes.npy", "target_sizes.npy", "meta.json"])
@pytest.mark.parametrize("damage", [bytes.__len__, lambda content: len(content) // 2, lambda _: 0])
def test_damaged_cache_is_refused(train: Path, tmp_path: Path, name: str, damage: Any) -> None:
    directory = prepare(data_config(train), tmp_path).rows.directory
    path = directory / name
    keep = damage(path.read_bytes())
    if keep == path.stat().st_size:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError) as caught:
        load_rows(directory)
    assert str(directory) in caught.value.where


def test_too_many_rows_left_out_still_leaves_the_reports(train: Path, tmp_path: Path) -> None:
    data = data_config(train, cleaning={"max_bad_fraction": 0.4})
    with pytest.raises(DataError, match="6 rows read, 3 kept; left out: duplicate 1, empty 1, too_long 1"):
        prepare(data, tmp_path, report_dir=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["train"]["left_out"] == {"empty": 1, "too_long": 1, "duplicate": 1}
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 3
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_nothing_left(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("source\ttarget\nsame\tsame\n" + f"{'x' * 20}\t{'y' * 20}\n")
    with pytest.raises(DataError, match="no row is left: 2 rows read, 0 kept; left out: copy 1, too_long 1"):
        prepare(data_config(path), tmp_path)


def test_reports_of_all_sets(train: Path, tmp_path: Path) -> None:
    held_out = frozenset({source_digest("ONE")})
    sets = [prepare(data_config(train), tmp_path, held_out=held_out)]
    sets += [prepare(data_config(train), tmp_path, name="validation", is_training=False)]
    for _ in range(2):
        write_reports(tmp_path / "run", sets)
        report = json.loads((tmp_path / "run" / "data_report.json").read_text())
        assert {name: one["rows_kept"] for name, one in report.items()} == {"train": 3, "validation": 6}
        assert report["train"]["leaked"] == 1
        assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 3
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"data_report.json", "quarantine.jsonl"}


def test_quarantine_takes_text_that_is_not_unicode(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    good = '{"source": "one", "target": "eins"}\n'
    path.write_text(good + '{"source": "two", "target": "\\ud800"}\n{"\\ud800source": "x", "target": "y"}\n')
    prepared = prepare(data_config(path), tmp_path)
    assert len(prepared.quarantine.read_text(encoding="utf-8").splitlines()) == 2
