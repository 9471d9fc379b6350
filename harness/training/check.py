"""What can be said of a run before it starts: model, tokeniser, one row as the model sees it, rows, steps."""

from __future__ import annotations

from collections.abc import Iterator

from harness.config.schema import RunConfig
from harness.data.cache import Prepared
from harness.data.clean import fault_of
from harness.data.loader import TrainingSteps
from harness.data.sources import Row, read_rows
from harness.models.assemble import assemble
from harness.tasks.task import Task
from harness.tasks.translation import TranslationTask
from harness.training.prepare import build_task, model_source, prepare_sets, with_labels


def findings(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(title, text) of every part that is right. Raises HarnessError at the first that is wrong."""
    config = with_labels(config)
    task = build_task(config)
    yield "model", _model(config, task)
    yield "tokeniser", _tokenizer(task)
    yield "example", _example(config, task)
    sets = prepare_sets(config, task)
    for name, prepared in sets.items():
        yield name, _rows(name, prepared)
    yield "steps", _steps(config, sets["train"])


def _model(config: RunConfig, task: Task) -> str:
    model = assemble(config, step=0, total_steps=config.schedule.steps or 1, device="meta").model
    network = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT's wrapper
    kind = task.family.name if isinstance(task, TranslationTask) else type(network).__name__
    origin = "the weights fit config.json" if config.model.path else f"random weights from seed {config.seed}"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    base = total - trained if config.adapter is not None else total
    first = f"; trained from the first step on: {trained:,}" if trained < total else ""
    return f"{model_source(config)}: {kind}, {base:,} parameters, {origin}{first}"


def _tokenizer(task: Task) -> str:
    text = f"{type(task.tokenizer).__name__}: {len(task.tokenizer):,} tokens"
    if not isinstance(task, TranslationTask):
        return text
    languages = task.family.languages(task.tokenizer)
    return f"{text}, {f'{len(languages)} language tags' if task.family.has_languages else 'no language tags'}"


def _example(config: RunConfig, task: Task) -> str:
    rows = (row for source in config.data.train for row in read_rows(source, config.data))
    good = (row for row in rows if isinstance(row, Row) and not fault_of(row, config.data.cleaning, config.data.format))
    row = next(good, None)
    return "no row can be read" if row is None else f"{row.where}\n{task.show(row)}"


def _rows(name: str, prepared: Prepared) -> str:
    report = prepared.report
    lines = [report.summary()]
    if name == "train":
        if report.num_left_out:
            lines.append(f"they are listed in {prepared.quarantine}")
        if report.leaked:
            lines.append(
                f"{report.leaked:,} have a source that also stands in validation or test (data.cleaning.drop_leaked)"
            )
    elif report.truncated:
        lines.append(f"{report.truncated:,} are longer than data.max_source_length, max_target_length or max_length")
    return "\n".join(lines)


def _steps(config: RunConfig, train: Prepared) -> str:
    steps = TrainingSteps(train.rows, data=config.data, batch=config.batch, seed=config.seed, world_size=1)
    per_epoch = steps.steps_per_epoch
    total = config.schedule.steps or max(1, round((config.schedule.epochs or 0) * per_epoch))
    return f"{per_epoch:,} per epoch, {total:,} in all ({total / per_epoch:.1f} epochs)"
