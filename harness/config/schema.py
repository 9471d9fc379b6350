"""The run file as frozen, strictly typed models. ``docs/configuration.md`` is generated from this file,
so every ``description`` is a sentence of the manual."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

DType = Literal["float32", "bfloat16", "float16"]
RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the run file: immutable, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    path: str | None = Field(None, description="Directory or hub name of a model in safetensors format.")
    config: str | None = Field(
        None, description="Directory with config.json and tokeniser; the weights are drawn at random from `seed`."
    )
    dtype: DType = Field("float32", description="Compute type; the optimizer keeps float32 master weights.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention kernel.")
    dropout: Probability | None = Field(None, description="Overrides the model's own dropout.")
    attention_dropout: Probability | None = Field(None, description="Overrides the model's own attention dropout.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")


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


class DataConfig(Section):
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
    temperature: float = Field(1.0, gt=0.0, description="Mixtures: sources are drawn in proportion to size^(1/T).")
    cleaning: CleaningConfig = Field(default_factory=CleaningConfig, description="Which rows are left out.")


class BatchConfig(Section):
    tokens_per_step: int = Field(gt=0, description="Size of a global batch: sum over rows of the longer side.")
    max_tokens_per_device: int = Field(gt=0, description="Size of a micro-batch: rows x longest side, with padding.")


class LossConfig(Section):
    label_smoothing: Probability = Field(0.0, description="Smoothing epsilon.")
    convention: Literal["fairseq", "torch"] = Field(
        "fairseq", description="fairseq: eps/(V-1) on every other token; torch: eps/V on all tokens."
    )


class OptimizerConfig(Section):
    name: Literal["adamw", "adafactor"] = Field("adamw", description="Optimizer.")
    lr: float = Field(gt=0.0, description="Peak learning rate.")
    betas: tuple[Probability, Probability] = Field((0.9, 0.98), strict=False, description="AdamW's moment decay rates.")
    eps: float = Field(1e-6, gt=0.0, description="AdamW's denominator term.")
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay; never on norms and biases.")
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


class EvaluationConfig(Section):
    every_steps: int | None = Field(None, gt=0, description="Steps between evaluations; null: only at the end.")
    beam_size: int = Field(5, gt=0, description="Beams per sentence; 1 is greedy.")
    length_penalty: float = Field(1.0, description="Exponent of the length in the hypothesis score.")
    preset: Literal["hf"] = Field("hf", description="Convention of the hypothesis score.")
    max_target_length: int | None = Field(None, gt=1, description="Longest output; default `data.max_target_length`.")
    max_length_ratio: float | None = Field(
        None, gt=0.0, description="Longest output as a multiple of the row's own source in tokens, plus 10."
    )
    max_tokens_per_device: int | None = Field(
        None, gt=0, description="Decoding batch: rows x beams x longest source; default `batch.max_tokens_per_device`."
    )
    metrics: list[Literal["bleu", "chrf", "ter"]] = Field(["bleu", "chrf"], min_length=1, description="Scores.")
    max_rows: int | None = Field(None, gt=0, description="Score only the first rows of the validation set.")
    initial: bool = Field(True, description="Score the model before the first step too.")


class EarlyStoppingConfig(Section):
    metric: Literal["bleu", "chrf", "ter", "loss", "nll"] = Field("bleu", description="A validation score.")
    patience: int = Field(10, gt=0, description="Evaluations without a better score before the run ends.")


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, gt=0, description="Steps between saves; null: only at the end or on a stop.")
    keep_last: int = Field(2, gt=0, description="Newest checkpoints kept.")
    keep_best: int = Field(
        1, ge=0, description="Best checkpoints kept, by `early_stopping.metric` or the first metric."
    )


class MonitorConfig(Section):
    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    log_every_steps: int = Field(10, gt=0, description="Steps between log lines; metrics.jsonl has every step.")


class LaunchConfig(Section):
    processes: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="Ranks on this machine; auto: one per accelerator."
    )
    backend: Literal["local"] = Field("local", description="Where the ranks are started.")
    collective_timeout_s: float = Field(600.0, gt=0.0, description="Longest wait of one rank for another.")
    stop_grace_s: float = Field(
        300.0, gt=0.0, description="Time to save after a stop signal; then the ranks are killed."
    )


class RunConfig(Section):
    name: RunName = Field(description="The run directory is <output_dir>/<name>.")
    output_dir: str = Field("runs", description="Parent of the run directory.")
    seed: int = Field(17, ge=0, description="Seed of row order, dropout and random weights.")
    task: Literal["translation"] = Field("translation", description="What a row means and how it is scored.")
    model: ModelConfig = Field(description="The model.")
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

    @property
    def watched_metric(self) -> str | None:
        """The validation score that decides which checkpoints are best: early stopping's, else the first metric."""
        if self.early_stopping is not None:
            return self.early_stopping.metric
        return self.evaluation.metrics[0] if self.evaluation is not None else None
