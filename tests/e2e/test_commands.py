"""The commands around a trained run, through the real command line: check, evaluate, translate, export, train again."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from harness.cli.main import main
from tests.pairs import PAIRS
from tests.runs import REPOSITORY, harness, tiny_run, write_pairs, write_run
from tests.tiny import LANGUAGES, make_tiny_model

pytestmark = pytest.mark.slow
TEST_PAIRS = PAIRS[8:16]
TEXT_FILES = ("hypotheses.txt", "sources.txt", "references.txt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """A finished run in bfloat16 on two ranks with ZeRO-2, of a family that forces the language tag.

    Half of the test set is learnt by heart, the other half was never seen.
    """
    directory = tmp_path_factory.mktemp("trained")
    model = make_tiny_model("mbart50", directory / "model", d_model=64)
    run = tiny_run(
        directory,
        model,
        name="enro",
        model__dtype="bfloat16",
        data__train=[{"path": str(write_pairs(directory / "train.tsv", PAIRS[:12]))}],
        data__validation=str(write_pairs(directory / "dev.tsv", PAIRS[:4])),
        data__test=str(write_pairs(directory / "test.tsv", TEST_PAIRS)),
        batch__max_tokens_per_device=200,
        loss__label_smoothing=0.0,
        optimizer__lr=5e-3,
        schedule__steps=40,
        deepspeed__preset="zero2",
        evaluation={"beam_size": 3, "initial": False, "every_steps": 20, "metrics": ["chrf", "bleu", "ter"]},
        checkpoint__keep_last=2,
        launch={"processes": 2},
    )
    path = write_run(run)
    done = harness("train", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = directory / "enro"
    summary = json.loads((run_dir / "summary.json").read_text())
    (test_dir,) = (run_dir / "evaluations").glob("step-*-test")
    return SimpleNamespace(file=path, dir=run_dir, summary=summary, test_dir=test_dir, directory=directory)


def command(*arguments: Any) -> int:
    """The command in this process, which has paid for its imports already."""
    return main([str(argument) for argument in arguments])


def scores_of(directory: Path) -> dict[str, Any]:
    scores = json.loads((directory / "scores.json").read_text())
    del scores["decode_seconds"]
    return scores


def records_of(run_dir: Path, event: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event]


def feed(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    stream = io.BytesIO(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(stream)))


def test_metrics_have_the_scores_of_the_files_and_the_ends_of_their_intervals(trained):
    records = records_of(trained.dir, "evaluation")
    assert {record["set"] for record in records} == {"validation", "test"}
    for record in records:
        scores = scores_of(trained.dir / "evaluations" / f"step-{record['step']:08d}-{record['set']}")
        for name in ("chrf", "bleu", "ter"):
            interval = [record[f"{name}_low"], record[f"{name}_high"]]
            assert (record[name], interval) == (scores[name], scores["confidence"][name])


class TestEvaluate:
    @pytest.mark.parametrize("processes", [1, 2])
    def test_gives_the_numbers_and_texts_of_training(self, trained, tmp_path, processes):
        output = tmp_path / "again"
        done = harness("evaluate", str(trained.dir), "--processes", str(processes), "--output", str(output))
        assert done.returncode == 0, done.stderr
        scores = scores_of(output)
        assert scores == scores_of(trained.test_dir)
        assert 20 < scores["chrf"] < 100
        assert {name: scores[name] for name in trained.summary["test"]} == trained.summary["test"]
        for name in TEXT_FILES:
            assert (output / name).read_text() == (trained.test_dir / name).read_text()
        assert f"chrF2         {scores['chrf']:.2f}  (" in done.stdout
        assert scores["signatures"]["chrf"] in done.stdout
        assert str(output) in done.stdout

    def test_writes_beside_the_evaluations_of_training_and_not_over_them(self, trained, capsys):
        before = (trained.test_dir / "scores.json").read_bytes()
        assert command("evaluate", trained.dir, "--beam-size", 1, "--max-length", 9) == 0
        directory = trained.test_dir.with_name(f"{trained.test_dir.name}-beam1")
        assert scores_of(directory)["beam"] == {
            "beam_size": 1, "length_penalty": 1.0, "max_length": 9, "max_length_ratio": None, "num_hypotheses": 1,
            "preset": "hf", "early_stopping": False, "beam_groups": 1, "diversity_penalty": 0.0, "constraints": None,
            "sampling": None, "minimum_risk": None,
        }  # fmt: skip
        assert (trained.test_dir / "scores.json").read_bytes() == before
        assert str(directory) in capsys.readouterr().out

    def test_scores_a_plain_model_on_parallel_text(self, trained, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("t.en").write_text("".join(f"{source}\n" for source, _ in TEST_PAIRS))
        Path("t.de").write_text("".join(f"{target}\n" for _, target in TEST_PAIRS))
        languages = ("--source-language", "en_XX", "--target-language", "de_DE")
        options = ("--beam-size", 3, "--max-length", 60, "--metrics", "ter,bleu")
        export = trained.dir / "export"
        assert command("evaluate", export, "--data", "t.en", "--references", "t.de", *languages, *options) == 0
        directory = tmp_path / "evaluations" / "export-t-beam3"
        theirs, ours = scores_of(trained.test_dir), scores_of(directory)
        assert ours["ter"] == theirs["ter"]
        assert "chrf" not in ours
        assert (directory / "hypotheses.txt").read_text() == (trained.test_dir / "hypotheses.txt").read_text()

    def test_searches_as_it_is_told(self, trained, tmp_path, capsys):
        def scores(*arguments):
            assert command("evaluate", trained.dir, *arguments, "--output", tmp_path / "set") == 0
            return scores_of(tmp_path / "set")

        marian = scores("--preset", "marian", "evaluation.num_hypotheses=3")
        assert (marian["beam"]["beam_size"], marian["beam"]["length_penalty"]) == (12, 0.0)
        assert "marian beam 12, length penalty 0" in capsys.readouterr().out
        drawn = scores("evaluation.sampling={top_k: 5}")
        assert drawn["beam"]["sampling"] == {"temperature": 1.0, "top_k": 5, "top_p": 1.0, "seed": 17}
        assert drawn["beam"]["beam_size"] == 1
        chosen = scores("evaluation.minimum_risk={utility: bleu, samples: 8}")
        assert chosen["hypothesis_score"] == "expected sentence bleu against 8 samples, 0 to 100"
        diverse = scores("evaluation.beam_groups=3", "evaluation.diversity_penalty=0.5", "evaluation.beam_size=3")
        assert diverse["beam"]["beam_groups"] == 3

    def test_compares_with_a_baseline(self, trained, tmp_path, capsys):
        options = ("--beam-size", 1, "--max-length", 9, "--output", tmp_path / "short")
        assert command("evaluate", trained.dir, *options, "--baseline", trained.test_dir) == 0
        found, before = scores_of(tmp_path / "short")["baseline"], scores_of(trained.test_dir)
        assert found["name"] == trained.test_dir.name
        texts = ((one / "hypotheses.txt").read_text().splitlines() for one in (trained.test_dir, tmp_path / "short"))
        assert found["changed"] == sum(old != new for old, new in zip(*texts, strict=True)) > 0
        assert {name: one["score"] for name, one in found["scores"].items()} == {
            name: pytest.approx(before[name]) for name in ("bleu", "chrf", "ter")
        }
        assert "Largest losses" in (tmp_path / "short" / "report.html").read_text()
        other = next(trained.test_dir.parent.glob("step-*-validation"))
        assert command("evaluate", trained.dir, "--baseline", other) == 3
        assert "references differ" in capsys.readouterr().err

    def test_outputs_have_the_phrases_of_their_row(self, trained, tmp_path):
        rows = [(*TEST_PAIRS[0], f"{TEST_PAIRS[1][1]} ||| {TEST_PAIRS[5][1]}"), (*TEST_PAIRS[2], "")]
        lines = ["source\ttarget\tphrases", *("\t".join(row) for row in rows)]
        (tmp_path / "rows.tsv").write_text("".join(f"{line}\n" for line in lines))
        options = ("--data", tmp_path / "rows.tsv", "--output", tmp_path / "set")
        assert command("evaluate", trained.dir, *options, "data.constraints_column=phrases") == 0
        bound, free = (tmp_path / "set" / "hypotheses.txt").read_text().splitlines()
        assert TEST_PAIRS[1][1] in bound
        assert TEST_PAIRS[5][1] in bound
        assert free == (trained.test_dir / "hypotheses.txt").read_text().splitlines()[2]

    def test_an_ensemble_of_a_model_with_itself_gives_its_outputs(self, trained, tmp_path):
        options = ("--ensemble", trained.dir / "export", "--output", tmp_path / "set")
        assert command("evaluate", trained.dir, *options) == 0
        assert (tmp_path / "set" / "hypotheses.txt").read_text() == (trained.test_dir / "hypotheses.txt").read_text()
        assert scores_of(tmp_path / "set")["nll"] == pytest.approx(scores_of(trained.test_dir)["nll"], rel=1e-5)

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["RUN", "evaluation.beam_sise=3"], 2, "did you mean `evaluation.beam_size`?"),
            (["RUN", "optimizer.lr=3"], 2, "only keys of evaluation and data count here"),
            (["RUN", "evaluation.stop_strings=[x]"], 2, "has no meaning with task translation"),
            (["RUN", "evaluation.beam_groups=2"], 2, "override 'evaluation.beam_groups=2': evaluation.beam_groups: "),
            (["RUN", "--ensemble", "OTHER"], 3, "its tokeniser is another one"),
            (["RUN", "--data", "no.tsv"], 3, "no such file"),
            (["RUN", "--references", "x"], 2, "--data"),
            (["RUN", "--metrics", "bleu,rouge"], 2, "'rouge' is not one of bleu, chrf, chrf++, ter"),
            (["RUN", "--beam-size", "0"], 2, "at least 1"),
            (["RUN", "evaluation.metrics=[accuracy]"], 2, "accuracy scores labels, and task translation has none"),
            (["RUN", "--max-length-ratio", "-1"], 2, "evaluation.max_length_ratio: must be greater than 0, got -1.0"),
            (["RUN", "--max-length", "1"], 2, "evaluation.max_target_length: must be"),
            (["RUN", "--output", "TEST"], 1, "a file is in the way of the directory"),
            (["RUN", "--max-length", "900"], 2, "--max-length: 900 tokens are more than the model's 128 positions"),
            (["RUN", "--target-language", "de_AT"], 3, "nearest: de_DE"),
            (["RUN", "--output", "RUN"], 1, "not an evaluation's"),
            (["no-such-model"], 3, "no such model directory"),
            (["EXPORT"], 2, "--data FILE"),
            (["EXPORT", "--data", "TEST"], 3, "--source-language: mBART-50 needs a language"),
            (["UNFINISHED"], 3, "no exported model yet"),
        ],
    )
    def test_says_what_is_wrong(self, trained, tiny_models, tmp_path, capsys, arguments, code, message):
        unfinished = tmp_path / "unfinished"
        unfinished.mkdir()
        shutil.copy(trained.dir / "plan.json", unfinished)
        places = {"RUN": trained.dir, "EXPORT": trained.dir / "export", "UNFINISHED": unfinished}
        places |= {"TEST": trained.directory / "test.tsv", "OTHER": tiny_models["nllb"]}
        assert command("evaluate", *(places.get(argument, argument) for argument in arguments)) == code
        assert message in capsys.readouterr().err


class TestTranslate:
    def test_gives_the_hypotheses_of_the_evaluation_line_by_line(self, trained, monkeypatch, capfdbinary):
        sources = [source for source, _ in TEST_PAIRS]
        feed(monkeypatch, "\n\r\n".join(sources) + "\n  ")
        assert command("translate", trained.dir) == 0
        expected = (trained.test_dir / "hypotheses.txt").read_text().splitlines()
        lines = capfdbinary.readouterr().out.decode().removesuffix("\n").split("\n")
        assert lines[::2] == expected
        assert lines[1::2] == [""] * len(expected)
        assert len(set(expected)) > 1

    def test_n_best_is_a_table(self, trained, monkeypatch, capfdbinary):
        source = TEST_PAIRS[0][0]
        feed(monkeypatch, f"{source}\n\n{source}\n")
        assert command("translate", trained.dir, "--n-best", 2) == 0
        rows = [line.split("\t") for line in capfdbinary.readouterr().out.decode().splitlines()]
        assert [row[0] for row in rows] == ["1", "1", "2", "3", "3"]
        assert rows[2] == ["2", "", ""]
        assert rows[0][2] == (trained.test_dir / "hypotheses.txt").read_text().splitlines()[0]
        assert float(rows[0][1]) >= float(rows[1][1])
        assert [row[1:] for row in rows[:2]] == [row[1:] for row in rows[3:]]

    def test_outputs_have_the_phrases_of_their_line(self, trained, monkeypatch, capfdbinary):
        (source, target), (_, other) = TEST_PAIRS[0], TEST_PAIRS[5]
        phrase = " ".join(other.split()[:2])
        feed(monkeypatch, f"{source}\n{source}\t{phrase}\t{target.split()[0]}\n")
        assert command("translate", trained.dir, "--constraints") == 0
        free, bound = capfdbinary.readouterr().out.decode().splitlines()
        assert free == (trained.test_dir / "hypotheses.txt").read_text().splitlines()[0]
        assert phrase not in free
        assert phrase in bound
        assert target.split()[0] in bound

    def test_draws_depend_on_the_number_of_a_line(self, trained, monkeypatch, capfdbinary):
        options = ("evaluation.sampling={temperature: 2.0}", "--n-best", 2)
        source, outputs = TEST_PAIRS[0][0], []
        for text in (f"{source}\n\n{source}\n", f"\n\n{source}\n"):
            feed(monkeypatch, text)
            assert command("translate", trained.dir, *options) == 0
            outputs.append(capfdbinary.readouterr().out.decode().splitlines())
        assert outputs[0][-2:] == outputs[1][-2:]
        assert len({line.split("\t")[2] for line in outputs[0]}) > 3

    def test_answers_each_line_as_it_comes_and_ends_quietly_without_a_reader(self, trained):
        process = subprocess.Popen(
            [sys.executable, "-m", "harness", "translate", str(trained.dir)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        expected = (trained.test_dir / "hypotheses.txt").read_text().splitlines()
        for (source, _), hypothesis in list(zip(TEST_PAIRS, expected, strict=True))[:2]:
            process.stdin.write(f"{source}\n".encode())
            process.stdin.flush()
            assert process.stdout.readline().decode() == f"{hypothesis}\n"
        process.stdout.close()
        process.stdin.write(b"one more\n")
        process.stdin.close()
        process.wait(60)
        assert process.stderr.read() == b""

    @pytest.mark.parametrize("family", ["mbart", "mbart50", "nllb", "marian", "t5"])
    def test_works_with_every_family(self, tiny_models, family, monkeypatch, capfdbinary):
        feed(monkeypatch, "Open the file.\n\nSave it.\n")
        languages = zip(("--source-language", "--target-language"), LANGUAGES[family], strict=True)
        options = [part for option, code in languages if code for part in (option, code)]
        assert command("translate", tiny_models[family], *options, "--beam-size", 2, "--max-length", 8) == 0
        assert len(capfdbinary.readouterr().out.decode().splitlines()) == 3

    def test_says_which_line_was_cut_short(self, trained, monkeypatch, capfd):
        feed(monkeypatch, "short\n" + "word " * 200 + "\n")
        assert command("translate", trained.dir, "--beam-size", 1, "--max-length", 3) == 0
        out, err = capfd.readouterr()
        assert out.count("\n") == 2
        assert "line 2 has more than 60 tokens" in err
        assert "line 1" not in err

    def test_says_what_is_wrong(self, trained, monkeypatch, capfd):
        feed(monkeypatch, b"fine\nnot \xff fine\n")
        assert command("translate", trained.dir) == 3
        assert "standard input:2: not UTF-8 at byte 5" in capfd.readouterr().err
        assert command("translate", trained.dir, "--n-best", 4) == 2
        assert "raise `evaluation.beam_size` to 4" in capfd.readouterr().err
        assert command("translate", trained.dir / "export") == 3
        assert "--source-language" in capfd.readouterr().err


class TestExport:
    def test_gives_the_model_that_the_run_has_exported(self, trained, tmp_path, capsys):
        assert command("export", trained.dir, tmp_path / "model", "--dtype", "float32") == 0
        ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
        theirs = AutoModelForSeq2SeqLM.from_pretrained(trained.dir / "export")
        assert ours.dtype == torch.float32
        assert theirs.dtype == torch.bfloat16
        for name, value in ours.state_dict().items():
            assert torch.equal(value.to(torch.bfloat16), theirs.state_dict()[name]), name
        assert f"step {trained.summary['exported_step']}" in capsys.readouterr().out

    def test_takes_the_step_asked_for(self, trained, tmp_path, capsys):
        steps = sorted(int(path.name[5:]) for path in (trained.dir / "checkpoints").glob("step-*"))
        assert command("export", trained.dir, tmp_path / "model", "--step", steps[-1]) == 0
        assert f"step {steps[-1]}" in capsys.readouterr().out
        assert command("export", trained.dir, tmp_path / "none", "--step", 7) == 3
        assert f"there are: {', '.join(map(str, steps))}" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()

    def test_writes_into_no_directory_that_is_in_use(self, trained, tmp_path, capsys):
        (tmp_path / "mine.txt").write_text("mine")
        assert command("export", trained.dir, tmp_path) == 2
        assert command("export", trained.dir, tmp_path / "mine.txt") == 2
        assert command("export", tmp_path, tmp_path / "new") == 2
        assert "no plan.json" in capsys.readouterr().err
        assert (tmp_path / "mine.txt").read_text() == "mine"


class TestCheck:
    def test_shows_a_row_as_the_model_sees_it_and_counts_steps(self, tiny_models, tmp_path, capsys):
        run = tiny_run(tmp_path, tiny_models["mbart50"], name="new", schedule={"epochs": 2.0, "warmup_steps": 1})
        assert command("check", write_run(run)) == 0
        out = capsys.readouterr().out
        words = " ".join(out.split())
        assert "mBART-50" in words
        assert "source: en_XX" in words
        assert "decoder input: </s> de_DE" in words
        assert "labels: de_DE" in words
        assert "starts with </s>, de_DE is forced first" in words
        assert f"{len(PAIRS)} rows read, {len(PAIRS)} kept" in words
        assert "(2.0 epochs)" in words
        assert not (tmp_path / "new").exists()

    def test_refuses_a_tag_that_the_tokeniser_lacks(self, tiny_models, tmp_path, capsys):
        run = tiny_run(tmp_path, tiny_models["mbart50"], name="new", data__target_language="de_AT")
        assert command("check", write_run(run)) == 3
        assert "nearest: de_DE" in capsys.readouterr().err

    def test_refuses_weights_of_another_shape_without_reading_them(self, tiny_models, tmp_path, capsys):
        model = shutil.copytree(tiny_models["mbart50"], tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"encoder_ffn_dim": 48}))
        assert command("check", write_run(tiny_run(tmp_path, model, name="new"))) == 3
        assert "do not fit config.json" in capsys.readouterr().err

    def test_refuses_rows_that_cannot_be_scored(self, tiny_models, tmp_path, capsys):
        (tmp_path / "dev.tsv").write_text("source\ttarget\nonly one side\n")
        run = tiny_run(tmp_path, tiny_models["mbart50"], name="new", data__validation=str(tmp_path / "dev.tsv"))
        assert command("check", write_run(run)) == 3
        assert "dev.tsv:2" in capsys.readouterr().err


class TestTrainAgain:
    def test_a_complete_run_says_so_and_does_nothing(self, trained):
        before = (trained.dir / "metrics.jsonl").read_bytes()
        done = harness("train", str(trained.file), "evaluation.beam_size=2")
        assert done.returncode == 0, done.stderr
        assert "is complete: 40 steps" in done.stdout
        assert (trained.dir / "metrics.jsonl").read_bytes() == before

    @pytest.mark.parametrize("verb", ["train", "check"])
    def test_what_is_learnt_may_not_change_within_a_run(self, trained, verb, capsys):
        before = (trained.dir / "config.yaml").read_bytes()
        assert command(verb, trained.file, "optimizer.lr=1e-4", "schedule.steps=60", "checkpoint.keep_last=1") == 2
        err = capsys.readouterr().err
        assert "optimizer.lr: 0.005 -> 0.0001" in err
        assert "schedule.steps: 40 -> 60" in err
        assert "keep_last" not in err
        assert "new `name`" in err
        assert (trained.dir / "config.yaml").read_bytes() == before

    def test_a_stop_in_the_last_evaluation_loses_nothing_and_an_unwritable_report_stops_nothing(
        self, tiny_models, tmp_path
    ):
        run = tiny_run(
            tmp_path,
            tiny_models["mbart"],
            name="stopped",
            data__test=str(write_pairs(tmp_path / "long.tsv", PAIRS * 8)),
            evaluation={"beam_size": 5},
            launch={"processes": 1},
        )
        path, run_dir = write_run(run), tmp_path / "stopped"
        stopped = harness("train", str(path), HARNESS_FAULT="decode:2:SIGTERM")
        assert stopped.returncode == 75, stopped.stderr
        (stop,) = records_of(run_dir, "stop")
        assert (stop["step"], stop["world_size"]) == (20, 1)
        assert "last evaluation" in stop["reason"]
        assert not records_of(run_dir, "evaluation")
        shutil.rmtree(run_dir / "evaluations")
        (run_dir / "evaluations").write_text("in the way")
        done = harness("train", str(path), "evaluation.beam_size=1")
        assert done.returncode == 0, done.stderr
        assert "evaluations cannot be written" in done.stdout
        assert "evaluations: 1 records could not be written" in done.stdout
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["steps"] == 20
        assert summary["test"]["chrf"] == records_of(run_dir, "evaluation")[0]["chrf"]
        assert len(records_of(run_dir, "step")) == 20
