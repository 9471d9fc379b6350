"""Readers: what is written is read back, and each kind of bad input has its own verdict with file:line."""

from __future__ import annotations

import ast
import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import harness.data
from harness.config.schema import DataConfig, DataSource
from harness.data.readers import MAX_LINE_BYTES
from harness.data.sources import READERS, BadRow, Row, as_source, read_rows, readable_rows
from harness.errors import DataError

Pairs = list[tuple[str, str]]
PAIRS: Pairs = [("Hello", "Hallo"), ('a "b" c', "ä\u2028ö"), ("你好, Welt", "")]
TSV = b"source\ttarget\n"
CSV = b"source,target\r\n"
HUGE = b"x" * (10 << 20)


def data_config(**fields: object) -> DataConfig:
    return DataConfig.model_validate({"train": [DataSource(path="unused.tsv")]} | fields)


def read(path: Path, **fields: object) -> list[Row | BadRow]:
    return list(read_rows(DataSource(path=str(path)), data_config(**fields)))


def write_tsv(path: Path, pairs: Pairs) -> None:
    path.write_bytes(TSV + "".join(f"{source}\t{target}\n" for source, target in pairs).encode())


def write_csv(path: Path, pairs: Pairs) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("source", "target"), *pairs])


def write_jsonl(path: Path, pairs: Pairs) -> None:
    lines = [json.dumps({"target": target, "id": 1, "source": source}) for source, target in pairs]
    path.write_text("\n".join(lines))


def write_parquet(path: Path, pairs: Pairs) -> None:
    pq.write_table(pa.table({"source": [pair[0] for pair in pairs], "target": [pair[1] for pair in pairs]}), path)


WRITERS: dict[str, Callable[[Path, Pairs], None]] = {
    ".tsv": write_tsv,
    ".csv": write_csv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def test_every_reader_has_a_writer_here() -> None:
    assert WRITERS.keys() == READERS.keys()


@pytest.mark.parametrize("extension", [".tsv", ".csv", ".jsonl", ".parquet", ".tsv.gz", ".csv.gz", ".jsonl.gz", ".TSV"])
def test_reads_back_what_was_written(tmp_path: Path, extension: str) -> None:
    plain = tmp_path / f"plain{extension.lower().removesuffix('.gz')}"
    WRITERS[plain.suffix](plain, PAIRS)
    path = tmp_path / f"rows.v1{extension}"
    path.write_bytes(gzip.compress(plain.read_bytes()) if extension.endswith(".gz") else plain.read_bytes())
    rows = read(path, source_language="en", target_language="de")
    first = {".jsonl": 1, ".parquet": 1}.get(plain.suffix, 2)
    assert rows == [Row(f"{path}:{first + i}", *pair, "en", "de") for i, pair in enumerate(PAIRS)]


any_text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
one_line = st.text(st.characters(codec="utf-8", exclude_characters="\0\t\r\n"), max_size=20)


@pytest.mark.parametrize(
    ("extension", "text"), [(".tsv", one_line), *((e, any_text) for e in (".csv", ".jsonl", ".parquet"))]
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=st.data())
def test_any_text_survives_any_format(
    tmp_path: Path, extension: str, text: st.SearchStrategy[str], choices: st.DataObject
) -> None:
    pairs = choices.draw(st.lists(st.tuples(text, text), min_size=1, max_size=5))
    path = tmp_path / f"rows{extension}"
    WRITERS[extension](path, pairs)
    assert [(row.source, row.target) for row in read(path) if isinstance(row, Row)] == pairs


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), extension=st.sampled_from([*READERS, ".tsv.gz", ".txt"]), header=st.booleans())
def test_any_bytes_give_rows_or_a_data_error(tmp_path: Path, content: bytes, extension: str, header: bool) -> None:
    path = tmp_path / f"rows{extension}"
    path.write_bytes({".tsv": TSV, ".csv": CSV}.get(extension, b"") + content if header else content)
    try:
        rows = read(path)
    except DataError as error:
        assert str(path) in error.where  # noqa: PT017 - raising is one of two right answers
    else:
        assert rows
        assert all(row.where.startswith(f"{path}:") for row in rows)


