"""What `make demo-llm` makes before it trains: instructions whose answers are not given away, and the model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import demo_llm
from examples.llm import make_instructions, smollm2
from harness.config.load import load_run_config
from tests.tiny_llm import CHATML, make_tiny_llm

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    directory = tmp_path_factory.mktemp("instructions")
    make_instructions.main(directory)
    parts = {}
    for part in ("train", "test"):
        with open(directory / f"{part}.tsv", encoding="utf-8", newline="") as lines:
            parts[part] = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return parts


def test_instructions_are_the_same_every_time(parts: dict[str, Rows], tmp_path: Path) -> None:
    assert {part: len(rows) for part, rows in parts.items()} == make_instructions.NUM_ROWS
    make_instructions.main(tmp_path)
    again = (tmp_path / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    assert again == ["\t".join(row.values()) for row in parts["train"]]


@pytest.mark.parametrize("column", ["page", "prompt", "completion"])
def test_nothing_of_the_test_rows_is_trained_on(column: str, parts: dict[str, Rows]) -> None:
    trained, held_out = ({row[column] for row in parts[part]} for part in ("train", "test"))
    assert held_out
    assert not trained & held_out


def test_the_demo_and_its_run_file_name_the_same_files() -> None:
    config = load_run_config(demo_llm.ROOT / demo_llm.RUN_FILE, [], accelerator="cpu")
    assert config.model.path == demo_llm.MODEL
    assert [source.path for source in config.data.train] == [f"{demo_llm.INSTRUCTIONS}/train.tsv"]
    assert config.data.validation == f"{demo_llm.INSTRUCTIONS}/test.tsv"
    assert demo_llm.ROOT / config.output_dir / config.name == demo_llm.RUN


def write_gguf(path: Path, model_directory: Path) -> None:
    """A model as llama.cpp keeps it: its own names, and the rows of q and k in its own order of rotary pairs."""
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    config = model.config
    tokens = json.loads((model_directory / "tokenizer.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokens["model"]["vocab"], key=tokens["model"]["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in tokens["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[-2]
        if part in heads:
            halves = tensor.view(heads[part], 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_converted_model_says_what_the_gguf_said(tmp_path: Path) -> None:
    """Weights that bfloat16 holds exactly, so nothing is lost on the way."""
    original = make_tiny_llm(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).float()
    model.save_pretrained(original)
    write_gguf(tmp_path / "tiny.gguf", original)
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "converted")

    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    assert not hasattr(converted.config, "quantization_config")
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    tokenizer, expected = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "converted", original))
    text = "Choose Format - Zelle öffnen"
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    turn = [{"role": "user", "content": text}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == expected.apply_chat_template(turn, tokenize=False)
