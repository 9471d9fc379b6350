"""report.html of decoded rows. All text of rows and outputs is escaped; the scores are those of scores.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from statistics import mean, median
from typing import Any

from harness.reports.changes import Changes
from harness.reports.checks import Finding
from harness.reports.html import NUM_LISTED, NUM_WORST, bar, card, contents, heading, html_page, search_box, table
from harness.reports.sentence_list import LEGEND, SentenceList
from harness.reports.sentences import Sentences
from harness.scoring.scores import HIGHER_IS_BETTER, LABELS

NUM_BINS = 10
NUM_OF_FINDING = 20
NUM_CHANGED = 25
_UNSET: tuple[Any, ...] = (None, 0, 1, [], ())  # of settings that then do nothing


def render_page(
    title: str, summary: Mapping[str, Any], sentences: Sentences, findings: list[Finding], changes: Changes | None
) -> str:
    """The whole page. `summary` is scores.json."""
    show = SentenceList(sentences, findings, changes)
    worst = sorted(range(len(sentences.chrf)), key=lambda row: (sentences.chrf[row], row))[:NUM_WORST]
    titles = {
        "findings": "Findings",
        "length": "By length",
        **({"language": "By language pair"} if summary["by_language"] else {}),
        "spread": "Sentence scores",
        **({"changes": "Most changed"} if changes else {}),
        "worst": f"The {len(worst)} worst sentences",
        "all": "All sentences",
    }
    parts = [
        _head(title, summary),
        contents(titles),
        heading("findings", titles["findings"]),
        *_findings(findings, show),
        heading("length", "By length of the source"),
        _groups(summary["by_length"]),
    ]
    if summary["by_language"]:
        parts += [heading("language", titles["language"]), _pairs(summary["by_language"])]
    parts += [heading("spread", titles["spread"]), _spread(sentences, changes)]
    if changes is not None:
        parts += [heading("changes", titles["changes"]), *_changes(summary["baseline"], changes, show)]
    parts += [heading("worst", titles["worst"]), f"<p class='soft'>Lowest chrF2 first. {LEGEND}</p>"]
    parts += [show.items("worst", worst), *_all_sentences(sentences, show, findings, changes)]
    return html_page(title, parts)


def _head(title: str, summary: Mapping[str, Any]) -> str:
    num, seconds = summary["sentences"], summary["decode_seconds"]
    speed = f", {num / seconds:,.1f} sentences a second" if seconds > 0 else ""
    against = f" Changes are those against {escape(summary['baseline']['name'])}." if "baseline" in summary else ""
    signatures = {
        LABELS[name]: [f"<code>{escape(signature)}</code><div class='soft'>{escape(details)}</div>"]
        for name, signature in summary["signatures"].items()
        for details in [summary["details"].get(name, "")]
    }
    return (
        f"<header><h1>{escape(title)}</h1>"
        f"<p class='soft'>{num:,} sentences, decoded in {seconds:,.1f} s{speed}. {escape(search_in_words(summary))}</p>"
        f"<p class='soft'>Score of an output: {escape(summary['hypothesis_score'])}.{against}</p>"
        f"{cards(summary)}"
        + table(signatures, caption="sacreBLEU's signatures, to be quoted with the scores", kind="wide")
        + _prompt(summary.get("prompt", {}))
        + "</header>"
    )


def _prompt(prompt: Mapping[str, Any]) -> str:
    """How a language model was asked, folded up."""
    lines = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd><code>{escape(text)}</code></dd>"
        for name, value in prompt.items()
        for text in [json.dumps(value, ensure_ascii=False)]
    )
    return f"<details class='outputs'><summary>Prompt</summary><dl>{lines}</dl></details>" if lines else ""


def search_in_words(summary: Mapping[str, Any]) -> str:
    """The settings of `summary["beam"]`: what is always told, then whatever else is set."""
    told = dict(summary["beam"])
    num_beams = told.pop("beam_size")
    kind = f"beam search with {num_beams} beams" if num_beams > 1 else "greedy search"
    kind = "minimum risk" if told.get("minimum_risk") else "sampling" if told.get("sampling") else kind
    words = [f"preset {told.pop('preset')}", f"length penalty {told.pop('length_penalty'):g}"]
    words.append(f"at most {told.pop('max_length')} tokens")
    words += [
        f"{name.replace('_', ' ')} {value}" for name, value in _flat(told) if value is True or value not in _UNSET
    ]
    if summary.get("precision", "model") != "model":
        words.append(f"weights in {summary['precision']}")
    return f"{kind.capitalize()}: {', '.join(words)}."


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def cards(summary: Mapping[str, Any]) -> str:
    """Every score of a scores.json, large, with its 95 % interval and what became of the baseline's."""
    confidence, earlier = summary.get("confidence", {}), summary.get("baseline", {}).get("scores", {})
    items = []
    for name in LABELS:
        if name in summary:
            limits = "95 %: {:.1f} to {:.1f}".format(*confidence[name]) if name in confidence else ""
            change = _change(name, earlier[name]["delta"]) if name in earlier else ""
            against = f"{change}, p {earlier[name]['p']:.3f}" if change else ""
            better = f"{'higher' if HIGHER_IS_BETTER[name] else 'lower'} is better"
            number = _number(summary[name], name in summary["signatures"])
            items.append(card(LABELS[name], number, limits, against, better))
    return f"<ul class='cards'>{''.join(items)}</ul>"


