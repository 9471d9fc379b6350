"""The plan: parameter counts against the real models, memory against the ZeRO papers, JSON there and back."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from harness.config.load import load_run_config
from harness.config.schema import AdapterConfig, ClassificationConfig, FreezeRule, RunConfig, Task
from harness.errors import ConfigError, DataError
from harness.models.adapters import add_adapter
from harness.models.freeze import resolve_freezing
from harness.models.layers import embedding_names
from harness.models.linear import linear_layers
from harness.models.load import AUTO_MODELS
from harness.plan.adapters import adapter_tensors
from harness.plan.advice import candidates, parse_bytes, shown_bytes
from harness.plan.held import Held, frozen_names, held_weights
from harness.plan.parameters import model_json, model_tensors, position_limit, trained_length
from harness.plan.plan import Plan, make_plan
from harness.plan.report import recommended
from harness.plan.tensors import Tensor, Tensors, num_parameters
from harness.plan.zero import Memory, model_states, state_bytes
from tests.run_files import write_run_file

BART: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 40,
}
MARIAN = {**BART, "pad_token_id": 1}
TWO_TABLES = {**MARIAN, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 77}
T5: dict[str, Any] = {"vocab_size": 100, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 3}
GATED = {"feed_forward_proj": "gated-gelu"}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BERT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
OPT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 32,
}
OLD_OPT = {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "enable_bias": False}
DISTILBERT = {"vocab_size": 100, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
DEBERTA = {
    **BERT,
    "relative_attention": True,
    "share_att_key": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pos_att_type": ["p2c", "c2p"],
}
OLD_DEBERTA = {
    **DEBERTA,
    "conv_kernel_size": 3,
    "position_biased_input": True,
    "type_vocab_size": 2,
    "position_buckets": -1,
    "max_relative_positions": 20,
}

TRANSLATORS: list[tuple[str, dict[str, Any]]] = [
    *(("mbart", changes) for changes in (BART, BART | UNTIED, {})),
    *(("m2m_100", changes) for changes in (BART, BART | UNTIED, {})),
    *(("marian", changes) for changes in (MARIAN, MARIAN | UNTIED, TWO_TABLES, TWO_TABLES | UNTIED)),
    *(("t5", changes) for changes in (T5, {**T5, **GATED, "num_decoder_layers": 2}, T5 | UNTIED, {})),
    *(("mt5", changes) for changes in (T5, {})),
]
DECODERS: list[tuple[str, dict[str, Any]]] = [
    *(
        (family, changes)
        for family in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi3")
        for changes in (LLAMA, LLAMA | TIED, LLAMA | UNTIED, {})
    ),
    *((family, {**LLAMA, "attention_bias": True}) for family in ("qwen3", "gemma", "gemma2", "gemma3_text")),
    *((family, {**LLAMA, "attention_bias": True, "mlp_bias": True}) for family in ("llama", "smollm3")),
    *(("gpt2", changes) for changes in (GPT2, {**GPT2, **UNTIED, "n_inner": 20}, {})),
    *(("opt", changes) for changes in (OPT, OLD_OPT, {})),
    *(("gpt_neox", changes) for changes in (BERT, BERT | TIED, {})),
]
ENCODERS: list[tuple[str, dict[str, Any]]] = [
    *((family, changes) for family in ("bert", "roberta", "xlm-roberta") for changes in (BERT, {})),
    *(("distilbert", changes) for changes in (DISTILBERT, {})),
    *(("deberta-v2", changes) for changes in (DEBERTA, OLD_DEBERTA)),
]
CLASSIFIERS = [*ENCODERS, *DECODERS, ("mbart", BART), ("t5", T5), ("mt5", T5)]
MODELS: list[tuple[Task, str, dict[str, Any]]] = [
    *(("translation", *model) for model in TRANSLATORS),
    *(("causal_lm", *model) for model in DECODERS),
    *(("classification", *model) for model in CLASSIFIERS),
]
SIZES = {*BART, *T5, *BERT, *GPT2, *OPT, *DISTILBERT, "relative_attention", "share_att_key"}
THREE_LABELS = ClassificationConfig(labels=["a", "b", "c"])

P = 1000
HELD = Held({"matrix": Tensor((30, 30), "linear"), "vector": Tensor((100,))})


def real_model(task: Task, family: str, changes: dict[str, Any], device: str = "meta") -> Any:
    more = {"num_labels": 3} if task == "classification" else {}
    with torch.device(device):
        model = AUTO_MODELS[task].from_config(CONFIG_MAPPING[family](**changes, **more))
    model.tie_weights()
    return model


def ours(task: Task, family: str, content: dict[str, Any]) -> Tensors:
    tensors = model_tensors({**content, "model_type": family}, task, THREE_LABELS)
    assert tensors is not None
    return tensors


def named(tensors: Tensors, kind: str) -> set[str]:
    return {name for name, tensor in tensors.items() if tensor.kind == kind}


@pytest.mark.parametrize(("task", "family", "changes"), MODELS)
def test_parameters_are_those_of_the_real_model(task: Task, family: str, changes: dict[str, Any]) -> None:
    """By name and shape; and the same linear layers and tables as adapters, quantisation and freezing find."""
    model = real_model(task, family, changes)
    trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    tensors = ours(task, family, model.config.to_dict())
    assert {name: tensor.shape for name, tensor in tensors.items()} == trainable
    assert named(tensors, "linear") == {f"{name}.weight" for name in linear_layers(model)}
    assert named(tensors, "embedding") == embedding_names(model) & set(trainable)


@pytest.mark.parametrize(("task", "family", "changes"), [model for model in MODELS if model[2]])
def test_keys_that_a_config_json_leaves_out_are_the_familys(task: Task, family: str, changes: dict[str, Any]) -> None:
    """The plain sizes are always there; other keys may be missing where they have the class's own value."""
    content = CONFIG_MAPPING[family](**changes).to_dict()
    defaults = CONFIG_MAPPING[family]().to_dict()
    kept = {key: value for key, value in content.items() if key in SIZES or defaults.get(key) != value}
    assert ours(task, family, kept) == ours(task, family, content)


