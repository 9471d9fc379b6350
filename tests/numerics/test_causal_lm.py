"""Causal language modelling against transformers' own loss, packed against unpacked, and who may be packed at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.config.schema import DataConfig, DataSource, LossConfig
from harness.data.encoded import Encoded
from harness.data.rows import Row
from harness.errors import ConfigError
from harness.models.adapters import without_virtual_positions
from harness.models.isolation import check_isolation
from harness.tasks.causal_lm import CausalTask
from harness.tasks.task import Batch
from tests.pairs import PAIRS
from tests.tiny_llm import make_tiny_llm

CPU = torch.device("cpu")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2")
CHANGES: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 5}, "phi3": {"sliding_window": 5}}
TALKS = [
    [{"role": "user", "content": source}, {"role": "assistant", "content": target}] for source, target in PAIRS[:5]
]
ROWS = [
    Row(f"talks.jsonl:{number}", talk[0]["content"], talk[1]["content"], messages=tuple(talk))
    for number, talk in enumerate(TALKS, start=1)
]


def task_of(tokenizer: Any, *, packing: bool = True, max_length: int = 1024, in_one_row: bool = False) -> CausalTask:
    source = DataSource(path="x.jsonl")
    data = DataConfig(train=[source], format="messages", packing=packing, max_length=max_length)
    return CausalTask(tokenizer, data, LossConfig(), in_one_row)


def examples_of(encoded: Iterable[Encoded]) -> list[Any]:
    return [(example.input_ids, example.labels, example.marker) for example in encoded]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokeniser."""
    name = str(request.param)
    directory = make_tiny_llm(tmp_path_factory.mktemp("llm") / name, name, **CHANGES.get(name, {}))
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def sums(model: Any, task: CausalTask, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss and its gradients."""
    model.zero_grad()
    terms = task.loss(model(**batch.inputs).logits, batch)
    terms.loss_sum.backward()
    return terms.loss_sum.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients, relative to the norm of the second."""
    assert ours.keys() == theirs.keys()
    ours_N, theirs_N = (torch.cat([gradient.flatten() for gradient in one.values()]) for one in (ours, theirs))
    return float((ours_N - theirs_N).norm() / theirs_N.norm())


# --- the loss


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_transformers(tiny: tuple[Any, Any], packing: bool) -> None:
    model, tokenizer = tiny
    task = task_of(tokenizer, packing=packing)
    batch = task.collate(examples_of(task.encode(ROWS)), CPU)
    with torch.no_grad():
        ours = task.loss(model(**batch.inputs).logits, batch)
    ids = [tokenizer.apply_chat_template(talk, return_dict=False) for talk in TALKS]
    prompts = [tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False) for talk in TALKS]
    loss_sum, num_targets = 0.0, 0
    for row, prompt in zip(ids, prompts, strict=True):
        labels = [-100] * len(prompt) + row[len(prompt) : -1] + [-100]  # the line break after <|im_end|> is not said
        count = len(row) - len(prompt) - 1
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([row]), labels=torch.tensor([labels]), use_cache=False).loss
        loss_sum, num_targets = loss_sum + float(theirs) * count, num_targets + count
    assert int(ours.num_targets) == num_targets
    assert float(ours.loss_sum) == pytest.approx(loss_sum, rel=1e-5)
    assert float(ours.nll_sum) == float(ours.loss_sum)


def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    packed, alone, flat = (
        task_of(tokenizer, max_length=128, **options)
        for options in ({}, {"packing": False}, {"in_one_row": True})  # type: dict[str, Any]
    )
    examples = examples_of(packed.encode(ROWS))
    batch = packed.collate(examples, CPU)
    assert 1 < len(batch.labels) < len(ROWS), "several packs, some of several rows"
    loss, gradients = sums(model, packed, batch)
    flat_loss, flat_gradients = sums(model, flat, flat.collate(examples, CPU))
    losses = []
    expected: dict[str, Tensor] = {}
    for example in examples:
        one_loss, one_gradients = sums(model, alone, alone.collate([example], CPU))
        losses.append(one_loss)
        expected = {name: expected.get(name, 0) + gradient for name, gradient in one_gradients.items()}
    assert float(loss) == pytest.approx(float(sum(losses)), rel=1e-6)
    assert float(flat_loss) == pytest.approx(float(sum(losses)), rel=1e-6)
    assert distance(gradients, expected) < 1e-6
    assert distance(flat_gradients, expected) < 1e-6


def test_a_neighbour_in_the_pack_changes_nothing(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    task = task_of(tokenizer)
    first, second, third, *_ = examples_of(task.encode(ROWS))
    length = min(len(first[0]), len(third[0]))
    logits = []
    for neighbour in (first, third):
        batch = task.collate([(neighbour[0][:length], neighbour[1][:length], 0), second], CPU)
        assert len(batch.labels) == 1
        with torch.no_grad():
            logits.append(model(**batch.inputs).logits[0, length:])
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([second[0]]), use_cache=False).logits[0]
    scale = float(alone.abs().max())
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-6 * scale
    assert float((logits[0] - alone).abs().max()) <= 2e-6 * scale