def _number(value: float | None, is_score: bool) -> str:
    return "not finite" if value is None else f"{value:.{1 if is_score else 3}f}"


def _change(name: str, delta: float) -> str:
    """A difference of scores, green if it is for the better."""
    if round(delta, 1) == 0:
        return "\u00b10.0"
    kind = "good" if (delta > 0) == HIGHER_IS_BETTER[name] else "bad"
    return f"<span class='{kind}'>{delta:+.1f}</span>".replace("-", "\u2212")


def _findings(findings: list[Finding], show: SentenceList) -> Iterator[str]:
    num_rows = len(show.sentences.hypotheses)
    suspects = len({row for finding in findings for row in finding.rows})
    yield (
        f"<p class='soft'>{suspects:,} of {num_rows:,} outputs ({_share(suspects, num_rows)}) look odd in one way or "
        "more. These are hints from the texts alone: read before you believe.</p><div class='ledger'>"
    )
    for name, title, rows, method in findings:
        listed, rest = rows[:NUM_OF_FINDING], rows[NUM_OF_FINDING:]
        more = f"<p>And {len(rest):,} more, on lines {show.links(rest)}.</p>" if rest else ""
        body = show.items(f"finding-{name}", listed, title) + more if rows else ""
        yield (
            f"<details><summary class='{'' if rows else 'none'}'><span>{escape(title)}</span>"
            f"<span id='count-{name}'>{len(rows):,}</span><span>{_share(len(rows), num_rows)}</span></summary>"
            f"<p class='soft'>{escape(method)}</p>{body}</details>"
        )
    yield "</div>"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _groups(groups: list[dict[str, Any]]) -> str:
    lines = {
        f"{group['from']:,} to {group['to']:,}": [*_scores_of(group), f"{group['length_ratio']:.2f}"]
        for group in groups
    }
    heads = ["Source characters", "Sentences", *_labels_of(groups[0]), "Length ratio"]
    caption = "Length ratio: characters of the outputs for each character of the references"
    return table(lines, heads, caption, kind="parts")


def _pairs(groups: dict[str, dict[str, Any]]) -> str:
    heads = ["Languages", "Sentences", *_labels_of(next(iter(groups.values())))]
    return table({pair: _scores_of(group) for pair, group in groups.items()}, heads, kind="parts")


def _labels_of(group: Mapping[str, Any]) -> list[str]:
    return [LABELS[name] for name in LABELS if name in group]


