"""Reuters R8 on a small BERT: our training and the Hugging Face Trainer, same rows, model, budget and hyper-parameters.

    python examples/classification/reuters.py DATA_DIR
    python -m benchmarks.classification DATA_DIR

The run file is examples/classification/reuters.yaml, with texts cut at 32 tokens to spare time. Both read every training
row equally often and make about as many steps: the Trainer's batches are of 32 rows, ours of as many tokens as 32 rows
have on average.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score

from benchmarks.record import write_result
from harness.config.load import load_run_config
from harness.config.schema import RunConfig
from harness.data.sources import as_source, readable_rows

RUN_FILE = "examples/classification/reuters.yaml"
ROWS_PER_STEP, TOKENS_PER_STEP = 32, 970
SEEDS = (17,)


def run_config(data: Path, out: Path, seed: int) -> RunConfig:
    files = {name: str(data / f"reuters-r8.{name}.tsv") for name in ("train", "dev", "test")}
    overrides = [
        f"model.path={data / 'minilm'}",
        f"data.train=[{{path: {files['train']}}}]",
        f"data.validation={files['dev']}",
        f"data.test={files['test']}",
        f"output_dir={out}",
        f"seed={seed}",
        "data.max_length=32",
        "data.cleaning.drop_duplicates=false",
        f"batch={{tokens_per_step: {TOKENS_PER_STEP}, max_tokens_per_device: {TOKENS_PER_STEP}}}",
    ]
    return load_run_config(Path(RUN_FILE), overrides)


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
    model = AutoModelForSequenceClassification.from_pretrained(config.model.path, num_labels=len(labels))
    optimizer, schedule = config.optimizer, config.schedule
    arguments = TrainingArguments(
        output_dir=str(out), seed=config.seed, use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=ROWS_PER_STEP, per_device_eval_batch_size=128, num_train_epochs=schedule.epochs,
        learning_rate=optimizer.lr, adam_beta1=optimizer.betas[0], adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps, weight_decay=optimizer.weight_decay, max_grad_norm=optimizer.clip_norm,
        lr_scheduler_type="linear", warmup_steps=schedule.warmup_steps,
        save_strategy="no", eval_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    test = encoded(tables["test"])
    run = Trainer(
        model=model, args=arguments, train_dataset=encoded(tables["train"]), processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    started = time.monotonic()
    steps = run.train().global_step
    seconds = time.monotonic() - started
    predicted = run.predict(test).predictions.argmax(axis=1)
    gold = np.array(test["label"])
    scores = {
        "accuracy": float((predicted == gold).mean()),
        "macro_f1": float(f1_score(gold, predicted, average="macro")),
    }
    return {**scores, "steps": steps, "seconds": seconds}


def ours(config: RunConfig) -> dict[str, float]:
    """Scores of `harness train` on the test rows, from its summary."""
    from harness.cli.main import main

    run_file = Path(config.output_dir) / "run.json"
    run_file.write_text(config.model_dump_json(), encoding="utf-8")
    started = time.monotonic()
    if code := main(["train", str(run_file)]):
        sys.exit(code)
    summary = json.loads((Path(config.output_dir) / config.name / "summary.json").read_text(encoding="utf-8"))
    scores = {name: summary["test"][name] for name in ("accuracy", "macro_f1", "mcc")}
    return {**scores, "steps": summary["steps"], "seconds": time.monotonic() - started}


def main(data: Path) -> None:
    found: dict[str, list[dict[str, float]]] = {"harness": [], "trainer": []}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as out:
            config = run_config(data, Path(out), seed)
            found["trainer"].append(trainer(config, Path(out) / "trainer"))
            found["harness"].append(ours(config))
        print(json.dumps({name: runs[-1] for name, runs in found.items()}), flush=True)
    means = {
        f"{name}_{score}": round(100 * float(np.mean([run[score] for run in runs])), 2)
        for name, runs in found.items()
        for score in ("accuracy", "macro_f1")
    }
    difference = round(means["harness_accuracy"] - means["trainer_accuracy"], 2)
    values = {**means, "accuracy_difference_points": difference, "seeds": SEEDS, "runs": found}
    write_result("classification", f"python -m benchmarks.classification {data.name}", values)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