def test_no_rows_give_a_loss_and_gradients_of_exactly_zero(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    for task in (task_of(tokenizer), task_of(tokenizer, packing=False), task_of(tokenizer, in_one_row=True)):
        batch = task.collate([], CPU)
        loss, gradients = sums(model, task, batch)
        assert (float(loss), batch.num_tokens, batch.num_padded_tokens) == (0.0, 0, 0)
        assert gradients
        assert not any(gradient.any() for gradient in gradients.values())


def test_rows_alone_may_be_padded(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    task = task_of(tokenizer, packing=False)
    examples = examples_of(task.encode(ROWS))
    batch = task.collate(examples, CPU)
    assert batch.num_padded_tokens == len(ROWS) * max(len(ids) for ids, _, _ in examples)
    assert batch.num_tokens == sum(len(ids) for ids, _, _ in examples)
    losses = [sums(model, task, task.collate([example], CPU))[0] for example in examples]
    assert float(sums(model, task, batch)[0]) == pytest.approx(float(sum(losses)), rel=1e-6)


def test_prompts_are_padded_at_the_start(tiny: tuple[Any, Any]) -> None:
    """Greedy generation of a padded batch is that of each prompt by itself."""
    model, tokenizer = tiny
    task = task_of(tokenizer)
    examples = [(one.input_ids, one.labels, one.marker) for one in task.encode(ROWS[:3])]
    prompts = [task.collate_sources([example], CPU)["input_ids_BS"][0].tolist() for example in examples]
    assert len({len(prompt) for prompt in prompts}) == 3
    batch = task.collate_sources(examples, CPU)
    inputs = {"input_ids": batch["input_ids_BS"], "attention_mask": batch["attention_mask_BS"]}
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    alone = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    assert together == alone


# --- which models may be packed

SHAPE = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": 0,
}  # fmt: skip
GPT_SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WINDOW = {"head_dim": 8, "sliding_window": 4}
SOUND: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 4}, "mixtral": {"num_local_experts": 2}, "granite": {}, "cohere": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8}, "gemma2": WINDOW, "gemma3_text": WINDOW, "phi": {}, "phi3": {"sliding_window": 4},
    "gpt2": GPT_SHAPE, "gptj": GPT_SHAPE | {"rotary_dim": 4}, "gpt_neox": {}, "gpt_bigcode": GPT_SHAPE, "olmo2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 4},
    "smollm3": {}, "stablelm": {}, "starcoder2": {"sliding_window": 4}, "nemotron": {},
}  # fmt: skip
LEAKING: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "falcon": {}, "bloom": GPT_SHAPE,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2}, "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1}, "rwkv": {"attention_hidden_size": 32},
    "jamba": {"num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False},
}  # fmt: skip
EAGER_ONLY = ("gemma2", "gptj", "gpt_neo", "bloom", "mpt", "mamba", "mamba2", "rwkv")


def random_model(model_type: str, changes: dict[str, Any], attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SHAPE | changes))
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if model_type in EAGER_ONLY else attention
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", SOUND)
def test_models_that_may_be_packed(model_type: str, attention: str) -> None:
    model = random_model(model_type, SOUND[model_type], attention)
    check_isolation(model)
    assert model.training, "left as it was"
    check_isolation(model, in_one_row=True)
    check_isolation(model.to(torch.bfloat16))


@pytest.mark.parametrize("model_type", LEAKING)
def test_models_that_leak_are_refused(model_type: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ConfigError, match="packed rows see each other in this model") as error:
            check_isolation(random_model(model_type, LEAKING[model_type]).to(dtype))
        assert error.value.where == "data.packing"
        assert "data.packing=false" in error.value.hint


def test_positions_that_count_on_are_refused() -> None:
    """Attention of this GPT-2 is isolated, but it is told the place in the pack as the position."""
    model = random_model("gpt2", GPT_SHAPE)
    embed = model.transformer.wpe
    embed.forward = lambda positions: type(embed).forward(embed, torch.arange(positions.shape[1]).expand_as(positions))
    with pytest.raises(ConfigError, match="a packed row is another row to this model than the same row alone"):
        check_isolation(model)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("method", [PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_are_refused(method: Any) -> None:
    """PEFT drops the positions, or gives a cache: both make transformers forget where rows end."""
    config = method(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = without_virtual_positions(get_peft_model(random_model("llama", {}), config))
    with pytest.raises(ConfigError, match="packed rows see each other"):
        check_isolation(adapted)