BAD_ROWS = [  # name, extension, bytes, line, reason
    ("too few columns", ".tsv", TSV + b"only one\n", 2, "wrong_column_count"),
    ("too many columns", ".tsv", TSV + b"a\tb\tc\n", 2, "wrong_column_count"),
    ("white space only", ".tsv", TSV + b"  \n", 2, "wrong_column_count"),
    ("latin-1", ".tsv", TSV + b"ok\tok\n" + "a\tü\n".encode("latin-1"), 3, "not_utf8"),
    ("cut in mid character", ".tsv", TSV + b"a\t\xe4\xbd", 2, "not_utf8"),
    ("encoded surrogate", ".tsv", TSV + b"a\t\xed\xa0\x80\n", 2, "not_utf8"),
    ("NUL", ".tsv", TSV + b"a\0\tb\n", 2, "control_characters"),
    ("10 MB line", ".tsv", TSV + b"a\t" + HUGE + b"\nc\td\n", 2, "line_too_long"),
    ("10 MB last line", ".tsv", TSV + b"a\t" + HUGE, 2, "line_too_long"),
    ("latin-1", ".csv", CSV + "a,ü\r\n".encode("latin-1"), 2, "not_utf8"),
    ("too few columns", ".csv", CSV + b"a\r\n", 2, "wrong_column_count"),
    ("text after quote", ".csv", CSV + b'"a"b,c\r\n', 2, "malformed"),
    ("open quote", ".csv", CSV + b'a,b\r\n"c,d\r\n', 3, "malformed"),
    ("NUL", ".csv", CSV + b"a\0,b\r\n", 2, "control_characters"),
    ("10 MB line", ".csv", CSV + b"a," + HUGE + b"\r\nc,d\r\n", 2, "line_too_long"),
    ("bad row after a record of two lines", ".csv", CSV + b'"a\r\nb",c\r\nd\r\n', 4, "wrong_column_count"),
    ("not JSON", ".jsonl", b'{"source": "a", "target": "b"\n', 1, "malformed"),
    ("a list", ".jsonl", b'["a", "b"]\n', 1, "malformed"),
    ("deep nesting", ".jsonl", b"[" * 100_000 + b"\n", 1, "malformed"),
    ("missing field", ".jsonl", b'{"source": "a", "target": "b"}\n{"source": "a"}\n', 2, "missing_field"),
    ("null", ".jsonl", b'{"source": "a", "target": null}\n', 1, "missing_field"),
    ("number", ".jsonl", b'{"source": 7, "target": "b"}\n', 1, "wrong_type"),
    ("object", ".jsonl", b'{"source": "a", "target": {"de": "b"}}\n', 1, "wrong_type"),
    ("language is a number", ".jsonl", b'{"source": "a", "target": "b", "source_language": 1}', 1, "wrong_type"),
    ("lone surrogate", ".jsonl", b'{"source": "a", "target": "\\ud800"}\n', 1, "not_utf8"),
    ("NUL", ".jsonl", b'{"source": "a", "target": "\\u0000"}\n', 1, "control_characters"),
    ("utf-16", ".jsonl", '{"source": "a", "target": "b"}'.encode("utf-16"), 1, "not_utf8"),
    ("10 MB line", ".jsonl", b'{"source": "' + HUGE + b'"}\n', 1, "line_too_long"),
]


@pytest.mark.parametrize(
    ("extension", "content", "line", "reason"), [pytest.param(*c[1:], id=f"{c[1]} {c[0]}") for c in BAD_ROWS]
)
def test_bad_row_is_named_and_reading_goes_on(
    tmp_path: Path, extension: str, content: bytes, line: int, reason: str
) -> None:
    good = {".tsv": b"c\td\n", ".csv": b"c,d\r\n", ".jsonl": b'{"source": "c", "target": "d"}\n'}[extension]
    path = tmp_path / f"rows{extension}"
    path.write_bytes(content if content.endswith(b"\n") else content + b"\n")
    bad = [row for row in read(path) if isinstance(row, BadRow)]
    assert [(row.where, row.reason) for row in bad][:1] == [(f"{path}:{line}", reason)]
    assert bad[0].detail
    with pytest.raises(DataError, match=reason) as caught:
        list(readable_rows(DataSource(path=str(path)), data_config()))
    assert caught.value.where == f"{path}:{line}"
    if reason != "malformed" or extension == ".jsonl":
        with path.open("ab") as file:
            file.write(good)
        last = read(path)[-1]
        assert isinstance(last, Row)
        assert (last.source, last.target) == ("c", "d")


