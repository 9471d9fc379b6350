"""Every wrong run file or command line: exit code 2, one clear message, no traceback, nothing on standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.cli.main import main
from tests.run_files import RIGHT, write_run_file


class Bad(NamedTuple):
    """``old`` -> ``new`` in the right run file, ``overrides`` on the command line; what the message must hold."""

    name: str
    old: str = ""
    new: str = ""
    overrides: tuple[str, ...] = ()
    place: str = ""
    says: str = ""


def edit(name: str, old: str, new: str, line: int, says: str) -> Bad:
    return Bad(name, old=old, new=new, place=f"run.yaml:{line}: ", says=says)


def override(name: str, *overrides: str, says: str, place: str | None = None) -> Bad:
    return Bad(name, overrides=overrides, place=f"override '{overrides[-1]}'" if place is None else place, says=says)


ONE_KEY = [
    edit("unknown top-level key", "name:", "nam: x\nname:", 1, "nam: unknown key (did you mean `name`?)"),
    edit("unknown section key", "lr: 3e-5", "lr: 3e-5, beta: 3", 14, "did you mean `optimizer.betas`?"),
    edit("key in the wrong section", "name: enro", "name: enro\nlr: 1", 2, "did you mean `optimizer.lr`?"),
    edit("another trainer's name", "lr: 3e-5", "lr: 3e-5, max_grad_norm: 1", 14, "did you mean `optimizer.clip_norm`?"),
    edit("PEFT's name", "name: enro", "name: enro\nadapter: {lora_alpha: 1}", 2, "did you mean `adapter.alpha`?"),
    edit("bitsandbytes' name", "dtype:", "load_in_4bit: true\n  dtype:", 5, "did you mean `model.quantization`?"),
    edit("section or switch", "dtype:", "gradient_checkpointing: {every: 0}\n  dtype:", 5, "than 0, got 0"),
    edit("key in a rule of a list", "name: enro", "name: enro\nfreeze: [{encodr: all}]", 2, "mean `freeze.0.encoder`?"),
    edit("key that resembles nothing", "name: enro", "name: enro\nqqqq: 1", 2, "qqqq: unknown key; keys here: name,"),
    edit("duplicate key", "lr: 3e-5", "lr: 3e-5, lr: 1e-5", 14, "optimizer.lr: given twice, first in line 14"),
    edit("duplicate section", "name: enro", "name: enro\nname: enfr", 2, "name: given twice, first in line 1"),
    edit("missing key", "lr: 3e-5", "eps: 1e-6", 14, "optimizer.lr: is required"),
    edit("missing section", "optimizer: {lr: 3e-5}\n", "", 1, "optimizer: is required"),
    edit("number as text", "lr: 3e-5", "lr: '3e-5'", 14, "must be a valid number, got the text '3e-5'"),
    edit("text as number", "name: enro", "name: 5", 1, "name: must be text (put it in quotes), got 5"),
    edit("date as name", "name: enro", "name: 2026-01-01", 1, "name: must be text"),
    edit("fraction as integer", "steps: 100", "steps: 100.5", 15, "must be a valid integer, got 100.5"),
    edit("yes is not a boolean", "dtype:", "gradient_checkpointing: yes\n  dtype:", 5, "must be a valid boolean"),
    edit("mistyped choice", "dtype: bfloat16", "dtype: bfloat", 5, "did you mean `bfloat16`?"),
    edit("section as scalar", "deepspeed: {preset: zero2}", "deepspeed: zero2", 16, "must be a section"),
    edit("list as section", "[{path: train.tsv}]", "{path: train.tsv}", 7, "data.train: must be a valid list"),
    edit("empty list", "[{path: train.tsv}]", "[]", 7, "at least 1 item"),
    edit("key in a list item", "[{path: train.tsv}]", "[{pat: x}]", 7, "did you mean `data.train.0.path`?"),
    edit("negative learning rate", "lr: 3e-5", "lr: -1", 14, "must be greater than 0, got -1"),
    edit("infinite learning rate", "lr: 3e-5", "lr: .inf", 14, "must be a finite number"),
    edit("probability above one", "lr: 3e-5", "lr: 1, betas: [0.9, 1.5]", 14, "optimizer.betas.1: must be less than 1"),
    edit("three betas", "lr: 3e-5", "lr: 1, betas: [0.9, 0.9, 0.9]", 14, "at most 2 items"),
    edit("name that leaves the directory", "name: enro", "name: ../x", 1, "only letters, digits"),
    edit("no processes", "name: enro", "name: enro\nlaunch: {processes: 0}", 2, "must be greater than 0"),
    edit("processes in words", "name: enro", "name: enro\nlaunch: {processes: two}", 2, "or must be 'auto'"),
    edit("key that is not text", "name: enro", "name: enro\n1: x", 2, "a key must be text"),
    edit("unknown metric", "every_steps: 50", "every_steps: 50, metrics: [blue]", 17, "did you mean `bleu`?"),
]

CONTRADICTIONS = [
    edit("no model", "  path: no-such-org/no-such-model\n", "", 3, "model: needs `path`"),
    edit("model from two places", "dtype:", "config: x\n  dtype:", 5, "contradicts `model.path`"),
    edit("float16 on a CPU", "bfloat16", "float16", 5, "not possible on a CPU"),
    edit("flash attention on a CPU", "dtype:", "attention: flash_attention_2\n  dtype:", 5, "GPUs only"),
    edit("steps and epochs", "steps: 100", "steps: 100, epochs: 3", 15, "contradicts `schedule.steps`"),
    edit("no length", "warmup_steps: 10, steps: 100", "warmup_steps: 10", 15, "needs `steps` or `epochs`"),
    edit("endless warm-up", "warmup_steps: 10", "warmup_steps: 101", 15, "101 is more than `schedule.steps` (100)"),
    edit("floor above the peak", "steps: 100", "steps: 100, min_lr: 1", 15, "above the peak `optimizer.lr`"),
    edit("micro-batch below one row", "per_device: 1024", "per_device: 100", 13, "raise it to 128"),
    edit("step below one row", "per_step: 4096", "per_step: 100", 13, "raise it to 128"),
    edit("source without place", "{path: train.tsv}", "{weight: 2}", 7, "needs `path`, or `source` and `target`"),
    edit("half a pair", "{path: train.tsv}", "{source: a}", 7, "needs both `source` and `target`"),
    edit("path and pair", "{path: train.tsv}", "{path: a, target: b}", 7, "keep `path`, or the pair"),
    edit("evaluation without rows", "  validation: dev.tsv\n", "", 16, "set `data.validation`"),
    edit("metric twice", "every_steps: 50", "metrics: [bleu, bleu]", 17, "names a metric twice"),
    edit("decoding batch below one row", "every_steps: 50", "max_tokens_per_device: 99", 17, "raise it to 640"),
    edit("stopping unscored", "steps: 50}", "steps: 50}\nearly_stopping: {metric: ter}", 18, "ter is not scored"),
    edit("p of a loss", "steps: 50}", "steps: 50}\nearly_stopping: {metric: nll, significance: 0.1}", 18, "nll has"),
    edit("p beyond reach", "steps: 50}", "steps: 50}\nearly_stopping: {significance: 1e-4}", 18, "no p below 0.001"),
    edit("stopping never scored", "{every_steps: 50}", "null\nearly_stopping: {}", 18, "`evaluation` is null"),
    edit("stopping scored once", "{every_steps: 50}", "{}\nearly_stopping: {}", 18, "scored only at the end"),
    edit("adafactor under ZeRO", "lr: 3e-5", "lr: 3e-5, name: adafactor", 14, "set `deepspeed.preset` to zero0"),
    edit("unknown preset", "zero2", "zero-2_ofload", 16, "did you mean `zero2_offload`?"),
    edit("NVMe without a place", "zero2", "zero3_nvme", 16, "set `deepspeed.nvme_path`"),
    edit("DeepSpeed file missing", "zero2", "./none.json", 16, "cannot read none.json: No such file"),
]

ROWS = "data={train: [{path: train.jsonl}], validation: dev.jsonl%s}"
CAUSAL = ("task=causal_lm", ROWS % "")
CLASSES = ("task=classification", ROWS % "", "classification={labels: [no, yes]}")
REGRESSION = ("task=classification", ROWS % "", "classification={problem: regression}")
PROMPTS = ("task=causal_lm", "data={format: pairs, train: [{path: train.tsv}], validation: dev.tsv}")
LORA, NF4, INT8 = "adapter={}", "model.quantization={}", "evaluation.precision=int8"


def of_task(name: str, task: tuple[str, ...], *more: str, says: str, key: str) -> Bad:
    """A run of another task with ``more`` overrides; the message names ``key``."""
    return Bad(name, overrides=(*task, *more), place=f": {key}: ", says=says)


TASKS = [
    of_task("languages of conversations", CAUSAL, "data.source_language=en", key="data.source_language",
            says="no meaning with `data.format` messages (task causal_lm)"),
    of_task("packed translation", (), "data.packing=false", key="data.packing", says="`data.format` pairs"),
    of_task("length of a translation", (), "data.max_length=512", key="data.max_length", says="`data.format` pairs"),
    of_task("packed classification", CLASSES, "data.packing=false", key="data.packing", says="`data.format` labelled"),
    of_task("label column of text", CAUSAL, "data.format=text", "data.label_column=y", key="data.label_column",
            says="`data.format` text"),
    of_task("system prompt of text", CAUSAL, "data.format=text", "data.system_prompt=Hi", key="data.system_prompt",
            says="`data.format` text"),
    of_task("labels of a translation", (), "classification={}", key="classification",
            says="no meaning with task translation, only with classification"),
    of_task("head of a translation", (), "optimizer.head_lr=1e-3", key="optimizer.head_lr",
            says="only classification makes a new head"),
    of_task("focal translation", (), "loss.focal_gamma=2.0", key="loss.focal_gamma", says="only with classification"),
    of_task("balanced conversations", CAUSAL, "loss.class_weights=balanced", key="loss.class_weights",
            says="no meaning with task causal_lm"),
    of_task("beams of labels", CLASSES, "evaluation.beam_size=4", key="evaluation.beam_size",
            says="only with translation and causal_lm"),
    of_task("labels for a language model", CAUSAL, "data.format=labelled", key="data.format",
            says="labelled does not fit task causal_lm: set it to text or prompt or messages or pairs"),
    of_task("prompt of a translation model", (), "data.prompt_template='{source}'", key="data.prompt_template",
            says="no meaning with `data.format` pairs (task translation)"),
    of_task("examples of conversations", CAUSAL, "data.few_shot={path: x.tsv}", key="data.few_shot",
            says="no meaning with `data.format` messages (task causal_lm)"),
    of_task("prefix of a prompt", PROMPTS, "data.source_prefix='to German: '", key="data.source_prefix",
            says="no meaning with `data.format` pairs (task causal_lm)"),
    of_task("prompt without a source", PROMPTS, "data.prompt_template='Say it in {target_language}'",
            key="data.prompt_template", says="has no {source}: write it where the text shall stand"),
    of_task("name of no template", PROMPTS, "data.prompt_template='{source} {language}'", key="data.prompt_template",
            says="{language} is no name of a template: use {source}, {source_language}, {target_language}, {examples}"),
    of_task("lonely brace", PROMPTS, "data.prompt_template='{source'", key="data.prompt_template",
            says="a brace that is text is written twice"),
    of_task("width in a template", PROMPTS, "data.prompt_template='{source!r:>9}'", key="data.prompt_template",
            says="is no name of a template"),
    of_task("example without a translation", PROMPTS, "data.few_shot={path: x.tsv, template: '{source}'}",
            key="data.few_shot.template", says="has no {target}"),
    of_task("stop strings of a translation", (), "evaluation.stop_strings=[a]", key="evaluation.stop_strings",
            says="only with causal_lm"),
    of_task("stop at nothing", CAUSAL, "evaluation.stop_strings=['']", key="evaluation.stop_strings",
            says="an empty text would end every answer"),
    of_task("two files of conversations", CAUSAL, "data.train=[{source: a, target: b}]", key="data.train.0",
            says="needs `path`, and only that: with `data.format` messages"),
    of_task("language of a conversation", CAUSAL, "data.train=[{path: a, source_language: en}]",
            key="data.train.0.source_language", says="no meaning with `data.format` messages"),
    of_task("no file of conversations", CAUSAL, "data.train=[{weight: 2.0}]", key="data.train.0", says="needs `path`"),
    of_task("micro-batch below one pack", CAUSAL, "data.max_length=2048", key="batch.max_tokens_per_device",
            says="`data.max_length` 2048): raise it to 2048"),
    of_task("BLEU of labels", CLASSES, "evaluation.metrics=[bleu]", key="evaluation.metrics",
            says="bleu does not score labels: use accuracy, macro_f1, micro_f1, mcc, ece"),
    of_task("accuracy of a translation", (), "evaluation.metrics=[accuracy]", key="evaluation.metrics",
            says="accuracy scores labels, and task translation has none: use bleu, chrf, chrf++, ter"),
    of_task("BLEU of plain text", CAUSAL, "data.format=text", "evaluation.metrics=[bleu]", key="evaluation.metrics",
            says="plain text has none"),
    of_task("RMSE of labels", CLASSES, "evaluation.metrics=[rmse]", key="evaluation.metrics",
            says="rmse scores numbers, and these are labels"),
    of_task("accuracy of numbers", REGRESSION, "evaluation.metrics=[accuracy]", key="evaluation.metrics",
            says="accuracy does not score numbers: use rmse, pearson, spearman"),
    of_task("labels of numbers", REGRESSION, "classification.labels=[a, b]", key="classification.labels",
            says="a regression has no labels"),
    of_task("smoothed numbers", REGRESSION, "loss.label_smoothing=0.1", key="loss.label_smoothing",
            says="a squared error and no labels"),
    of_task("label twice", CLASSES, "classification.labels=[a, b, a]", key="classification.labels",
            says="names a label twice"),
    of_task("weight of no label", CLASSES, "loss.class_weights={yess: 2.0}", key="loss.class_weights",
            says="yess is not in `classification.labels`: no, yes"),
    of_task("weight of nothing", CLASSES, "loss.class_weights={yes: 0.0}", key="loss.class_weights",
            says="must be greater than 0"),
    of_task("stopping on what is not scored", CLASSES, "early_stopping={metric: ece}", key="early_stopping.metric",
            says="ece is not scored: add it to `evaluation.metrics`"),
]  # fmt: skip

MODELS = [
    of_task("4 bits without adapter", (), NF4, key="model.quantization", says="add the section `adapter`"),
    of_task("SVD of 4 bits", (), NF4, "adapter={method: pissa}", key="adapter.method", says="full precision"),
    of_task("int8 of 4 bits", (), NF4, LORA, INT8, key="evaluation.precision", says="in 4 or 8 bits already"),
    of_task("int8 of dora", (), "adapter={method: dora}", INT8, key="evaluation.precision", says="base's own weights"),
    of_task("int8 of labels", CLASSES, INT8, key="evaluation.precision", says="no meaning with task classification"),
    of_task("FP4 of 8 bits", (), LORA, "model.quantization={bits: 8, type: fp4}", key="model.quantization.type",
            says="a choice of 4-bit weights"),
    of_task("float16 products on a CPU", (), LORA, "model.quantization={compute_dtype: float16}",
            key="model.quantization.compute_dtype", says="ten times slower on a CPU"),
    of_task("rank of IA3", (), "adapter={method: ia3, rank: 8}", key="adapter.rank",
            says="ia3 has no use for it: it has targets, modules_to_save"),
    of_task("alpha of a prompt", (), "adapter={method: prompt_tuning, alpha: 8.0}", key="adapter.alpha",
            says="it has num_virtual_tokens"),
    of_task("virtual tokens of LoRA", (), "adapter={num_virtual_tokens: 8}", key="adapter.num_virtual_tokens",
            says="lora has no use for it"),
    of_task("bottleneck of LoRA", (), "adapter={bottleneck_size: 8}", key="adapter.bottleneck_size",
            says="lora has no use for it"),
    of_task("targets not a pattern", (), "adapter={targets: 'q_(proj'}", key="adapter.targets",
            says="not a regular expression: missing )"),
    of_task("prompts in packs", CAUSAL, "adapter={method: p_tuning}", key="adapter.method",
            says="set `data.packing` to false"),
    of_task("recomputed prefix", (), "adapter={method: prefix_tuning}", "model.gradient_checkpointing=true",
            key="model.gradient_checkpointing", says="set it to false"),
    of_task("noise on a prompt", (), "adapter={method: prompt_tuning}", "model.neftune_alpha=5.0",
            key="model.neftune_alpha", says="prompt_tuning has its own input embeddings"),
    of_task("frozen under an adapter", (), LORA, "freeze={embeddings: true}", key="freeze",
            says="the base is frozen already"),
    of_task("freezes nothing", (), "freeze={until_step: 10}", key="freeze", says="freezes nothing"),
    of_task("layers not a range", (), "freeze=[{embeddings: true}, {encoder: 3-1}]", key="freeze.1.encoder",
            says="'3-1' is not a layer or a range of layers: write it like 0-9, 0,2,4 or all"),
    of_task("one stack of two", (), "freeze={layers: all}", key="freeze.layers", says="use `encoder` and `decoder`"),
    of_task("two stacks of one", CAUSAL, "freeze={decoder: all}", key="freeze.decoder", says="use `layers`"),
    of_task("frozen name not a pattern", (), "freeze={patterns: ['a', '*']}", key="freeze.patterns.1",
            says="not a regular expression: nothing to repeat"),
    of_task("thawed at the end", (), "freeze={encoder: all, until_step: 100}", key="freeze.until_step",
            says="the end of the run (`schedule.steps` 100)"),
]  # fmt: skip


def of_search(name: str, *keys: str, key: str, says: str) -> Bad:
    """``keys`` of `evaluation`; the message names ``key``."""
    overrides = tuple(f"evaluation.{one}" for one in keys)
    return Bad(name, overrides=overrides, place=f": evaluation.{key}: ", says=says)


SEARCHES = [
    of_search("more outputs than beams", "num_hypotheses=6", key="num_hypotheses",
              says="6 outputs cannot be kept of 5: raise `evaluation.beam_size` to 6"),
    of_search("more outputs than samples", "num_hypotheses=9", "minimum_risk={samples: 8}", key="num_hypotheses",
              says="raise `evaluation.minimum_risk.samples` to 9"),
    of_search("one sample", "minimum_risk={samples: 1}", key="minimum_risk.samples", says="must be greater than 1"),
    of_search("another's stop rule", "preset=marian", "early_stopping=true", key="early_stopping",
              says="is a rule of preset hf; marian has its own"),
    of_search("stop rule of draws", "sampling={}", "early_stopping=never", key="early_stopping",
              says="no meaning with `evaluation.sampling`, which draws outputs"),
    of_search("groups of draws", "minimum_risk={}", "beam_groups=5", "diversity_penalty=0.5", key="beam_groups",
              says="no meaning with `evaluation.minimum_risk`"),
    of_search("groups of another toolkit", "preset=fairseq", "beam_groups=5", "diversity_penalty=1.0",
              key="beam_groups", says="only known to preset hf, not to fairseq"),
    of_search("groups of no size", "beam_groups=2", "diversity_penalty=1.0", key="beam_groups",
              says="2 groups cannot share 5 beams"),
    of_search("groups that are the same", "beam_groups=5", key="beam_groups",
              says="set `evaluation.diversity_penalty`"),
    of_search("penalty of one group", "diversity_penalty=1.0", key="diversity_penalty", says="set `beam_groups`"),
    of_search("longer than the longest", "min_target_length=128", key="min_target_length",
              says="must be less than the longest output, 128 tokens"),
    of_search("ratios the wrong way round", "min_length_ratio=2.0", "max_length_ratio=1.5", key="min_length_ratio",
              says="2 is more than `evaluation.max_length_ratio` (1.5)"),
    of_search("forbidden nothing", "bad_words=[a, ' ']", key="bad_words", says="would forbid every output"),
    of_search("too few tokens for the samples", "minimum_risk={samples: 32}", "max_tokens_per_device=4000",
              key="max_tokens_per_device", says="32 outputs x `data.max_source_length` 128: raise it to 4096"),
    of_search("no temperature", "sampling={temperature: 0}", key="sampling.temperature", says="greater than 0"),
    of_task("phrases in draws", (), "data.constraints_column=c", "evaluation.sampling={}",
            key="data.constraints_column", says="is for a beam search: remove `evaluation.sampling`"),
    of_task("phrases without beams", (), "data.constraints_column=c", "evaluation.beam_size=1",
            key="data.constraints_column", says="a `beam_size` of at least 2"),
    of_task("phrases of conversations", CAUSAL, "data.constraints_column=c", key="data.constraints_column",
            says="no meaning with `data.format` messages"),
    of_task("draws of labels", CLASSES, "evaluation.sampling={}", key="evaluation.sampling",
            says="only with translation and causal_lm"),
]  # fmt: skip

OVERRIDES = [
    override("no equals sign", "optimizer.lr", says="must have the form key.path=value"),
    override("no key", "=3", says="must have the form key.path=value"),
    override("empty part", "optimizer..lr=3", says="must have the form key.path=value"),
    override("value not YAML", "name=[", says="not YAML"),
    override("wrong type", "optimizer.lr=abc", says="optimizer.lr: must be a valid number, got the text 'abc'"),
    override("unknown key", "optimizer.rl=1", says="did you mean `optimizer.lr`?"),
    override("unknown section", "optimiser.lr=1", says="did you mean `optimizer`?"),
    override("through a scalar", "name.x=1", says="name is the text 'enro', not a section"),
    override("past the end of a list", "data.train.3.path=x", says="data.train has 1 entries"),
    override(
        "inside a new list", "data.train=[{path: x, weight: 0}]", says="data.train.0.weight: must be greater than 0"
    ),
    override("contradiction", "schedule.steps=5", says="more than `schedule.steps` (5)", place="run.yaml:15"),
    override("required section switched off", "optimizer=null", says="must be a section"),
]

DEEPSPEED_OVERRIDES = [
    ("batch size", "{train_batch_size: 8}", "train_batch_size: belongs to the run file: set `batch.tokens_per_step`"),
    ("micro-batch", "{train_micro_batch_size_per_gpu: 8}", "set `batch.max_tokens_per_device`"),
    ("accumulation", "{gradient_accumulation_steps: 4}", "belongs to the run file"),
    ("clipping", "{gradient_clipping: 0.5}", "set `optimizer.clip_norm`"),
    ("precision", "{fp16: {enabled: true}}", "set `model.dtype`"),
    ("precision off", "{bf16: {enabled: false}}", "set `model.dtype`"),
    ("autocast", "{torch_autocast: {enabled: true}}", "set `model.dtype`"),
    ("optimizer", "{optimizer: {type: Adam}}", "set the section `optimizer`"),
    ("scheduler", "{scheduler: {type: WarmupLR}}", "set the section `schedule`"),
    ("unknown top-level key", "{zero_optimisation: {stage: 2}}", "did you mean `zero_optimization`?"),
    ("unknown ZeRO key", "{zero_optimization: {overlap_com: true}}", "did you mean `overlap_comm`?"),
    ("removed key", "{elasticity: {}}", "was removed from DeepSpeed"),
    ("removed ZeRO key", "{zero_optimization: {mics_shard_size: 2}}", "was removed from DeepSpeed"),
    ("old ZeRO key", "{zero_optimization: {cpu_offload: true}}", '"offload_optimizer": {"device": "cpu"}'),
    ("unsupported parallelism", "{tensor_parallel: {autotp_size: 2}}", "tensor parallelism is not supported"),
    ("stage four", "{zero_optimization: {stage: 4}}", "must be 0, 1, 2 or 3, got 4"),
    ("stage as text", "{zero_optimization: {stage: '2'}}", "must be 0, 1, 2 or 3, got '2'"),
    ("ZeRO not an object", "{zero_optimization: 2}", "must be an object, got 2"),
    ("offload not an object", "{zero_optimization: {offload_optimizer: cpu}}", "must be an object"),
    ("offload device", "{zero_optimization: {offload_optimizer: {device: disk}}}", "must be none, cpu or nvme"),
    ("offload key", "{zero_optimization: {offload_optimizer: {devise: cpu}}}", "did you mean `device`?"),
    ("NVMe at stage 2", "{zero_optimization: {offload_optimizer: {device: nvme}}}", "stage 3 only"),
    ("parameters at stage 2", "{zero_optimization: {offload_param: {device: cpu}}}", "needs ZeRO stage 3"),
    ("offload at stage 0", "{zero_optimization: {stage: 0, offload_optimizer: {device: cpu}}}", "this is stage 0"),
]

NOT_YAML = [
    ("empty file", "", "the run file is empty"),
    ("only a remark", "# nothing\n", "the run file is empty"),
    ("a list", "- name: x\n", "must be a mapping"),
    ("a word", "name\n", "must be a mapping"),
    ("a tab", "model:\n\tpath: x\n", "run.yaml:2: not YAML: a tab: indent with spaces"),
    ("open bracket", "data: [1\n", "not YAML"),
    ("bad indentation", "name: x\n data: 2\n", "run.yaml:2: not YAML"),
    ("undefined alias", "name: *x\n", "run.yaml:1: not YAML"),
    ("python object", "name: !!python/object/apply:os.system [ls]\n", "is not allowed"),
    ("two documents", RIGHT + "---\n" + RIGHT, "not YAML"),
    ("holds itself", "deepspeed: &a {overrides: *a}\n", "anchors"),
    ("nested too deeply", "name: " + "[" * 5000, "not YAML: nested too deeply"),
]


def fails_cleanly(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command in process; returns its message."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.count("error:") == 1
    assert len(err) < 1500
    return err


@pytest.mark.parametrize(
    "bad", [*ONE_KEY, *CONTRADICTIONS, *TASKS, *MODELS, *SEARCHES, *OVERRIDES], ids=lambda bad: bad.name
)
def test_one_mistake_gives_one_message_with_its_place(
    bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run_file(tmp_path, *([(bad.old, bad.new)] if bad.old else []))
    err = fails_cleanly(capsys, "plan", str(path), *bad.overrides)
    assert bad.says in err
    assert bad.place in err
    assert "errors" not in err, "one mistake, one message"


@pytest.mark.parametrize(
    "overrides",
    [
        CAUSAL,
        CLASSES,
        REGRESSION,
        (*CAUSAL, "data.format=text"),
        (*CAUSAL, "data.format=prompt", "evaluation={metrics: [bleu], every_steps: 5, max_tokens_per_device: 8192}"),
        (*CAUSAL, LORA, NF4, "model.neftune_alpha=5.0", "model.gradient_checkpointing={every: 2, offload: true}"),
        (*CAUSAL, LORA, "model.path=null", "model.config=x", NF4),
        (*CAUSAL, "adapter={method: prefix_tuning}", "data.packing=false"),
        (*CLASSES, "loss={class_weights: {yes: 2.0}, focal_gamma: 2.0}", "early_stopping={}"),
        (*CLASSES[:2], "loss.class_weights=balanced", "early_stopping={metric: mcc}"),
        (*CLASSES[:2], "classification={problem: multi_label}", "loss.label_smoothing=0.1"),
        (*CLASSES, "freeze={layers: 0-3, until_step: 20}"),
        (LORA, "model.quantization={bits: 8}"),
        ("adapter={method: bottleneck, bottleneck_size: 32, dropout: 0.1}",),
        (*PROMPTS, "data.constraints_column=terms", "evaluation={metrics: [bleu], max_tokens_per_device: 8192}"),
        ("evaluation.sampling={top_k: 10, top_p: 0.9}", "evaluation.num_hypotheses=8"),
        ("evaluation.minimum_risk={utility: bleu}", "evaluation.sampling={temperature: 0.8}"),
        ("evaluation={preset: marian, num_hypotheses: 12, bad_words: [foo], allow_unknown: false}",),
        ("evaluation={beam_size: 6, beam_groups: 3, diversity_penalty: 0.5, min_length_ratio: 0.5}",),
        ("freeze=[{encoder: '0-3,5', embeddings: true}, {decoder: all, until_step: 20}]",),
    ],
)
def test_right_run_files_of_other_kinds(
    overrides: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(write_run_file(tmp_path)), *overrides]) == 0
    assert "run        " in capsys.readouterr().out


@pytest.mark.parametrize(("overrides", "says"), [case[1:] for case in DEEPSPEED_OVERRIDES])
def test_deepspeed_overrides_must_not_fight_the_run_file(
    overrides: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run_file(tmp_path, ("{preset: zero2}", f"{{preset: zero2, overrides: {overrides}}}"))
    err = fails_cleanly(capsys, "plan", str(path))
    assert says in err
    assert "run.yaml:16: deepspeed.overrides." in err


@pytest.mark.parametrize(("overrides", "says"), [case[1:] for case in DEEPSPEED_OVERRIDES])
def test_the_same_in_a_deepspeed_file_names_that_file(
    overrides: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.config.document import parse_value

    document = {"zero_optimization": {"stage": 2}, **parse_value(overrides)}
    if isinstance(document["zero_optimization"], dict):
        document["zero_optimization"].setdefault("stage", 2)
    (tmp_path / "ds.json").write_text(json.dumps(document))
    path = write_run_file(tmp_path, ("zero2", str(tmp_path / "ds.json")))
    err = fails_cleanly(capsys, "plan", str(path))
    assert says in err
    assert "run.yaml:16: deepspeed.preset: " in err
    assert "ds.json: " in err


@pytest.mark.parametrize(("text", "says"), [case[1:] for case in NOT_YAML], ids=[case[0] for case in NOT_YAML])
def test_what_is_not_a_yaml_mapping(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in fails_cleanly(capsys, "plan", str(write_run_file(tmp_path, text=text)))


def test_unreadable_run_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin1.yaml").write_bytes(b"name: x\noutput_dir: caf\xe9\n")
    assert "none.yaml: cannot read" in fails_cleanly(capsys, "plan", str(tmp_path / "none.yaml"))
    assert "Is a directory" in fails_cleanly(capsys, "plan", str(tmp_path))
    assert "latin1.yaml:2: the run file is not UTF-8" in fails_cleanly(capsys, "plan", str(tmp_path / "latin1.yaml"))


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '{"zero_optimization": {"stage": 2}} x'])
def test_a_deepspeed_file_that_is_not_a_json_object(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ds.json").write_text(text, encoding="latin-1")
    path = write_run_file(tmp_path, ("zero2", str(tmp_path / "ds.json")))
    assert "ds.json" in fails_cleanly(capsys, "plan", str(path))


def test_every_mistake_is_reported_at_once_in_order_of_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run_file(
        tmp_path, ("name: enro", "name: enro\nname: x"), ("bfloat16", "bfloat"), ("lr: 3e-5", "rl: 3e-5")
    )
    err = fails_cleanly(capsys, "plan", str(path), "loss.label_smoothing=2")
    assert "5 errors" in err
    lines = [line.strip() for line in err.splitlines()[1:]]
    assert [line.split(": ")[0].rpartition("run.yaml")[2] for line in lines[:4]] == [":2", ":6", ":15", ":15"]
    assert lines[4].startswith("override 'loss.label_smoothing=2'")


def test_two_contradictions_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = fails_cleanly(
        capsys, "plan", str(write_run_file(tmp_path)), "model.config=x", "schedule.epochs=1", "deepspeed.preset=zero9"
    )
    assert "3 errors" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required"),
        (["trian", "run.yaml"], "invalid choice: 'trian'"),
        (["plan"], "the following arguments are required: RUN.yaml"),
        (["plan", "run.yaml", "--devises", "2"], "unrecognized arguments: --devises 2"),
        (["plan", "run.yaml", "--devices", "0"], "at least 1"),
        (["plan", "run.yaml", "--devices", "two"], "must be a whole number"),
        (["schema", "x"], "unrecognized arguments: x"),
        (["status"], "the following arguments are required: RUN"),
    ],
)
def test_wrong_command_lines(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in fails_cleanly(capsys, *arguments)


@pytest.mark.parametrize("size", ["80 apples", "-1GiB", "0", "GiB"])
def test_memory_sizes(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run_file(tmp_path)
    assert "size in bytes" in fails_cleanly(capsys, "plan", str(path), f"--device-memory={size}")


@pytest.mark.parametrize("verb", ["status", "stop"])
def test_not_a_run_directory(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such run directory" in fails_cleanly(capsys, verb, str(tmp_path / "none"))
    assert "it has no plan.json" in fails_cleanly(capsys, verb, str(tmp_path))