def test_mbart_large_has_the_published_size() -> None:
    large = {**BART, "vocab_size": 250027, "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12}
    large |= {"encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "max_position_embeddings": 1024}
    assert num_parameters(ours("translation", "mbart", large)) == 610_851_840


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": "bert"}', '{"model_type": "t5"}', "{}"])
def test_a_wrong_model_json_is_a_data_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError):
        model_tensors(model_json(str(tmp_path)) or {})


@pytest.mark.parametrize(
    ("task", "family"),
    [("causal_lm", "bert"), ("causal_lm", "mbart"), ("translation", "llama"), ("classification", "marian")],
)
def test_a_family_that_cannot_do_the_task_is_refused(task: Task, family: str) -> None:
    with pytest.raises(DataError, match=f"'{family}' is not supported by task {task}"):
        model_tensors({"model_type": family}, task)


def test_other_families_are_not_known_and_not_refused() -> None:
    assert model_tensors({"model_type": "falcon"}, "causal_lm") is None
    assert model_tensors({"model_type": "modernbert"}, "classification") is None
    assert model_tensors({"model_type": "deberta-v2", **DEBERTA, "share_att_key": False}, "classification") is None
    with pytest.raises(DataError, match="'falcon' is not supported by task translation"):
        model_tensors({"model_type": "falcon"})


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", GPT2), ("opt", OPT), ("bert", {"max_position_embeddings": 40}), ("mbart", BART)],
)
def test_tables_of_positions_limit_the_length(family: str, changes: dict[str, Any]) -> None:
    assert position_limit({"model_type": family, **changes}) == 40
    assert trained_length({"model_type": family, **changes}) is None


def test_the_roberta_table_is_as_long_as_it_says() -> None:
    """514 rows, of which tokens get numbers 2 to 513."""
    model = real_model("classification", "roberta", {**BERT, "max_position_embeddings": 42}, "cpu").eval()
    limit = position_limit({"model_type": "roberta", "max_position_embeddings": 42})
    assert limit == 40
    model(input_ids=torch.full((1, limit), 7))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, limit + 1), 7))