def test_an_open_quote_counts_every_line_it_swallows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(CSV + b'a,"b\r\n' + b"c,d\r\n" * 9)
    assert [row.where for row in read(path)] == [f"{path}:{line}" for line in range(2, 12)]


def test_parquet_bad_values(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    broken = pa.array([b"ok", b"\xff", None, b"a\0b"]).view(pa.string())
    pq.write_table(pa.table({"source": broken, "target": ["x"] * 4}), path)
    good, *bad = read(path)
    assert good == Row(f"{path}:1", "ok", "x", None, None)
    assert [(row.where, row.reason) for row in bad if isinstance(row, BadRow)] == [
        (f"{path}:2", "not_utf8"),
        (f"{path}:3", "missing_field"),
        (f"{path}:4", "control_characters"),
    ]


def test_parquet_dictionary_and_large_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"source": pa.array(["a", "a"]).dictionary_encode(), "target": pa.array(["b", "c"], pa.large_string())}
    pq.write_table(pa.table(columns), path)
    assert [(row.source, row.target) for row in readable_rows(as_source(str(path)), data_config())] == [
        ("a", "b"),
        ("a", "c"),
    ]


BAD_FILES = [  # name, file name, bytes, place (after the path), what, hint
    ("empty", "a.tsv", b"", "", "empty", ""),
    ("empty", "a.csv", b"", "", "empty", ""),
    ("empty", "a.jsonl", b"", "", "no rows", ""),
    ("empty", "a.parquet", b"", "", "not a readable Parquet", ""),
    ("header only", "a.tsv", TSV, "", "no rows", ""),
    ("blank lines only", "a.jsonl", b"\n\n\n", "", "no rows", ""),
    ("no such column", "a.tsv", b"sources\ttarget\na\tb\n", ":1", "no column `source`", "did you mean `sources`?"),
    ("no such column", "a.csv", b"source,targets\na,b\n", ":1", "no column `target`", "did you mean `targets`?"),
    ("no header", "a.tsv", b"Hello\tHallo\n", ":1", "no column `source`", "data.source_column"),
    ("header twice", "a.tsv", b"source\ttarget\tsource\n", ":1", "more than once", ""),
    ("header not UTF-8", "a.tsv", b"source\ttarget\t\xff\n", ":1", "header cannot be read", "UTF-8"),
    ("header not UTF-8", "a.csv", b"source,target,\xff\n", ":1", "header cannot be read", "UTF-8"),
    ("header not CSV", "a.csv", b'"source"x,target\n', ":1", "header cannot be read", ""),
    ("utf-16", "a.tsv", "source\ttarget\na\tb\n".encode("utf-16"), ":1", "header cannot be read", "UTF-8"),
    ("unknown format", "a.txt", b"x", "", "unknown format `.txt`", "source: FILE"),
    ("misspelt format", "a.jsnl", b"x", "", "unknown format `.jsnl`", "did you mean `.jsonl`?"),
    ("no extension", "data", b"x", "", "unknown format", ""),
    ("compressed parquet", "a.parquet.gz", b"x", "", "unknown format `.parquet.gz`", ""),
    ("not gzip", "a.tsv.gz", TSV, ":1", "cannot be read", ""),
    ("gzip cut off", "a.tsv.gz", gzip.compress(TSV + b"a\tb\n" * 9)[:-9], ":", "cannot be read", ""),
    ("gzip bit flipped", "a.jsonl.gz", gzip.compress(b"{}\n" * 99)[:-8] + b"\0" * 8, ":", "cannot be read", ""),
    ("not parquet", "a.parquet", b"PAR1 no PAR1", "", "not a readable Parquet", ""),
]


