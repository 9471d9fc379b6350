"""Reuters R8 on a small BERT: our training and the Hugging Face Trainer, same model, batches and hyper-parameters.

    python examples/classification/reuters.py DATA_DIR
    python -m benchmarks.classification DATA_DIR

The run file is examples/classification/reuters.yaml, made small: SMALL below, and no dropout, so that nothing but the
code differs. The Trainer reads the batches that our plan of the epoch cuts, and takes our learning rate: its own
schedule gives step n the rate of our step n - 1, its first step having none.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
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
from harness.plan.schedule import learning_rate
from harness.training.prepare import build_task, prepare_sets, with_labels

RUN_FILE = "examples/classification/reuters.yaml"
SEEDS = (17, 18)
SMALL = [
    "schedule.epochs=null", "schedule.steps=150", "schedule.warmup_steps=15",
    "data.max_length=32", "data.cleaning.drop_duplicates=false", "data.validation=null",
    "batch={tokens_per_step: 1024, max_tokens_per_device: 4096}",
    "model.dropout=0.0", "model.attention_dropout=0.0",
]  # fmt: skip
Outcome = dict[str, Any]  # accuracy, macro_f1, losses: of each step


def run_config(data: Path, out: Path, seed: int) -> RunConfig:
    files = {name: data / f"reuters-r8.{name}.tsv" for name in ("train", "test")}
    own = [f"data.train=[{{path: {files['train']}}}]", f"data.test={files['test']}", f"model.path={data / 'minilm'}"]
    return load_run_config(Path(RUN_FILE), [*SMALL, *own, f"output_dir={out}", f"name=seed-{seed}", f"seed={seed}"])


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


def trainer(config: RunConfig, out: Path) -> Outcome:
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
        save_strategy="no", eval_strategy="no", logging_steps=10, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    train, test, batches = encoded(tables["train"]), encoded(tables["test"]), batches_of(config)

    losses: list[float] = []

    def lr_scale(done: int) -> float:
        return learning_rate(done + 1, peak=1.0, total_steps=len(batches), schedule=schedule)

    class SameBatches(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(train, batch_sampler=batches, collate_fn=self.data_collator)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, lr_scale)
            return self.lr_scheduler

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
            if model.training:
                losses.append(loss.item())
            return (loss, outputs) if return_outputs else loss

    run = SameBatches(
        model=model, args=arguments, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer)
    )
    run.train()
    predicted = run.predict(test).predictions.argmax(axis=1)
    gold = np.array(test["label"])
    macro_f1 = float(f1_score(gold, predicted, average="macro"))
    return {"accuracy": float((predicted == gold).mean()), "macro_f1": macro_f1, "losses": losses}


def ours(config: RunConfig) -> Outcome:
    """Scores of `harness train` on the test rows, from its summary."""
    from harness.cli.main import main

    run_file = Path(config.output_dir) / f"{config.name}.json"
    run_file.write_text(config.model_dump_json(), encoding="utf-8")
    if code := main(["train", str(run_file)]):
        sys.exit(code)
    run_dir = Path(config.output_dir) / config.name
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {name: summary["test"][name] for name in ("accuracy", "macro_f1")}
    return {**scores, "losses": [record["loss"] for record in records if record["event"] == "step"]}


def compared(data: Path, out: Path, seed: int) -> dict[str, Any]:
    """Both sides from one seed, with how far their losses lie apart."""
    config = run_config(data, out, seed)
    found = {"trainer": trainer(config, out / f"trainer-{seed}"), "harness": ours(config)}
    gaps = np.abs(np.subtract(found["harness"]["losses"], found["trainer"]["losses"]))
    sides = {
        name: {
            "accuracy": side["accuracy"],
            "macro_f1": side["macro_f1"],
            "mean_loss": float(np.mean(side["losses"])),
            "first_loss": side["losses"][0],
            "last_loss": side["losses"][-1],
        }
        for name, side in found.items()
    }
    outcome = {**sides, "largest_loss_gap": {"first 10 steps": float(gaps[:10].max()), "all steps": float(gaps.max())}}
    print(f"seed {seed}", outcome, flush=True)
    return outcome


def main(data: Path) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        runs = {f"seed {seed}": compared(data, Path(out), seed) for seed in SEEDS}
        config = run_config(data, Path(out), SEEDS[0])
    means = {
        side: {name: float(np.mean([run[side][name] for run in runs.values()])) for name in ("accuracy", "macro_f1")}
        for side in ("harness", "trainer")
    }
    points = 100 * (means["harness"]["accuracy"] - means["trainer"]["accuracy"])
    values = {
        **runs,
        "mean": means,
        "accuracy_difference_points": round(points, 3),
        "steps": config.schedule.steps,
        "max_length": config.data.max_length,
        "tokens_per_step": config.batch.tokens_per_step,
        "test_rows": len(rows_of(config, "test")),
        "seconds": round(time.monotonic() - started),
    }
    write_result("classification", "python -m benchmarks.classification DATA_DIR", values)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