def test_rotary_positions_have_no_end() -> None:
    model = {"model_type": "llama", "max_position_embeddings": 40}
    assert position_limit(model) is None
    assert trained_length(model) == 40


METHODS = ["lora", "rslora", "dora", "adalora", "ia3", "prefix_tuning", "prompt_tuning", "p_tuning", "bottleneck"]
ADAPTED: list[tuple[Task, str, dict[str, Any]]] = [
    ("causal_lm", "llama", LLAMA),
    ("causal_lm", "gpt2", GPT2),
    ("causal_lm", "phi3", LLAMA),
    ("causal_lm", "opt", OPT),
    ("classification", "llama", LLAMA),
    ("classification", "bert", BERT),
    ("classification", "roberta", BERT),
    ("translation", "mbart", BART),
    ("translation", "t5", T5),
]


def run_config(**changes: Any) -> RunConfig:
    sections = {"data": {"train": [{"path": "x"}]}, "batch": {"tokens_per_step": 2048, "max_tokens_per_device": 2048}}
    sections |= {"optimizer": {"lr": 1e-4}, "schedule": {"steps": 10}, "model": {"config": "x"}}
    return RunConfig.model_validate({"name": "x", **sections, **changes})


@pytest.mark.parametrize(
    ("task", "family", "changes", "method"),
    [
        (*model, method)
        for model in ADAPTED
        for method in METHODS
        if not (model[:2] == ("classification", "llama") and method in ("prompt_tuning", "p_tuning"))  # refused
    ],
)
def test_an_adapter_has_as_many_parameters_as_the_real_one(
    task: Task, family: str, changes: dict[str, Any], method: str
) -> None:
    sizes = {"rank": 4} if method in ("lora", "rslora", "dora", "adalora") else {}
    adapter: dict[str, Any] = {"method": method, **sizes}
    if (task, family, method) == ("causal_lm", "llama", "lora"):
        adapter |= {"targets": ["q_proj", "down_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    if (task, family, method) == ("causal_lm", "gpt2", "lora"):
        adapter |= {"modules_to_save": ["lm_head"]}
    if (task, family, method) == ("translation", "mbart", "lora"):
        adapter |= {"targets": r".*\.encoder\..*fc[12]"}
    config = AdapterConfig.model_validate(adapter)
    model = real_model(task, family, changes, "cpu")
    content = {**model.config.to_dict(), "model_type": family}
    added = adapter_tensors(config, task, content, ours(task, family, content))
    adapted = add_adapter(model, config, task=task, total_steps=100, seed=1)
    assert num_parameters(added) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "rules",
    [
        {"encoder": "0"},
        {"encoder": "all", "decoder": "0-1"},
        {"decoder": "0,2", "embeddings": True},
        {"patterns": ["layer_norm", r"fc1\.bias$"]},
        [{"encoder": "all"}, {"decoder": "0-2", "until_step": 5}],
    ],
)
def test_frozen_parts_are_those_of_the_real_model(rules: Any) -> None:
    """Counted as at the end of the run, when the most is trained."""
    model = real_model("translation", "mbart", BART)
    config = run_config(freeze=rules)
    tensors = ours("translation", "mbart", model.config.to_dict())
    listed = [config.freeze] if isinstance(config.freeze, FreezeRule) else config.freeze
    trainable = set(resolve_freezing(model, config.freeze).trainable_at(10))
    assert set(tensors) - frozen_names(listed, tensors) == trainable


def test_frozen_layers_of_a_model_with_one_stack() -> None:
    tensors = ours("classification", "bert", real_model("classification", "bert", BERT).config.to_dict())
    frozen = frozen_names([FreezeRule(layers="0-5")], tensors)
    assert frozen == {name for name in tensors if name.startswith("bert.encoder.layer.")}


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    """In bytes per parameter: 2 + 2 + 12 of what is trained, 2 of what is not."""
    tensors = ours("translation", "mbart", real_model("translation", "mbart", BART).config.to_dict())
    config = run_config(freeze={"embeddings": True}, model={"config": "x", "dtype": "bfloat16"})
    tables = sum(tensor.size for tensor in tensors.values() if tensor.kind == "embedding")
    rest = num_parameters(tensors) - tables
    held = held_weights(config, {"model_type": "mbart"}, tensors)
    memory = model_states(held, deepspeed={}, dtype="bfloat16", optimizer="adamw", world_size=1)
    assert memory["device"]["frozen_weights"] == 2 * tables
    assert total(memory) == 2 * tables + 16 * rest


@pytest.mark.parametrize(
    ("quantization", "bytes_per_value"),
    [
        ({"bits": 4}, 0.5 + 1 / 64 + 4 / (64 * 256)),
        ({"bits": 4, "double": False}, 0.5 + 4 / 64),
        ({"bits": 8}, 1 + 4 / 4096),
    ],
)
def test_quantised_weights(quantization: dict[str, Any], bytes_per_value: float) -> None:
    """Dettmers et al. 2023, section 3: 0.127 bits per value for the scales with double quantisation, else 0.5."""
    tensors = {"a.weight": Tensor((4096, 4096), "linear"), "table": Tensor((10, 4096), "embedding")}
    model = {"config": "x", "dtype": "bfloat16", "quantization": quantization}
    config = run_config(task="causal_lm", model=model, adapter={"rank": 8})
    held = held_weights(config, {"model_type": "llama"}, tensors)
    assert held.quantized == pytest.approx(bytes_per_value * 4096**2, rel=1e-6)
    assert held.frozen == 2 * 10 * 4096
    assert num_parameters(held.trained) == 8 * (4096 + 4096)
    whole = model_states(held, deepspeed={}, dtype="bfloat16", optimizer="adamw", world_size=4)
    zero3 = {"zero_optimization": {"stage": 3}}
    shared = model_states(held, deepspeed=zero3, dtype="bfloat16", optimizer="adamw", world_size=4)
    assert whole["device"]["quantized_weights"] == held.quantized
    assert shared["device"]["quantized_weights"] == ceil(held.quantized / 4)


def test_a_downloaded_hub_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text('{"model_type": "mbart"}')
    assert model_json("org/name") == {"model_type": "mbart"}
    assert model_json("org/other") is None


def states(stage: int, dtype: str, ranks: int, optimizer_on: str = "none", params_on: str = "none") -> Memory:
    zero = {"stage": stage, "offload_optimizer": {"device": optimizer_on}, "offload_param": {"device": params_on}}
    return model_states(HELD, deepspeed={"zero_optimization": zero}, dtype=dtype, optimizer="adamw", world_size=ranks)


def total(memory: Memory) -> int:
    return sum(sum(kinds.values()) for kinds in memory.values())


@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_mixed_precision_memory_is_that_of_the_zero_paper(ranks: int) -> None:
    """Figure 1 of Rajbhandari et al. with K = 12: (2 + 2 + K) P, 4 P + K P / N, 2 P + (2 + K) P / N, (4 + K) P / N."""
    k = 12
    expected = [(4 + k) * P, 4 * P + k * P / ranks, 2 * P + (2 + k) * P / ranks, (4 + k) * P / ranks]
    for stage, num_bytes in enumerate(expected):
        assert total(states(stage, "bfloat16", ranks)) == pytest.approx(num_bytes, abs=4 * 4)


def test_float32_memory() -> None:
    """No master copy without ZeRO, one with it: 16 P, and 4 + 4 + (4 + 8) / N at stage 1."""
    assert total(states(0, "float32", 4)) == 16 * P
    assert total(states(1, "float32", 4)) == 8 * P + 12 * P // 4


def test_bfloat16_gradients_summed_in_float32() -> None:
    """The default: 4 P more at stage 1 (the sums), 4 P / N in place of 2 P / N from stage 2 on."""
    for stage, num_bytes in ((1, 2 * P + 4 * P), (2, 4 * P // 4), (3, 4 * P // 4)):
        deepspeed = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp32"}}
        memory = model_states(HELD, deepspeed=deepspeed, dtype="bfloat16", optimizer="adamw", world_size=4)
        assert memory["device"]["gradients"] == num_bytes


def test_offload_moves_states_off_the_device() -> None:
    offloaded = states(2, "bfloat16", 4, optimizer_on="cpu")
    assert offloaded["device"] == {"weights": 2 * P}
    assert offloaded["host"] == {
        "gradients": 4 * P // 4,
        "master_weights": 4 * P // 4,
        "optimizer_states": 8 * P // 4,
    }
    nvme = states(3, "bfloat16", 4, optimizer_on="nvme", params_on="nvme")
    assert nvme["device"] == {}
    assert nvme["nvme"] == {"weights": 2 * P // 4, "master_weights": 4 * P // 4, "optimizer_states": 8 * P // 4}


def test_adafactor_keeps_a_row_and_a_column_per_matrix() -> None:
    memory = model_states(HELD, deepspeed={}, dtype="float32", optimizer="adafactor", world_size=1)
    assert memory["device"]["optimizer_states"] == 4 * (30 + 30 + 100)


@pytest.mark.parametrize(
    ("optimizer", "num_bytes"),
    [
        ("paged_adamw", 8 * P),
        ("adamw_8bit", 2 * P + 2 * 4 * P / 256),
        ("paged_adamw_8bit", 2 * P + 2 * 4 * P / 256),
        ("lion", 4 * P),
        ("muon", 4 * 900 + 8 * 100),
    ],
)
def test_bytes_of_optimizer_states(optimizer: str, num_bytes: float) -> None:
    assert state_bytes(HELD.trained, optimizer) == ceil(num_bytes)


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "mbart", **BART, "max_position_embeddings": 128}))
    return directory


def test_a_plan_goes_to_json_and_back(tmp_path: Path, model_directory: Path) -> None:
    config = load_run_config(write_run_file(tmp_path), [f"model.path={model_directory}", "early_stopping={}"])
    plan = make_plan(config, world_size=2)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.num_parameters is not None
    assert plan.checkpoint_bytes == 12 * plan.num_parameters
    assert Path(plan.run_dir) == Path.cwd() / "runs" / "enro"


CAUSAL = ("task=causal_lm", "data={train: [{path: train.jsonl}], validation: dev.jsonl, max_length: 128}")


@pytest.fixture
def gpt2_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "gpt2"
    directory.mkdir()
    content = {"model_type": "gpt2", **GPT2, "n_positions": 128}
    (directory / "config.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter={rank: 4}", "model.quantization={}", "model.gradient_checkpointing={every: 2}"),
        ("freeze=[{layers: '0', until_step: 5}, {embeddings: true}]",),
    ],
)
def test_a_plan_of_a_language_model_goes_to_json_and_back(
    overrides: tuple[str, ...], tmp_path: Path, gpt2_directory: Path
) -> None:
    config = load_run_config(write_run_file(tmp_path), [*CAUSAL, f"model.path={gpt2_directory}", *overrides])
    plan = make_plan(config, world_size=2)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.num_trained is not None
    assert plan.checkpoint_bytes == 12 * plan.num_trained


