"""Classification on real architectures: rows, padding and loss against transformers' own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor

from harness.config.schema import RunConfig
from harness.data.encoded import Encoded
from harness.data.rows import Row
from harness.errors import ConfigError, DataError
from harness.models.heads import head_names, stored_labels
from harness.models.load import load_matching_tokenizer, load_model
from harness.tasks.classification import ClassificationTask, with_labels_of
from harness.tasks.task import Batch
from tests.pairs import PAIRS
from tests.tiny_classifiers import FAMILIES, make_base
from tests.tiny_llm import make_tiny_llm

CPU = torch.device("cpu")
COLOURS = ["red", "green", "blue"]
SENTENCES = [source for source, _ in PAIRS[:6]]
TEXTS = [*SENTENCES, SENTENCES[0][:9], SENTENCES[1][:20]]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {family: make_base(family, root / family) for family in FAMILIES}


def run_config(directory: Path, *, problem: str = "single_label", labels: Sequence[str] | None = COLOURS, **more: Any):
    return RunConfig.model_validate(
        {
            "name": "colours",
            "task": "classification",
            "model": {"path": str(directory)},
            "classification": {"problem": problem, "labels": None if problem == "regression" else labels},
            "data": {"train": [{"path": "rows.tsv"}], "max_length": more.pop("max_length", 128)},
            "batch": {"tokens_per_step": 512, "max_tokens_per_device": 512},
            "optimizer": {"lr": 1e-3},
            "schedule": {"steps": 1},
            **more,
        }
    )


def open_task(config: RunConfig) -> ClassificationTask:
    return ClassificationTask.from_config(load_matching_tokenizer(config.model.path or "", "classification"), config)


def open_model(config: RunConfig) -> Any:
    return load_model(config.model, config.seed, task="classification", classification=config.classification).eval()


def rows_of(problem: str, *, pairs: bool = False) -> list[Row]:
    targets = {
        "single_label": [COLOURS[index % 3] for index in range(len(TEXTS))],
        "multi_label": ["red", "green, blue", "", "blue,red,green", "red,red", "green", "blue", "red, blue"],
        "regression": [str(0.5 * index - 1) for index in range(len(TEXTS))],
    }[problem]
    seconds = reversed(TEXTS) if pairs else [None] * len(TEXTS)
    return [
        Row(f"rows.tsv:{index + 2}", text, target, source_pair=second)
        for index, (text, target, second) in enumerate(zip(TEXTS, targets, seconds, strict=True))
    ]


def examples_of(encoded: Sequence[Encoded]) -> list[tuple[Any, Any, int]]:
    return [(one.input_ids, one.labels, one.marker) for one in encoded]


def logits_of(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch.inputs).logits


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_transformers(family: str, problem: str, directories: dict[str, Path]) -> None:
    config = run_config(directories[family], problem=problem)
    task, model = open_task(config), open_model(config)
    rows = rows_of(problem)
    batch = task.collate(examples_of(task.encode(rows)), CPU)
    terms = task.loss(logits_of(model, batch), batch)
    own = task.tokenizer([row.source for row in rows], padding=True, return_tensors="pt")
    own = {name: value for name, value in own.items() if name in batch.inputs}
    labels = batch.labels.float() if problem == "multi_label" else batch.labels
    with torch.no_grad():
        expected = model(**own, labels=labels).loss
    assert terms.num_targets == len(rows)
    assert (terms.loss_sum / len(rows)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_neither_padding_nor_neighbours_change_a_row(family: str, pairs: bool, directories: dict[str, Path]) -> None:
    config = run_config(directories[family])
    task, model = open_task(config), open_model(config)
    examples = examples_of(task.encode(rows_of("single_label", pairs=pairs)))
    assert len({len(ids) for ids, _, _ in examples}) > 3, "the rows are of different lengths"
    together = logits_of(model, task.collate(examples, CPU))
    backwards = logits_of(model, task.collate(examples[::-1], CPU)).flip(0)
    alone = torch.cat([logits_of(model, task.collate([example], CPU)) for example in examples])
    assert together.std() > 1e-3
    torch.testing.assert_close(backwards, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_no_rows_changes_nothing(family: str, problem: str, directories: dict[str, Path]) -> None:
    config = run_config(directories[family], problem=problem)
    task, model = open_task(config), open_model(config)
    batch = task.collate([], CPU)
    terms = task.loss(model(**batch.inputs).logits, batch)
    terms.loss_sum.backward()
    assert [term.item() for term in terms] == [0.0, 0.0, 0]
    assert batch.num_tokens == batch.num_padded_tokens == 0
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    assert gradients
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_head_depends_on_the_seed_alone(family: str, directories: dict[str, Path]) -> None:
    config = run_config(directories[family])

    def head(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed + 100)
        model = open_model(config.model_copy(update={"seed": seed}))
        assert model.config.id2label == dict(enumerate(COLOURS))
        return {name: value for name, value in model.named_parameters() if name in head_names(model)}

    first, torch_seed = head(3), torch.initial_seed()
    torch.manual_seed(torch_seed + 1)
    again, other = head(3), head(4)
    assert all(value.equal(again[name]) for name, value in first.items())
    assert any(not value.equal(other[name]) for name, value in first.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_classifier_keeps_its_head_and_labels(
    family: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    config = run_config(directories[family])
    task, model = open_task(config), open_model(config)
    model.save_pretrained(tmp_path)
    task.tokenizer.save_pretrained(tmp_path)
    saved = open_model(run_config(tmp_path, seed=99))
    batch = task.collate(examples_of(task.encode(rows_of("single_label"))), CPU)
    assert logits_of(saved, batch).equal(logits_of(model, batch))


def test_a_head_for_other_labels_makes_way_for_a_new_one(directories: dict[str, Path], tmp_path: Path) -> None:
    config = run_config(directories["bert"])
    model = open_model(config)
    model.save_pretrained(tmp_path)
    open_task(config).tokenizer.save_pretrained(tmp_path)
    other = open_model(run_config(tmp_path, labels=[*COLOURS, "white"]))
    assert other.config.num_labels == 4
    fresh = head_names(model) - {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    kept = dict(model.named_parameters())
    assert all(value.equal(kept[name]) for name, value in other.named_parameters() if name not in fresh)


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_labels_are_read_back_from_a_saved_classifier(
    problem: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    config = run_config(directories["bert"], problem=problem)
    open_model(config).save_pretrained(tmp_path)
    assert stored_labels(tmp_path) == config.classification
    assert stored_labels(directories["bert"]) is None


def test_rows_are_those_of_the_tokeniser(directories: dict[str, Path]) -> None:
    """BERT: [CLS] a [SEP] b [SEP], the second segment from b on; equal to what the tokeniser gives by itself."""
    task = open_task(run_config(directories["bert"]))
    rows = rows_of("single_label", pairs=True)
    batch = task.collate(examples_of(task.encode(rows)), CPU)
    expected = task.tokenizer([row.source for row in rows], [row.source_pair for row in rows], padding=True)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch.inputs[name].tolist() == expected[name], name
    assert batch.inputs["token_type_ids"].any()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
def test_models_without_segments_get_none(family: str, directories: dict[str, Path]) -> None:
    """GPT-2 would add a word's embedding for each segment."""
    task = open_task(run_config(directories[family]))
    batch = task.collate(examples_of(task.encode(rows_of("single_label", pairs=True))), CPU)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_the_longer_side_is_cut(directories: dict[str, Path]) -> None:
    task = open_task(run_config(directories["bert"], max_length=12))
    long, short = " ".join(TEXTS), "a"
    pairs = [(long, short), (short, long), (short, short)]
    first, second, fits = task.encode([Row("", text, "red", source_pair=other) for text, other in pairs])
    assert len(first.input_ids) == len(second.input_ids) == 12
    assert (first.truncated, second.truncated, fits.truncated) == (True, True, False)
    assert (first.marker, second.marker) == (10, 3)


