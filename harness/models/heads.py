"""Classification heads: what config.json must say of the labels, and which weights a base model need not have."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from harness.config.schema import ClassificationConfig

PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


def label_names(classification: ClassificationConfig) -> list[str]:
    """The names of the logits, in order; a number is called `value`."""
    return classification.labels or ["value"]


def set_labels(
    config: PreTrainedConfig, classification: ClassificationConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes labels, kind of problem and padding id into `config`, in place.

    Decoder-only models classify by the last token that is not padding. Where the tokeniser has no padding token, its
    end token pads, as in `tasks.classification`.
    """
    names = label_names(classification)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = PROBLEM_TYPES[classification.problem]
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config.pad_token_id = config.get_text_config().pad_token_id = padding


def stored_labels(directory: Path) -> ClassificationConfig | None:
    """Labels and kind of problem of a screened model directory, None if its model is no classifier.

    Where config.json does not say the kind, one logit is a number.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        return None
    names = [name for _, name in sorted(config.id2label.items())]
    kinds = {stored: problem for problem, stored in PROBLEM_TYPES.items()}
    problem = kinds.get(config.problem_type or "", "regression" if len(names) == 1 else "single_label")
    content = {"problem": problem, "labels": None if problem == "regression" else names}
    return ClassificationConfig.model_validate(content)


def head_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters between the base model and the logits, which a base checkpoint may lack.

    That is everything beside the base model, and its pooler, which models trained on masked tokens never had.
    """
    base = f"{model.base_model_prefix}."
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if not name.startswith(base) or name.startswith(f"{base}pooler.")}
