"""Stop strings against transformers' StopStringCriteria in `generate`, greedily and with beams; against plain loops in
draws and ensembles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.config.schema import DataConfig, DataSource, LossConfig
from harness.data.encoded import Encoded
from harness.data.rows import Row
from harness.decoding.beam import BeamSettings, MinimumRisk, decode
from harness.decoding.constraints import Constraints
from harness.decoding.decode import Hypothesis
from harness.decoding.sampling import Sampling, uniform
from harness.evaluation.translate import Translator
from harness.models.ensemble import Ensemble
from harness.scoring.minimum_risk import rank_by_risk
from harness.tasks.causal_lm import CausalTask
from harness.tasks.task import Output
from tests.pairs import PAIRS
from tests.tiny_llm import make_tiny_llm

STOPS = ("e", "n", "ch", "ü", " d", "(")
MAX_LENGTH = 24
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model whose random answers are several tokens long, and its tokeniser."""
    directory = make_tiny_llm(tmp_path_factory.mktemp("stops") / "model", initializer_range=0.35)
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def task_of(tokenizer: Any, stops: tuple[str, ...]) -> CausalTask:
    data = DataConfig(format="prompt", train=[DataSource(path="x")], max_length=200)
    return CausalTask(tokenizer, data, LossConfig(), stop_strings=stops)


def decoded(
    model: Any, task: CausalTask, prompts: list[Encoded], settings: BeamSettings
) -> dict[int, list[Hypothesis]]:
    def collate(rows: list[int]) -> dict[str, Any]:
        return task.collate_sources([(prompts[row].input_ids, prompts[row].labels, 0) for row in rows], CPU)

    found = decode(model, [len(one.input_ids) for one in prompts], collate, settings=settings, max_tokens=600)
    assert found is not None
    return found


def generated(model: Any, ids: list[int], **options: Any) -> Any:
    mask = torch.ones(1, len(ids), dtype=torch.long)
    options = {"max_new_tokens": MAX_LENGTH, "do_sample": False} | options
    return model.generate(torch.tensor([ids]), attention_mask=mask, **options)


@torch.no_grad()
@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize(
    ("constraints", "processors"),
    [
        (None, {}),
        (Constraints(6, 2, 1.3, ((40,),)), {
            "min_new_tokens": 6, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "bad_words_ids": [[40]],
        }),
    ],
    ids=["free", "constrained"],
)  # fmt: skip
@pytest.mark.parametrize("stops", [STOPS[:1], STOPS[1:3], STOPS, ()], ids=["one", "two", "many", "across tokens"])
def test_outputs_end_where_those_of_generate_do(
    parts: tuple[Any, Any],
    stops: tuple[str, ...],
    constraints: Constraints | None,
    processors: dict[str, Any],
    beam_size: int,
) -> None:
    model, tokenizer = parts
    task = task_of(tokenizer, ())
    prompts = task.encode_sources([Row("", source, "") for source, _ in PAIRS[:12]])
    if not stops:
        said = [generated(model, one.input_ids)[0, len(one.input_ids) :].tolist() for one in prompts]
        texts = (tokenizer.decode(ids[5:8]) for ids in said)
        stops = tuple(text[1:-1] for text in texts if text.isprintable() and len(text) > 4)
        assert len(stops) > 3
    task = replace(task, stop_strings=stops)
    settings = BeamSettings(beam_size, 1.0, MAX_LENGTH, num_hypotheses=beam_size, constraints=constraints)
    found = decoded(model, task, prompts, settings)
    num_stopped = 0
    for row, prompt in enumerate(prompts):
        options: dict[str, Any] = {"num_beams": beam_size, "num_return_sequences": beam_size, "length_penalty": 1.0}
        expected = generated(
            model, prompt.input_ids, stop_strings=list(stops), tokenizer=tokenizer,
            eos_token_id=ends_of(task), pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True, output_scores=True, **options, **processors,
        )  # fmt: skip
        ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
        for one, sequence in zip(found[row], expected.sequences[:, len(prompt.input_ids) :].tolist(), strict=True):
            content = [token for token in sequence if token not in ends]
            assert one.token_ids == content
            said = tokenizer.decode(content, skip_special_tokens=True)
            num_stopped += any(stop in said for stop in stops)
            for stop in stops:
                said = said.split(stop)[0]
            assert task.to_text(one.token_ids) == " ".join(said.split())
        if beam_size > 1:
            assert [one.score for one in found[row]] == pytest.approx(expected.sequences_scores.tolist(), rel=1e-5)
    assert num_stopped > 3