@pytest.mark.parametrize(
    ("name", "content", "place", "what", "hint"), [pytest.param(*c[1:], id=f"{c[1]} {c[0]}") for c in BAD_FILES]
)
def test_bad_file_is_refused(tmp_path: Path, name: str, content: bytes, place: str, what: str, hint: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.where.startswith(f"{path}{place}")
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(TSV)
    with pytest.raises(DataError, match="no such file") as caught:
        read(tmp_path / "trian.tsv")
    assert caught.value.hint == "did you mean `train.tsv`?"
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "nowhere" / "train.tsv")


def test_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened: Is a directory"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"source": ["a"], "text": ["b"]}, "no column `target`; the header has `source`, `text`"),
        ({"source": [1], "target": ["b"]}, "column `source` holds int64, not text"),
        ({"source": ["a"], "target": [["b"]]}, "column `target` holds list<"),
        ({"source": ["a"], "target": ["b"], "target_language": [2]}, "column `target_language` holds int64"),
        ({"source": pa.array([], pa.string()), "target": pa.array([], pa.string())}, "no rows"),
    ],
)
def test_parquet_with_wrong_columns(tmp_path: Path, columns: dict[str, object], what: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError) as caught:
        read(path)
    assert what in caught.value.what


def test_parquet_damaged_inside(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, [(f"{i * 7919}", "x" * (i % 50)) for i in range(5000)])
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read(path)


def test_parallel_files(tmp_path: Path) -> None:
    source, target = tmp_path / "train.en", tmp_path / "train.de.gz"
    source.write_bytes("\ufeffa\tb\r\n\nc\n".encode())
    target.write_bytes(gzip.compress(b"A\n\nC"))
    rows = list(read_rows(DataSource(source=str(source), target=str(target)), data_config(source_language="en")))
    assert rows == [
        Row(f"{source}:1", "a\tb", "A", "en", None),
        Row(f"{source}:2", "", "", "en", None),
        Row(f"{source}:3", "c", "C", "en", None),
    ]


def test_parallel_files_of_different_length(tmp_path: Path) -> None:
    source, target = tmp_path / "train.en", tmp_path / "train.de"
    source.write_text("a\nb\nc\n")
    target.write_text("A\nB\n")
    with pytest.raises(DataError) as caught:
        list(read_rows(DataSource(source=str(source), target=str(target)), data_config()))
    assert str(caught.value).startswith(f"{source}: 3 lines, but {target} has 2")


def test_parallel_bad_line_names_the_file_it_is_in(tmp_path: Path) -> None:
    source, target = tmp_path / "train.en", tmp_path / "train.de"
    source.write_bytes(b"a\nb\n")
    target.write_bytes(b"A\n\xff\n")
    rows = list(read_rows(DataSource(source=str(source), target=str(target)), data_config()))
    assert (rows[1].where, isinstance(rows[1], BadRow)) == (f"{target}:2", True)


def test_language_of_the_row_wins_over_the_source_over_the_data(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("target_language\tsource\ttarget\nfr\ta\tb\n\tc\td\n")
    source = DataSource(path=str(path), target_language="ro")
    rows = list(readable_rows(source, data_config(source_language="en", target_language="de")))
    assert [(row.source_language, row.target_language) for row in rows] == [("en", "fr"), ("en", "ro")]


def test_other_column_names_quotes_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(b'\xef\xbb\xbfen\tid\tde\r\n"a\t1\tb"\r\n\r\nc\t2\td\r\n')
    rows = list(readable_rows(as_source(str(path)), data_config(source_column="en", target_column="de")))
    assert [(row.where, row.source, row.target) for row in rows] == [(f"{path}:2", '"a', 'b"'), (f"{path}:4", "c", "d")]


def test_longest_line_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    longest = b"a\t" + b"b" * (MAX_LINE_BYTES - 3) + b"\n"
    path.write_bytes(TSV + longest + b"b" + longest)
    assert [type(row) for row in read(path)] == [Row, BadRow]


def test_data_does_not_import_torch() -> None:
    for file in Path(next(iter(harness.data.__path__))).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "torch"], file