@pytest.mark.parametrize("family", ["bart", "mbart", "t5"])
def test_end_tokens_in_a_text_do_not_confuse_the_head(family: str, directories: dict[str, Path]) -> None:
    config = run_config(directories[family])
    task, model = open_task(config), open_model(config)
    rows = [Row("", "good</s>morning", "red"), Row("", "good morning", "green")]
    batch = task.collate(examples_of(task.encode(rows)), CPU)
    logits = logits_of(model, batch)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_made_up_rows_and_empty_texts_go_through_every_model(family: str, directories: dict[str, Path]) -> None:
    config = run_config(directories[family])
    task, model = open_task(config), open_model(config)
    made_up = task.made_up([[5, 2, 7], [2, 2, 6, 9, 8], [11]])
    assert torch.isfinite(logits_of(model, task.collate(made_up, CPU))).all()
    empty = examples_of(task.encode([Row("", "", "red"), Row("", TEXTS[0], "green")]))
    assert torch.isfinite(logits_of(model, task.collate(empty, CPU))).all()


def test_a_tokeniser_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    directory = make_tiny_llm(tmp_path / "llm", "gpt2", pad_token_id=None)
    tokenizer = load_matching_tokenizer(directory, "classification")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    config = run_config(directory)
    task, model = open_task(config), open_model(config)
    examples = examples_of(task.encode(rows_of("single_label")))
    together = logits_of(model, task.collate(examples, CPU))
    alone = torch.cat([logits_of(model, task.collate([example], CPU)) for example in examples])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


