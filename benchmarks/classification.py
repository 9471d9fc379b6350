"""Reuters R8 on a small BERT: our training and the Hugging Face Trainer, same model, batches and hyper-parameters.

    python examples/classification/reuters.py DATA_DIR
    python -m benchmarks.classification DATA_DIR

The run file is examples/classification/reuters.yaml, made small: 60 steps, texts of 32 tokens, no dropout, so that
nothing but the code differs. The Trainer reads the batches that our plan of the epoch cuts.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader

from benchmarks.record import write_result
from harness.config.load import load_run_config
from harness.config.schema import RunConfig
from harness.data.loader import TrainingSteps
from harness.data.sources import as_source, readable_rows
from harness.training.prepare import build_task, prepare_sets, with_labels

RUN_FILE = "examples/classification/reuters.yaml"
SMALL = [
    "schedule.epochs=null", "schedule.steps=60", "schedule.warmup_steps=6",
    "data.max_length=32", "data.cleaning.drop_duplicates=false", "data.validation=null",
    "batch={tokens_per_step: 970, max_tokens_per_device: 970}",
    "model.dropout=0.0", "model.attention_dropout=0.0",
]  # fmt: skip


def run_config(data: Path, out: Path) -> RunConfig:
    files = {name: data / f"reuters-r8.{name}.tsv" for name in ("train", "test")}
    own = [f"data.train=[{{path: {files['train']}}}]", f"data.test={files['test']}", f"model.path={data / 'minilm'}"]
    return load_run_config(Path(RUN_FILE), [*SMALL, *own, f"output_dir={out}"])


def batches_of(config: RunConfig) -> list[list[int]]:
    """Row ids of each step of the run."""
    config = with_labels(config)
    rows = prepare_sets(config, build_task(config))["train"].rows
    steps = TrainingSteps(rows, data=config.data, batch=config.batch, seed=config.seed, world_size=1)
    assert config.schedule.steps is not None
    return [step.rows.tolist() for step in itertools.islice(steps.starting_at(1), config.schedule.steps)]


def rows_of(config: RunConfig, name: str) -> list[dict[str, str]]:
    sources = config.data.train if name == "train" else [as_source(getattr(config.data, name))]
    rows = (row for source in sources for row in readable_rows(source, config.data))
    return [{"text": row.source, "label": row.target} for row in rows]


def trainer(config: RunConfig, out: Path) -> dict[str, float]:
    """Scores of the Hugging Face Trainer on the test rows."""
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    tables = {name: rows_of(config, name) for name in ("train", "test")}
    labels = sorted({row["label"] for row in tables["train"]})

    def encoded(rows: list[dict[str, str]]) -> Any:
        columns = dict(tokenizer([row["text"] for row in rows], truncation=True, max_length=config.data.max_length))
        return Dataset.from_dict(columns | {"label": [labels.index(row["label"]) for row in rows]})

    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        config.model.path, num_labels=len(labels), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    optimizer, schedule = config.optimizer, config.schedule
    arguments = TrainingArguments(
        output_dir=str(out), seed=config.seed, use_cpu=not torch.cuda.is_available(),
        max_steps=schedule.steps, per_device_eval_batch_size=128,
        learning_rate=optimizer.lr, adam_beta1=optimizer.betas[0], adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps, weight_decay=optimizer.weight_decay, max_grad_norm=optimizer.clip_norm,
        lr_scheduler_type="linear", warmup_steps=schedule.warmup_steps,
        save_strategy="no", eval_strategy="no", logging_steps=10, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    train, test, batches = encoded(tables["train"]), encoded(tables["test"]), batches_of(config)

    class SameBatches(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(train, batch_sampler=batches, collate_fn=self.data_collator)

    run = SameBatches(
        model=model, args=arguments, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer)
    )
    done = run.train()
    predicted = run.predict(test).predictions.argmax(axis=1)
    gold = np.array(test["label"])
    accuracy, macro_f1 = float((predicted == gold).mean()), float(f1_score(gold, predicted, average="macro"))
    return {"accuracy": accuracy, "macro_f1": macro_f1, "train_loss": done.training_loss}


def ours(config: RunConfig) -> dict[str, float]:
    """Scores of `harness train` on the test rows, from its summary."""
    from harness.cli.main import main

    run_file = Path(config.output_dir) / "run.json"
    run_file.write_text(config.model_dump_json(), encoding="utf-8")
    if code := main(["train", str(run_file)]):
        sys.exit(code)
    run_dir = Path(config.output_dir) / config.name
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in records if record["event"] == "step"]
    scores = {name: summary["test"][name] for name in ("accuracy", "macro_f1")}
    return {**scores, "train_loss": float(np.mean(losses))}


def write(found: dict[str, dict[str, float]], config: RunConfig) -> None:
    points = 100 * (found["harness"]["accuracy"] - found["trainer"]["accuracy"])
    values = {
        **found,
        "accuracy_difference_points": round(points, 2),
        "steps": config.schedule.steps,
        "test_rows": len(rows_of(config, "test")),
    }
    write_result("classification", "python -m benchmarks.classification DATA_DIR", values)


def main(data: Path) -> None:
    with tempfile.TemporaryDirectory() as out:
        config = run_config(data, Path(out))
        write({"trainer": trainer(config, Path(out) / "trainer"), "harness": ours(config)}, config)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