def test_a_classifiers_logits_are_not_counted(tmp_path: Path, gpt2_directory: Path) -> None:
    overrides = ["task=classification", CAUSAL[1], "classification={labels: [a, b, c]}"]
    plan = make_plan(
        load_run_config(write_run_file(tmp_path), [*overrides, f"model.path={gpt2_directory}"]), world_size=1
    )
    assert plan.logits_bytes is None
    tensors = ours("classification", "gpt2", {**GPT2, "n_positions": 128})
    assert plan.num_parameters == num_parameters(tensors)


def test_a_family_that_is_not_counted_has_a_plan_without_sizes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "falcon", "vocab_size": 100, "max_position_embeddings": 64}')
    plan = make_plan(load_run_config(write_run_file(tmp_path), [*CAUSAL, f"model.path={tmp_path}"]), world_size=2)
    assert (plan.num_parameters, plan.memory, plan.checkpoint_bytes) == (None, None, None)
    assert plan.warnings == ["data.max_length: 128 is more than the 64 positions the model was trained with"]


def test_virtual_tokens_take_positions(tmp_path: Path, gpt2_directory: Path) -> None:
    path = write_run_file(tmp_path)
    overrides = [*CAUSAL, f"model.path={gpt2_directory}", "data.packing=false"]
    make_plan(load_run_config(path, overrides), world_size=1)
    prompt = "adapter={method: prompt_tuning, num_virtual_tokens: 8}"
    with pytest.raises(ConfigError, match="128 and 8 virtual tokens is more than the 128 positions") as error:
        make_plan(load_run_config(path, [*overrides, prompt]), world_size=1)
    assert error.value.hint == "lower it to 120"


