"""Regenerate the LibreOffice help pairs (en-de) from Debian's packages.

    python examples/data/make_pairs.py libreoffice-help.en-de.tsv.gz

Needs Debian's ``apt-get`` (after ``apt-get update``) and ``dpkg-deb``.  The packages libreoffice-help-en-us and -de
hold the same HTML pages, translated by people.  Paragraphs and headings in a page's display area carry equal
(tag, class, id) in both languages; a page where they differ in order or number is left out.
"""

import argparse
import gzip
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = ("libreoffice-help-en-us", "libreoffice-help-de")
HELP = Path("usr/share/libreoffice/help")
MIN_WORDS = 4
TAGS = {"p", "h1", "h2", "h3", "h4", "h5", "h6"}
CODE = {"code", "smathcode"}  # classes of paragraphs that are no text
MERGED_KEYS = ("CommandCtrl", "BefehlStrg")  # two platforms' key names, run together

Key = tuple[str, str, str]


class DisplayArea(HTMLParser):
    """The paragraphs and headings of a help page, each with its (tag, class, id)."""

    def __init__(self, page: str) -> None:
        """Read the page."""
        super().__init__()
        self.keys: list[Key] = []
        self.texts: list[str] = []
        self.inside = False
        self.open_tag = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter the display area, leave it at the footer, or begin a text."""
        names = {name: value or "" for name, value in attrs}
        if names.get("id") == "DisplayArea":
            self.inside = True
        elif tag == "footer":
            self.inside = False
        elif self.inside and tag in TAGS:
            self.keys.append((tag, names.get("class", ""), names.get("id", "")))
            self.texts.append("")
            self.open_tag = tag

    def handle_endtag(self, tag: str) -> None:
        """End a text."""
        if tag == self.open_tag:
            self.open_tag = ""

    def handle_data(self, data: str) -> None:
        """Add to the open text."""
        if self.open_tag:
            self.texts[-1] += data


def unpack(directory: Path) -> None:
    """Download the packages and unpack them."""
    subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=", "download", *PACKAGES], cwd=directory, check=True)
    for deb in directory.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", deb, directory], check=True)


def is_useful(source: str, target: str) -> bool:
    """Whether the pair is translated text of some length, without merged key names."""
    merged = any(keys in text for keys in MERGED_KEYS for text in (source, target))
    return len(source.split()) >= MIN_WORDS and bool(target) and source != target and not merged


def pairs(tree: Path) -> Iterator[tuple[str, str, str]]:
    """Page, source and target of every useful pair, each pair once, in the order of the pages."""
    english = tree / HELP / "en-US" / "text"
    seen: set[tuple[str, str]] = set()
    for path in sorted(english.rglob("*.html")):
        page = path.relative_to(english)
        other = tree / HELP / "de" / "text" / page
        if not other.is_file():
            continue
        source, target = (DisplayArea(file.read_text("utf-8")) for file in (path, other))
        if source.keys != target.keys:
            continue
        for (_, kind, _), *texts in zip(source.keys, source.texts, target.texts, strict=True):
            pair = (" ".join(texts[0].split()), " ".join(texts[1].split()))
            if kind not in CODE and pair not in seen and is_useful(*pair):
                seen.add(pair)
                yield str(page.with_suffix("")), *pair


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the file to write (.tsv.gz; columns page, source, target)")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as directory:
        unpack(Path(directory))
        rows = list(pairs(Path(directory)))
    text = "".join("\t".join(row) + "\n" for row in [("page", "source", "target"), *rows])
    out.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{out}: {len(rows)} pairs of {len({row[0] for row in rows})} pages")


if __name__ == "__main__":
    main()
