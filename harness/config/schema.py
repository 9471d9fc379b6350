"""The run file as frozen, strictly typed models. ``docs/configuration.md`` is generated from this file,
so every ``description`` is a sentence of the manual."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from harness.config.evaluation_schema import EarlyStoppingConfig, EvaluationConfig
from harness.config.launch_schema import LaunchConfig, SlurmConfig
from harness.config.section import Section

DType = Literal["float32", "bfloat16", "float16"]
RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Task = Literal["translation", "causal_lm", "classification"]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class QuantizationConfig(Section):
    bits: Literal[4, 8] = Field(4, description="Width of the stored weights of linear layers; the head stays whole.")
    type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type.")
    double: bool = Field(True, description="Quantise the quantisation constants too (4 bits only).")
    compute_dtype: DType | None = Field(None, description="Type of the products; default `model.dtype`.")
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        "uint8", description="Type that packed 4-bit weights are stored as."
    )


class GradientCheckpointingConfig(Section):
    every: int = Field(1, gt=0, description="Recompute every k-th layer; the others keep their activations.")
    offload: bool = Field(False, description="Keep the inputs of recomputed layers in host memory.")


class ModelConfig(Section):
    path: str | None = Field(None, description="Directory or hub name of a model in safetensors format.")
    config: str | None = Field(
        None, description="Directory with config.json and tokeniser; the weights are drawn at random from `seed`."
    )
    dtype: DType = Field("float32", description="Compute type; the optimizer keeps float32 master weights.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention kernel.")
    dropout: Probability | None = Field(None, description="Overrides the model's own dropout.")
    attention_dropout: Probability | None = Field(None, description="Overrides the model's own attention dropout.")
    gradient_checkpointing: bool | GradientCheckpointingConfig = Field(
        False, description="Recompute activations in the backward pass; true: of every layer."
    )
    quantization: QuantizationConfig | None = Field(None, description="Load the base in 4 or 8 bits (needs `adapter`).")
    neftune_alpha: float | None = Field(
        None,
        gt=0.0,
        description="NEFTune: uniform noise on the input embeddings, up to alpha/sqrt(length x width).",
    )


class AdapterConfig(Section):
    method: Literal[
        "lora", "rslora", "dora", "pissa", "adalora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning", "bottleneck"
    ] = Field("lora", description="What is trained beside the frozen base.")
    rank: int = Field(16, gt=0, description="Rank of the low-rank methods; AdaLoRA: the average rank at the end.")
    alpha: float = Field(32.0, gt=0.0, description="Scale of the update: alpha/rank (rsLoRA: alpha/sqrt(rank)).")
    dropout: Probability = Field(0.0, description="Dropout in front of the adapter.")
    targets: Literal["auto"] | str | list[str] = Field(
        "auto", description="Linear layers that get an adapter: auto (all but heads), a regular expression, or names."
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules trained and saved whole, such as embed_tokens or lm_head."
    )
    num_virtual_tokens: int = Field(20, gt=0, description="Length of a prefix or prompt.")
    bottleneck_size: int = Field(64, gt=0, description="Width of a bottleneck adapter.")


class FreezeRule(Section):
    encoder: str | None = Field(None, description="Encoder layers, as `0-9`, `0,2,4` or `all`.")
    decoder: str | None = Field(None, description="Decoder layers (of an encoder-decoder).")
    layers: str | None = Field(None, description="Layers of a model that has one stack.")
    embeddings: bool = Field(False, description="Token and position embeddings.")
    patterns: list[str] = Field(default_factory=list, description="Regular expressions on parameter names (search).")
    until_step: int | None = Field(None, gt=0, description="Trained after this step; null: frozen for the whole run.")


class DataSource(Section):
    path: str | None = Field(None, description="A .tsv, .csv, .jsonl or .parquet file (.gz too for text).")
    source: str | None = Field(None, description="Source side of a pair of parallel text files.")
    target: str | None = Field(None, description="Target side of a pair of parallel text files.")
    weight: float = Field(1.0, gt=0.0, description="How often the source's rows are seen per epoch.")
    source_language: str | None = Field(None, description="Language of this file; overrides `data.source_language`.")
    target_language: str | None = Field(None, description="Language of this file; overrides `data.target_language`.")


class CleaningConfig(Section):
    max_length_ratio: float | None = Field(
        9.0, gt=1.0, description="Longest allowed ratio of the two sides in characters; null switches it off."
    )
    drop_duplicates: bool = Field(True, description="Keep only the first of equal (source, target) rows.")
    drop_copies: bool = Field(True, description="Drop rows whose target equals the source, unless languages are equal.")
    drop_leaked: bool = Field(False, description="Drop training rows whose source stands in validation or test.")
    max_bad_fraction: Probability = Field(0.2, description="Stop when more than this share of rows is left out.")


class FewShotConfig(Section):
    path: str = Field(description="File of pairs that no other set has rows of.")
    examples: int = Field(3, gt=0, description="The first so many rows of it.")
    template: str = Field(
        "{source_language}: {source}\n{target_language}: {target}\n",
        description="One example, with {source}, {target}, {source_language}, {target_language}.",
    )


class DataConfig(Section):
    format: Literal["pairs", "text", "prompt", "messages", "labelled"] = Field(
        "pairs",
        description="What a row holds. pairs: source, target; text: a document; prompt: a prompt and its completion; "
        "messages: a conversation; labelled: a text (or two) and its label. The default follows from `task`.",
    )
    train: list[DataSource] = Field(min_length=1, description="Training files.")
    validation: DataSource | str | None = Field(None, description="Rows scored during training.")
    test: DataSource | str | None = Field(None, description="Rows scored once, at the end.")
    source_column: str = Field("source", description="Column of the source text.")
    target_column: str = Field("target", description="Column of the target text.")
    source_language: str | None = Field(None, description="Language code; a row's `source_language` column wins.")
    target_language: str | None = Field(None, description="Language code; a row's `target_language` column wins.")
    source_prefix: str = Field("", description="Text put before each source (T5: `translate English to German: `).")
    max_source_length: int = Field(256, gt=2, description="Longest source in tokens, tags counted.")
    max_target_length: int = Field(256, gt=2, description="Longest target in tokens, tags counted.")
    text_column: str = Field("text", description="Column of the text (text, labelled).")
    text_pair_column: str | None = Field(None, description="Column of a second text (labelled).")
    label_column: str = Field("label", description="Column of the label; commas part several labels (labelled).")
    prompt_column: str = Field("prompt", description="Column of the prompt (prompt).")
    completion_column: str = Field("completion", description="Column of the completion (prompt).")
    messages_column: str = Field("messages", description="Column of the list of {role, content} (messages).")
    prompt_template: str | None = Field(
        None,
        description="The prompt, with {source}, {source_language}, {target_language}, {examples} (causal_lm on pairs); "
        "null: a plain one.",
    )
    few_shot: FewShotConfig | None = Field(None, description="Examples that stand in each prompt (causal_lm on pairs).")
    constraints_column: str | None = Field(
        None, description="Column of phrases that the output must have, parted by ` ||| ` (pairs, when decoding)."
    )
    system_prompt: str | None = Field(None, description="System message of conversations that have none.")
    max_length: int = Field(1024, gt=2, description="Longest row in tokens (causal_lm, classification).")
    packing: bool = Field(
        True, description="Several rows in one sequence of at most `max_length`, hidden from each other (causal_lm)."
    )
    temperature: float = Field(1.0, gt=0.0, description="Mixtures: sources are drawn in proportion to size^(1/T).")
    cleaning: CleaningConfig = Field(default_factory=CleaningConfig, description="Which rows are left out.")

    @property
    def has_prompts(self) -> bool:
        """Whether pairs are written as prompts: of task causal_lm, which always gives `prompt_template` a value."""
        return self.format == "pairs" and self.prompt_template is not None


class BatchConfig(Section):
    tokens_per_step: int = Field(gt=0, description="Size of a global batch: sum over rows of the longer side.")
    max_tokens_per_device: int = Field(gt=0, description="Size of a micro-batch: rows x longest side, with padding.")


class LossConfig(Section):
    label_smoothing: Probability = Field(0.0, description="Smoothing epsilon.")
    convention: Literal["fairseq", "torch"] = Field(
        "fairseq", description="fairseq: eps/(V-1) on every other token; torch: eps/V on all tokens."
    )
    focal_gamma: float = Field(0.0, ge=0.0, description="Focal loss: (1-p)^gamma on each term (classification).")
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        None, description="Weight of each label's rows; balanced: rows / (labels x rows of the label) (classification)."
    )


class ClassificationConfig(Section):
    problem: Literal["single_label", "multi_label", "regression"] = Field(
        "single_label", description="What a label is."
    )
    labels: list[str] | None = Field(None, min_length=2, description="All labels; default: those of the training rows.")


class OptimizerConfig(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor", "muon"] = Field(
        "adamw", description="Optimizer."
    )
    implementation: Literal["auto", "torch", "deepspeed"] = Field(
        "auto",
        description="AdamW's code: torch's, or DeepSpeed's fused or CPU Adam; auto: the latter for offload on a GPU.",
    )
    lr: float = Field(gt=0.0, description="Peak learning rate.")
    betas: tuple[Probability, Probability] = Field((0.9, 0.98), strict=False, description="AdamW's moment decay rates.")
    eps: float = Field(1e-6, gt=0.0, description="AdamW's denominator term.")
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay; never on norms and biases.")
    layer_decay: float = Field(
        1.0, gt=0.0, le=1.0, description="Each layer below the top learns at this multiple of the rate of the next."
    )
    head_lr: float | None = Field(None, gt=0.0, description="Peak learning rate of newly made heads; default `lr`.")
    clip_norm: float | None = Field(1.0, gt=0.0, description="Global gradient norm limit; null switches it off.")


class ScheduleConfig(Section):
    name: Literal["linear", "cosine", "polynomial", "inverse_sqrt", "constant"] = Field(
        "polynomial", description="Shape of the learning rate after warm-up."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    steps: int | None = Field(None, gt=0, description="Optimizer steps of the run; give this or `epochs`.")
    epochs: float | None = Field(None, gt=0.0, description="Passes over the data; give this or `steps`.")
    power: float = Field(1.0, gt=0.0, description="Exponent of the polynomial schedule.")
    min_lr: float = Field(0.0, ge=0.0, description="Learning rate at the end (linear, cosine, polynomial).")


class DeepSpeedConfig(Section):
    preset: str = Field("zero1", description="A preset of ds_configs/ or the path of a DeepSpeed JSON file.")
    overrides: dict[str, Any] = Field(default_factory=dict, description="Merged over the preset, key by key.")
    nvme_path: str | None = Field(None, description="Directory on a local NVMe disk, for NVMe offload.")


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, gt=0, description="Steps between saves; null: only at the end or on a stop.")
    keep_last: int = Field(2, gt=0, description="Newest checkpoints kept.")
    keep_best: int = Field(
        1, ge=0, description="Best checkpoints kept, by `early_stopping.metric` or the first metric."
    )


class MonitorConfig(Section):
    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    log_every_steps: int = Field(10, gt=0, description="Steps between log lines; metrics.jsonl has every step.")


class RunConfig(Section):
    name: RunName = Field(description="The run directory is <output_dir>/<name>.")
    output_dir: str = Field("runs", description="Parent of the run directory.")
    seed: int = Field(17, ge=0, description="Seed of row order, dropout and random weights.")
    task: Task = Field("translation", description="What a row means and how it is scored.")
    model: ModelConfig = Field(description="The model.")
    adapter: AdapterConfig | None = Field(None, description="Train an adapter; the base is frozen.")
    freeze: FreezeRule | list[FreezeRule] = Field(
        default_factory=list, description="Parts that are not trained, for the whole run or until a step."
    )
    classification: ClassificationConfig | None = Field(None, description="The labels (task: classification).")
    data: DataConfig = Field(description="The rows.")
    batch: BatchConfig = Field(description="Sizes in tokens.")
    loss: LossConfig = Field(default_factory=LossConfig, description="The objective.")
    optimizer: OptimizerConfig = Field(description="The optimizer.")
    schedule: ScheduleConfig = Field(description="Learning rate and length of the run.")
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig, description="ZeRO stage and offload.")
    evaluation: EvaluationConfig | None = Field(
        default_factory=EvaluationConfig, description="Beam search and scores; null switches decoding off."
    )
    early_stopping: EarlyStoppingConfig | None = Field(None, description="End when a score no longer improves.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving.")
    monitor: MonitorConfig = Field(default_factory=MonitorConfig, description="Records.")
    launch: LaunchConfig = Field(default_factory=LaunchConfig, description="Processes.")
    slurm: SlurmConfig | None = Field(None, description="The batch job of `harness submit`.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, content: Any) -> Any:
        """What is not said and follows from `task`: the rows' format and the scores."""
        if not isinstance(content, dict) or content.get("task", "translation") not in _TASK_DEFAULTS:
            return content
        row_format, metrics, watched = _TASK_DEFAULTS[content.get("task", "translation")]
        labels, data = content.get("classification"), content.get("data")
        writes_prompts = content.get("task") == "causal_lm" and isinstance(data, dict) and data.get("format") == "pairs"
        if writes_prompts:
            _, metrics, watched = _TASK_DEFAULTS["translation"]
        if isinstance(labels, dict) and labels.get("problem") == "regression":
            metrics, watched = ["rmse", "pearson", "spearman"], "rmse"
        filled = dict(content)
        if content.get("task") == "classification" and labels is None:
            filled["classification"] = {}
        for section, key, value in (
            ("data", "format", row_format),
            ("evaluation", "metrics", metrics),
            ("early_stopping", "metric", watched),
            ("loss", "convention", "torch" if content.get("task") == "classification" else "fairseq"),
        ):
            given = content.get(section, {} if section in ("evaluation", "loss") else None)
            if isinstance(given, dict):
                filled[section] = {key: value, **given}
        if writes_prompts and filled["data"].get("prompt_template") is None:
            filled["data"]["prompt_template"] = DEFAULT_PROMPT
        return filled

    @property
    def watched_metric(self) -> str | None:
        """The validation score that decides which checkpoints are best: early stopping's, else the first metric."""
        if self.early_stopping is not None:
            return self.early_stopping.metric
        if self.evaluation is None:
            return None
        return self.evaluation.metrics[0] if self.evaluation.metrics else "nll"


# What ALMA (Xu et al. 2023) asks, with examples before the question where there are some.
DEFAULT_PROMPT = (
    "Translate this from {source_language} to {target_language}:\n"
    "{examples}{source_language}: {source}\n{target_language}:"
)
_TASK_DEFAULTS: dict[str, tuple[str, list[str], str]] = {
    "translation": ("pairs", ["bleu", "chrf"], "bleu"),
    "causal_lm": ("messages", [], "nll"),
    "classification": ("labelled", ["accuracy", "macro_f1", "micro_f1", "mcc"], "accuracy"),
}