@pytest.mark.parametrize("content", [{}, {"config": {}}, {"config": None, "batches": None}])
def test_what_is_not_a_plan(content: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not a plan"):
        Plan.from_json(content)


@pytest.mark.parametrize(("ranks", "micro_steps"), [(1, 4), (2, 2), (3, 2), (4, 1), (64, 1)])
def test_batch_arithmetic(ranks: int, micro_steps: int, tmp_path: Path) -> None:
    batches = make_plan(load_run_config(write_run_file(tmp_path)), world_size=ranks).batches
    assert batches.least_micro_steps == micro_steps
    assert batches.total_tokens == 100 * 4096


def test_inputs_longer_than_the_model_are_refused(tmp_path: Path, model_directory: Path) -> None:
    path = write_run_file(tmp_path)
    overrides = [f"model.path={model_directory}", "data.max_source_length=129"]
    with pytest.raises(ConfigError, match="129 is more than the 128 positions"):
        make_plan(load_run_config(path, overrides), world_size=1)


def test_nvme_buffers_hold_the_largest_tensor(tmp_path: Path, model_directory: Path) -> None:
    overrides = [f"model.path={model_directory}", "deepspeed={preset: zero3_nvme, nvme_path: /nvme}"]
    plan = make_plan(load_run_config(write_run_file(tmp_path), overrides), world_size=3)
    positions = 128 + 2
    assert plan.deepspeed["zero_optimization"]["offload_param"]["buffer_size"] == ceil(positions * 16 / 3)


def test_the_first_preset_that_fits_is_recommended(tmp_path: Path) -> None:
    config = load_run_config(write_run_file(tmp_path))
    held = Held({str(index): Tensor((1000, 1000)) for index in range(600)})

    def advice(gib: float | None, ranks: int) -> str | None:
        size = None if gib is None else int(gib * 2**30)
        found = candidates(config, held, world_size=ranks, device_bytes=size, logits_bytes=0, on_cpu=False)
        chosen = recommended(found)
        return chosen.preset if chosen else None

    assert [advice(gib, 8) for gib in (80, 8, 4, 2, 0.2)] == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]
    assert [advice(gib, 1) for gib in (80, 4)] == ["zero0", "zero2_offload"], "one rank has nothing to divide by"
    assert advice(None, 8) is None


