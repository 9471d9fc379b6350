"""Building blocks of the self-contained pages: no network, no library. Whoever fills them in escapes texts."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path

NUM_WORST = 50
NUM_LISTED = 2000

_STYLE, _SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{b64encode(sha256(_SCRIPT.encode()).digest()).decode()}'"
)


def html_page(title: str, parts: Iterable[str]) -> str:
    """A page of HTML parts, one of them a `search_box`. No script but ours runs on it."""
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<meta http-equiv='Content-Security-Policy' content=\"{_POLICY}\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + f"\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def heading(name: str, title: str) -> str:
    """A heading that links lead to, and that may label a list."""
    return f"<h2 id='{name}-heading'>{title}</h2>"


def contents(titles: Mapping[str, str]) -> str:
    """Links to the headings of a page."""
    links = "".join(f"<a href='#{name}-heading'>{title}</a>" for name, title in titles.items())
    return f"<nav aria-label='Contents'>{links}</nav>"


def card(label: str, value: str, *notes: str) -> str:
    """One large number."""
    lines = "".join(f"<small>{note}</small>" for note in notes if note)
    return f"<li><small>{escape(label)}</small><b>{value}</b>{lines}</li>"


def table(lines: Mapping[str, Sequence[str]], heads: Sequence[str] = (), caption: str = "", kind: str = "") -> str:
    """An HTML table; the keys head the lines, the cells are HTML already."""
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in lines.items()
    )
    titles = "".join(f"<th scope='col'>{head}</th>" if head else "<td></td>" for head in heads)
    return (
        f"<div class='scroll'><table class='{kind}'>{f'<caption>{caption}</caption>' if caption else ''}"
        f"{f'<thead><tr>{titles}</tr></thead>' if heads else ''}<tbody>{body}</tbody></table></div>"
    )


def bar(share: float, kind: str = "") -> str:
    """A horizontal bar; 1 is the full width."""
    return f"<span class='bar {kind}' style='width:{100 * share:.1f}%'></span>"


def search_box(hint: str, filters: Mapping[str, str] | None = None) -> str:
    """For the list whose id is `all`; a filter shows the items with its key in their `data-kinds`."""
    choices = "".join(f"<option value='{kind}'>{escape(title)}</option>" for kind, title in (filters or {}).items())
    select = f"<select id='filter' aria-label='Show'><option value=''>All</option>{choices}</select>" if choices else ""
    return (
        "<div class='search' role='search' hidden><label for='search'>Search</label>"
        f"<input id='search' type='search' autocomplete='off' placeholder='{hint}'>{select}"
        "<span id='shown' class='soft' role='status'></span></div>"
    )