def _scores_of(group: Mapping[str, Any]) -> list[str]:
    """The cells of a part of the set; a bar under each score compares the parts."""
    scores = [group[name] for name in LABELS if name in group]
    return [f"{group['sentences']:,}", *(f"{score:.1f}{bar(min(score, 100) / 100)}" for score in scores)]


def _spread(sentences: Sentences, changes: Changes | None) -> str:
    counts = [_histogram(sentences.chrf)]
    if changes is not None:
        counts.append(_histogram([now - gain for now, gain in zip(sentences.chrf, changes.gains, strict=True)]))
    largest = max(map(max, counts))
    step = 100 // NUM_BINS
    lines = {
        f"{step * at} to {step * (at + 1)}": [
            *(f"{count[at]:,}" for count in counts),
            "".join(bar(count[at] / largest, kind) for count, kind in zip(counts, ("", "before"), strict=False)),
        ]
        for at in range(NUM_BINS)
    }
    exact = sum(out == ref for out, ref in zip(sentences.hypotheses, sentences.references, strict=True))
    caption = (
        f"Sentences by their own chrF2: mean {mean(sentences.chrf):.1f}, median {median(sentences.chrf):.1f}. "
        f"Outputs that are equal to their reference: {exact:,}."
    )
    heads = ["chrF2", "Sentences", *(["Baseline"] if changes else []), ""]
    return table(lines, heads, caption, kind="bars")


def _histogram(chrf: list[float]) -> list[int]:
    counts = [0] * NUM_BINS
    for score in chrf:
        counts[min(NUM_BINS - 1, max(0, int(score * NUM_BINS // 100)))] += 1
    return counts


def _changes(summary: Mapping[str, Any], changes: Changes, show: SentenceList) -> Iterator[str]:
    lines = {
        LABELS[name]: [
            f"{one['score']:.1f}",
            _change(name, one["delta"]),
            "{:+.1f} to {:+.1f}".format(*one["interval"]).replace("-", "\u2212"),
            f"{one['p']:.3f}",
        ]
        for name, one in summary["scores"].items()
    }
    num_rows = len(show.sentences.hypotheses)
    yield (
        f"<p>Against <code>{escape(summary['name'])}</code>, {summary['changed']:,} of {num_rows:,} outputs are "
        f"different: {summary['better']:,} better and {summary['worse']:,} worse by their chrF2.</p>"
    )
    yield table(lines, ["", "Baseline", "Change", "95 % interval", "p"], "Paired bootstrap test on the same rows")
    legend = "<u>Underlined</u>: only in the baseline's output; <mark>marked</mark>: only in the new one."
    yield f"<p class='soft'>{legend}</p>"
    for name, title, rows in (("losses", "Largest losses", changes.worse), ("gains", "Largest gains", changes.better)):
        if rows:
            yield f"<h3 id='{name}-heading'>{title}</h3>{show.items(name, rows[:NUM_CHANGED], is_change=True)}"


def _all_sentences(
    sentences: Sentences, show: SentenceList, findings: list[Finding], changes: Changes | None
) -> Iterator[str]:
    num_rows = len(sentences.hypotheses)
    listed = range(min(NUM_LISTED, num_rows))
    some = f" (the first {len(listed):,} of {num_rows:,})" if len(listed) < num_rows else ""
    yield f"<section class='on-screen'>{heading('all', f'All sentences{some}')}<p class='soft'>{LEGEND}</p>"
    if some:
        yield "<p class='soft'>hypotheses.txt has every output, line by line beside sources.txt and references.txt.</p>"
    filters = {"suspect": "Any finding"} | {finding.name: finding.title for finding in findings if finding.rows}
    if changes is not None:
        filters |= {"changed": "Changed", "worse": "Worse than the baseline", "better": "Better than the baseline"}
    yield search_box("words of source, reference or output", filters)
    yield show.items("all", listed) + "</section>"