def test_presets_that_the_run_cannot_take_are_not_offered(tmp_path: Path) -> None:
    path = write_run_file(tmp_path, ("zero2", "zero0"), ("lr: 3e-5", "lr: 3e-5, name: adafactor"))
    found = candidates(load_run_config(path), HELD, world_size=4, device_bytes=2**30, logits_bytes=0, on_cpu=False)
    assert [candidate.preset for candidate in found] == ["zero0"]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("24g", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512", 512)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


def test_shown_sizes() -> None:
    assert [shown_bytes(n) for n in (0, 999, 2**20, 80 * 2**30, 5 * 2**40)] == [
        "0 B",
        "999 B",
        "1 MiB",
        "80 GiB",
        "5 TiB",
    ]


def test_the_accelerator_is_what_the_environment_says_or_what_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from harness.io import accelerator as found

    monkeypatch.delenv("HARNESS_ACCELERATOR", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(found, "nvidia_devices", lambda: [Path("/dev/nvidia0"), Path("/dev/nvidia1")])
    assert (found.accelerator(), found.num_devices()) == ("cuda", 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert found.num_devices() == 1
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (found.accelerator(), found.num_devices()) == ("cpu", 1)
    monkeypatch.setenv("HARNESS_ACCELERATOR", "cuda")
    assert found.accelerator() == "cuda"
