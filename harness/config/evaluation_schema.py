"""The `evaluation` and `early_stopping` sections of the run file; every ``description`` is a sentence of the manual."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from harness.config.section import Section

DecodedMetric = Literal["bleu", "chrf", "chrf++", "ter"]
ClassMetric = Literal["accuracy", "macro_f1", "micro_f1", "mcc", "ece", "rmse", "pearson", "spearman"]
Metric = DecodedMetric | ClassMetric
PresetName = Literal["hf", "fairseq", "gnmt", "marian", "opennmt", "ctranslate2"]
Precision = Literal["model", "bfloat16", "int8"]

# What each toolkit takes when it is not told: beams and length penalty (of `hf` the beams are ours: it has 1).
_PRESET_DEFAULTS: dict[str, tuple[int, float]] = {
    "hf": (5, 1.0), "fairseq": (5, 1.0), "gnmt": (4, 0.6), "marian": (12, 0.0), "opennmt": (5, 1.0),
    "ctranslate2": (2, 1.0),
}  # fmt: skip


def forget_search_of_preset(evaluation: dict[str, Any]) -> None:
    """Takes out in place what another preset brings with it."""
    for key in ("beam_size", "length_penalty"):
        evaluation.pop(key, None)


class SamplingConfig(Section):
    temperature: float = Field(1.0, gt=0.0, description="Divides the logits: below 1 likelier tokens become likelier.")
    top_k: int = Field(0, ge=0, description="Only the k likeliest tokens are drawn from; 0: all.")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="Only the likeliest tokens of this probability together.")


class MinimumRiskConfig(Section):
    utility: Literal["chrf", "bleu"] = Field("chrf", description="Sentence score of one sample against another.")
    samples: int = Field(32, gt=1, description="Outputs drawn for each row.")


class EvaluationConfig(Section):
    every_steps: int | None = Field(None, gt=0, description="Steps between evaluations; null: only at the end.")
    preset: PresetName = Field("hf", description="Toolkit whose score and stop rule the search has.")
    beam_size: int = Field(5, gt=0, description="Beams per sentence, 1 is greedy; the default follows from `preset`.")
    length_penalty: float = Field(
        1.0, description="Exponent of the length in the hypothesis score; the default follows from `preset`."
    )
    early_stopping: bool | Literal["never"] = Field(
        False,
        description="transformers' rule (`hf`). false: a likely bound ends a search; true: as many finished outputs as "
        "beams; never: only a certain bound.",
    )
    num_hypotheses: int = Field(
        1, gt=0, description="Outputs kept of each row (with `sampling`: drawn), in nbest.jsonl if more than one."
    )
    beam_groups: int = Field(1, gt=0, description="Groups of beams that are searched one after the other (`hf`).")
    diversity_penalty: float = Field(
        0.0,
        ge=0.0,
        description="Taken from log p of a token for each beam of an earlier group that just chose it.",
    )
    sampling: SamplingConfig | None = Field(
        None, description="Draw the outputs instead of searching; beams do not count then."
    )
    minimum_risk: MinimumRiskConfig | None = Field(
        None, description="Minimum Bayes risk: of many samples the one that is most like the others."
    )
    max_target_length: int | None = Field(None, gt=1, description="Longest output; default `data.max_target_length`.")
    max_length_ratio: float | None = Field(
        None, gt=0.0, description="Longest output as a multiple of the row's own source in tokens, plus 10."
    )
    min_target_length: int = Field(0, ge=0, description="Output tokens before an output may end.")
    min_length_ratio: float | None = Field(
        None, gt=0.0, description="Output tokens before an output may end, as a multiple of the row's own source."
    )
    no_repeat_ngram: int = Field(0, ge=0, description="No sequence of so many tokens comes twice; 0: no such rule.")
    repetition_penalty: float = Field(
        1.0, gt=0.0, description="Above 1, tokens that were there before become less likely, as in transformers."
    )
    bad_words: list[str] = Field(default_factory=list, description="Texts whose tokens are never chosen in a row.")
    allow_unknown: bool = Field(True, description="Whether an output may have the unknown token.")
    stop_strings: list[str] = Field(default_factory=list, description="Texts that end an answer (causal_lm).")
    precision: Precision = Field(
        "model", description="Type of the weights while decoding. int8: linear layers, dynamically, on CPU only."
    )
    max_tokens_per_device: int | None = Field(
        None, gt=0, description="Decoded at once: rows x beams x longest source; default `batch.max_tokens_per_device`."
    )
    metrics: list[Metric] = Field(
        ["bleu", "chrf"], description="Scores beside the loss; the default follows from `task`."
    )
    bootstrap_samples: int = Field(
        1000, ge=0, description="Resamplings of the rows for 95 % confidence intervals; 0: no intervals."
    )
    max_rows: int | None = Field(None, gt=0, description="Score only the first rows of the validation set.")
    initial: bool = Field(True, description="Score the model before the first step too.")

    @property
    def draws(self) -> bool:
        """Whether outputs are drawn instead of searched."""
        return self.sampling is not None or self.minimum_risk is not None

    @property
    def num_outputs(self) -> int:
        """Outputs of a row that are decoded at once: beams, or draws."""
        if self.minimum_risk is not None:
            return self.minimum_risk.samples
        return self.num_hypotheses if self.draws else self.beam_size

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_preset(cls, content: Any) -> Any:
        """Beams and length penalty that are not said are those of the toolkit."""
        if not isinstance(content, dict) or content.get("preset") not in _PRESET_DEFAULTS:
            return content
        beam_size, length_penalty = _PRESET_DEFAULTS[content["preset"]]
        return {"beam_size": beam_size, "length_penalty": length_penalty} | content


class EarlyStoppingConfig(Section):
    metric: Metric | Literal["loss", "nll"] = Field(
        "bleu", description="A validation score; the default follows from `task`."
    )
    patience: int = Field(10, gt=0, description="Evaluations without a better score before the run ends.")
    significance: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="A score is better only if a paired bootstrap test against the best one gives a p below this; "
        "null: any higher score is.",
    )