def test_labels(directories: dict[str, Path]) -> None:
    several = open_task(run_config(directories["bert"], problem="multi_label"))
    encoded = several.encode(rows_of("multi_label"))
    assert [one.labels for one in encoded[:5]] == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]]
    assert {one.target_size for one in encoded} == {1}
    assert several.gold(examples_of(encoded)).tolist() == [one.labels for one in encoded]
    one = open_task(run_config(directories["bert"]))
    assert [row.labels for row in one.encode([Row("", "a", " blue"), Row("", "a", "red")])] == [[2], [0]]
    number = open_task(run_config(directories["bert"], problem="regression"))
    assert number.encode([Row("", "a", "2.5")])[0].labels == [2.5]


@pytest.mark.parametrize(
    ("problem", "label", "message"),
    [
        ("single_label", "gren", "there is no label 'gren'\n  -> did you mean `green`"),
        ("single_label", "", "there is no label ''"),
        ("multi_label", "red,purple", "there is no label 'purple'\n  -> the labels are red, green, blue"),
        ("regression", "many", "the label 'many' is not a number"),
        ("regression", "inf", "the label 'inf' is not a number"),
    ],
)
def test_wrong_labels_are_named(problem: str, label: str, message: str, directories: dict[str, Path]) -> None:
    task = open_task(run_config(directories["bert"], problem=problem))
    with pytest.raises(DataError) as caught:
        task.encode([Row("rows.tsv:7", "a", label)])
    assert f"rows.tsv:7: {message}" in str(caught.value)


def test_labels_and_weights_of_the_training_rows(directories: dict[str, Path]) -> None:
    rows = [Row("", "a", label) for label in ["b", "a", "b", "b", "c", "c ", ""]]
    config = run_config(directories["bert"], labels=None, loss={"class_weights": "balanced"})
    found = with_labels_of(config, rows)
    assert found.classification.labels == ["a", "b", "c"]
    targets = [row.target.strip() for row in rows[:-1]]
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=targets).tolist()
    assert list(found.loss.class_weights.values()) == pytest.approx(expected)
    assert open_task(found).class_weights == pytest.approx(expected)
    with pytest.raises(DataError, match="no training row has the label 'd'"):
        with_labels_of(run_config(directories["bert"], labels=["a", "d"], loss={"class_weights": "balanced"}), rows)


def test_class_weights_are_given_by_name(directories: dict[str, Path]) -> None:
    task = open_task(run_config(directories["bert"], loss={"class_weights": {"blue": 3.0}}))
    assert task.class_weights == (1.0, 1.0, 3.0)
    with pytest.raises(ConfigError, match="there is no label 'bleu'"):
        open_task(run_config(directories["bert"], loss={"class_weights": {"bleu": 3.0}}))


def test_options_of_the_run_file_reach_the_loss(directories: dict[str, Path]) -> None:
    loss = {"label_smoothing": 0.1, "convention": "torch", "class_weights": {"red": 2.0, "green": 0.5}}
    config = run_config(directories["bert"], loss=loss)
    task, model = open_task(config), open_model(config)
    batch = task.collate(examples_of(task.encode(rows_of("single_label"))), CPU)
    logits = logits_of(model, batch)
    expected = torch.nn.functional.cross_entropy(
        logits, batch.labels, weight=torch.tensor([2.0, 0.5, 1.0]), label_smoothing=0.1, reduction="sum"
    )
    assert task.loss(logits, batch).loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    focal = open_task(run_config(directories["bert"], loss={"focal_gamma": 2.0}))
    p = logits.softmax(-1)[torch.arange(len(logits)), batch.labels]
    assert focal.loss(logits, batch).loss_sum.item() == pytest.approx(
        (-((1 - p) ** 2) * p.log()).sum().item(), rel=1e-5
    )


def test_a_row_is_shown_token_by_token(directories: dict[str, Path]) -> None:
    task = open_task(run_config(directories["bert"], problem="multi_label"))
    shown = task.show(Row("", "a", "red, blue", source_pair="a")).splitlines()
    assert shown[0].startswith("  text: [CLS]")
    assert shown[1].endswith("[SEP]")
    assert shown[2] == " label: red, blue -> 1 0 1"
