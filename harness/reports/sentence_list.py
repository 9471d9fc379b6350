"""Lists of sentences on the page, with their differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape

from harness.reports.changes import Changes
from harness.reports.checks import Finding
from harness.reports.diffs import mark_differences
from harness.reports.html import NUM_LISTED
from harness.reports.sentences import Sentences
from harness.scoring.scores import sentence_chrf

LEGEND = (
    "<mark>Marked</mark>: in the output but not there in the reference; <u>underlined</u>: missing from the output."
)
_EMPTY = "<em>(empty)</em>"


@dataclass(frozen=True)
class SentenceList:
    """Turns rows into list items, each with its findings, its change and its n best outputs."""

    sentences: Sentences
    findings: list[Finding]
    changes: Changes | None

    def items(self, name: str, rows: Sequence[int], label: str = "", *, is_change: bool = False) -> str:
        """A list with the id `name`, named by `label` or by the heading of that name.

        `is_change`: the differences shown are those between the baseline's output and the new one.
        """
        body = "".join(self._item(row, is_change, f" id='line-{row + 1}'" if name == "all" else "") for row in rows)
        labelled = f"aria-label='{escape(label)}'" if label else f"aria-labelledby='{name}-heading'"
        return f"<ol role='list' class='sentences{' beside' if is_change else ''}' id='{name}' {labelled}>{body}</ol>"

    def links(self, rows: Sequence[int]) -> str:
        """Line numbers, which lead to the sentences that the page has."""
        numbers = (f"<a href='#line-{row + 1}'>{row + 1}</a>" if row < NUM_LISTED else str(row + 1) for row in rows)
        return ", ".join(numbers)

    @cached_property
    def _titles_of(self) -> dict[int, list[Finding]]:
        found: dict[int, list[Finding]] = {}
        for finding in self.findings:
            for row in finding.rows:
                found.setdefault(row, []).append(finding)
        return found

    def _item(self, row: int, is_change: bool, anchor: str) -> str:
        found, changes = self._titles_of.get(row, []), self.changes
        kinds = ["suspect", *(finding.name for finding in found)] if found else []
        gain = ""
        if changes is not None and changes.baseline.hypotheses[row] != self.sentences.hypotheses[row]:
            direction = "better" if changes.gains[row] > 0 else "worse" if changes.gains[row] < 0 else ""
            kinds += ["changed", direction]
            gain = f" ({changes.gains[row]:+.1f})".replace("-", "\u2212")
        tags = "".join(f" <span class='tag'>{escape(finding.title)}</span>" for finding in found)
        data = f" data-kinds='{' '.join(kinds)}'" if kinds else ""
        about = f"Line {row + 1:,} \u00b7 chrF2 {self.sentences.chrf[row]:.1f}{gain}{tags}"
        texts = f"<dl>{self._texts(row, is_change)}</dl>{self._outputs(row)}"
        return f"<li{anchor}{data}><p class='about'>{about}</p>{texts}</li>"

    def _texts(self, row: int, is_change: bool) -> str:
        source, reference = escape(self.sentences.sources[row]), self.sentences.references[row]
        output = self.sentences.hypotheses[row]
        if is_change and self.changes is not None:
            old, new = mark_differences(self.changes.baseline.hypotheses[row], output)
            whole = _entry("Source", source, "whole") + _entry("Reference", escape(reference), "whole")
            return whole + _entry("Baseline", old) + _entry("Output", new)
        marked_reference, marked_output = mark_differences(reference, output)
        return _entry("Source", source) + _entry("Reference", marked_reference) + _entry("Output", marked_output)

    def _outputs(self, row: int) -> str:
        """The n best of a row, folded up."""
        best = self.sentences.outputs[row]
        if len(best) < 2:
            return ""
        chrf = sentence_chrf([one.text for one in best], [self.sentences.references[row]] * len(best))
        lines = "".join(
            f"<li><span dir='auto'>{escape(one.text) or _EMPTY}</span> "
            f"<small>score {one.score:.3f} \u00b7 chrF2 {own:.1f}</small></li>"
            for one, own in zip(best, chrf, strict=True)
        )
        return f"<details class='outputs'><summary>{len(best)} best outputs</summary><ol>{lines}</ol></details>"


def _entry(name: str, html: str, kind: str = "") -> str:
    return f"<dt>{name}</dt><dd class='{kind}' dir='auto'>{html or _EMPTY}</dd>"