def ends_of(task: CausalTask) -> list[int]:
    return list(task.collate_sources([([5], [5], 0)], CPU)["ends"])


def has_ended(task: CausalTask, output: list[int]) -> bool:
    text = task.tokenizer.decode(output)
    return output[-1] in ends_of(task) or len(output) == MAX_LENGTH or any(stop in text for stop in STOPS)


def after(models: list[Any], tokens: list[int]) -> Tensor:
    """log of the mean probability [V] of the next token."""
    p = [model(torch.tensor([tokens])).logits[0, -1].double().softmax(-1) for model in models]
    return torch.stack(p).mean(0).log()


def read(task: CausalTask, output: list[int]) -> str:
    """What stands before the first stop string."""
    text = task.tokenizer.decode(output, skip_special_tokens=True)
    return " ".join(min((text.split(stop)[0] for stop in STOPS), key=len).split())


@torch.no_grad()
def test_draws_end_with_a_stop_string_and_the_best_of_them_is_read_to_it(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    task, sampling = task_of(tokenizer, STOPS), Sampling(temperature=0.6, seed=3)
    rows = [Row("", source, "") for source, _ in PAIRS[:3]]
    prompts = task.encode_sources(rows)
    found = decoded(model, task, prompts, BeamSettings(1, 1.0, MAX_LENGTH, num_hypotheses=5, sampling=sampling))
    settings = BeamSettings(1, 1.0, MAX_LENGTH, sampling=sampling, minimum_risk=MinimumRisk("chrf", 5))
    best = Translator(model, task, settings, 600, CPU).of_rows(rows)
    num_stopped = 0
    for row, prompt in enumerate(prompts):
        texts = []
        for draw, one in enumerate(found[row]):
            output: list[int] = []
            total = 0.0
            while not output or not has_ended(task, output):
                log_p_V = after([model], prompt.input_ids + output)
                reached_V = (log_p_V / 0.6).softmax(-1).cumsum(0)
                output.append(int((reached_V <= uniform(3, row, draw, len(output)) * reached_V[-1]).sum()))
                total += float(log_p_V[output[-1]])
            assert one.token_ids == [token for token in output if token not in ends_of(task)]
            assert one.score == pytest.approx(total / len(output), rel=1e-5)
            num_stopped += output[-1] not in ends_of(task) and len(output) < MAX_LENGTH
            texts.append(read(task, output))
        [(text, score), *_] = rank_by_risk(texts, "chrf")
        assert best[row].outputs == [Output(text, pytest.approx(score))]
    assert num_stopped > 5


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_outputs_of_ensembles_end_where_their_text_does(parts: tuple[Any, Any], tmp_path: Path, beams: int) -> None:
    model, tokenizer = parts
    other = AutoModelForCausalLM.from_pretrained(make_tiny_llm(tmp_path / "other", initializer_range=0.35, seed=8))
    models, task = [model, other.eval()], task_of(tokenizer, STOPS)
    prompts = task.encode_sources([Row("", source, "") for source, _ in PAIRS[:4]])
    found = decoded(Ensemble(models), task, prompts, BeamSettings(beams, 1.0, MAX_LENGTH))
    num_candidates, num_stopped = beams * max(2, 1 + len(ends_of(task))), 0
    for row, prompt in enumerate(prompts):
        running: list[tuple[float, list[int]]] = [(0.0, [])]
        finished: list[tuple[float, list[int]]] = []
        for length in range(1, MAX_LENGTH + 1):
            nexts = [(total, output, after(models, prompt.input_ids + output).tolist()) for total, output in running]
            longer = [(total + p, [*output, token]) for total, output, row_V in nexts for token, p in enumerate(row_V)]
            candidates = sorted(longer, reverse=True)[:num_candidates]
            finished += [(total / length, output) for total, output in candidates[:beams] if has_ended(task, output)]
            finished = sorted(finished, reverse=True)[:beams]
            running = [one for one in candidates if not has_ended(task, one[1])][:beams]
            if len(finished) == beams and (not running or running[0][0] / length <= finished[-1][0]):
                break
        score, output = finished[0]
        assert found[row][0].token_ids == [token for token in output if token not in ends_of(task)]
        assert found[row][0].score == pytest.approx(score, rel=1e-5)
        assert task.to_text(found[row][0].token_ids) == read(task, output)
        num_stopped += output[-1] not in ends_of(task) and len(output) < MAX_LENGTH
    assert num_stopped > 1
