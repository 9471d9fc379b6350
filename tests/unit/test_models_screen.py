"""Bad model directories: each is refused with one message that names what is wrong, and nothing of it is loaded."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import ModelConfig
from harness.errors import DataError, HarnessError
from harness.models.load import load_family, load_model
from harness.models.screen import screen_model_directory

Spoil = Callable[[Path], object]


def load_everything(directory: Path) -> None:
    load_family(directory)
    load_model(ModelConfig(path=str(directory)), seed=0)


class Payload:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def edit(name: str, **changes: Any) -> Spoil:
    """Sets keys of a JSON file; a key set to `...` is removed."""

    def spoil(directory: Path) -> None:
        path = directory / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content |= changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return spoil


def index(shards: Any) -> Spoil:
    """Replaces the weights by an index of shards, with the real weights lying outside the directory too."""

    def spoil(directory: Path) -> None:
        shutil.copy(directory / "model.safetensors", directory.parent / "outside.safetensors")
        (directory / "model.safetensors").rename(directory / "part.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))

    return spoil


def index_without_metadata(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    content = {"weight_map": {"model.shared.weight": "part.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def pickled(*, in_index: bool) -> Spoil:
    def spoil(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(directory / "executed")))
        if in_index:
            content = {"weight_map": {"model.shared.weight": "pytorch_model.bin"}}
            (directory / "model.safetensors.index.json").write_text(json.dumps(content))

    return spoil


def truncate(name: str, num_bytes: int) -> Spoil:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:num_bytes])


def write(name: str, content: bytes) -> Spoil:
    return lambda directory: (directory / name).write_bytes(content)


def remove(name: str) -> Spoil:
    return lambda directory: (directory / name).unlink()


REMOTE = {"AutoConfig": "evil.Config", "AutoModelForSeq2SeqLM": "evil.Model"}
BAD_DIRECTORIES: dict[str, tuple[Spoil, str]] = {
    "auto_map": (edit("config.json", auto_map=REMOTE), "'auto_map' asks for code to be run"),
    "auto_map, nested": (edit("config.json", text_config={"x": [{"auto_map": REMOTE}]}), "'auto_map' asks for code"),
    "auto_map of the tokeniser": (edit("tokenizer_config.json", auto_map=REMOTE), "tokenizer_config.json: 'auto_map'"),
    "custom_pipelines": (edit("config.json", custom_pipelines={"t": {"impl": "evil.P"}}), "'custom_pipelines'"),
    "trust_remote_code": (edit("config.json", trust_remote_code=True), "'trust_remote_code'"),
    "custom_generate": (edit("generation_config.json", custom_generate="evil/code"), "'custom_generate'"),
    "kernel from a hub": (edit("config.json", _attn_implementation_internal="evil/kernel"), "code from a hub"),
    "kernel from a hub, public key": (edit("config.json", attn_implementation="evil/kernel"), "code from a hub"),
    "quantised": (
        edit("config.json", quantization_config={"quant_method": "gptq"}),
        "the weights are quantised already",
    ),
    "an adapter": (edit("adapter_config.json", base_model_name_or_path="evil/base"), "an adapter, not a model"),
    "pickle only": (pickled(in_index=False), "only pickled weights: pytorch_model.bin"),
    "pickle in the index": (pickled(in_index=True), "'pytorch_model.bin' is not a safetensors file"),
    "index leads up": (index({"a": "../outside.safetensors"}), "'../outside.safetensors' is not a safetensors file"),
    "index is absolute": (index({"a": "/etc/x.safetensors"}), "'/etc/x.safetensors' is not a safetensors file"),
    "index with backslash": (index({"a": "..\\x.safetensors"}), "is not a safetensors file of this directory"),
    "index names a missing file": (index({"a": "gone.safetensors"}), "'gone.safetensors' is missing"),
    "index maps to numbers": (index({"a": 3}), "`weight_map` must map"),
    "index is empty": (index({}), "`weight_map` must map"),
    "index is a list": (index([]), "`weight_map` must map"),
    "index without metadata": (index_without_metadata, "cannot be built: 'metadata'"),
    "no weights": (remove("model.safetensors"), "there is no model.safetensors"),
    "weights cut off": (truncate("model.safetensors", 5000), "not a whole safetensors file (5000 bytes)"),
    "weights empty": (truncate("model.safetensors", 0), "not a whole safetensors file (0 bytes)"),
    "weights are a pickle": (write("model.safetensors", pickle.dumps({"a": 1})), "not a whole safetensors file"),
    "no config.json": (remove("config.json"), "config.json"),
    "config.json cut off": (truncate("config.json", 40), "not JSON"),
    "config.json is a list": (write("config.json", b"[1]"), "not a JSON object"),
    "config.json is not UTF-8": (write("config.json", b"\xff\xfe{}"), "not UTF-8"),
    "config.json with a wrong type": (edit("config.json", d_model="big"), "not a valid configuration"),
    "config.json of another shape": (edit("config.json", encoder_ffn_dim=48), "weights do not fit config.json"),
    "config.json with a layer more": (edit("config.json", encoder_layers=3), "weights do not fit config.json"),
    "config.json with impossible heads": (
        edit("config.json", encoder_attention_heads=5),
        "embed_dim must be divisible",
    ),
    "other model type": (edit("config.json", model_type="llama"), "model type 'llama' is not supported"),
    "no model type": (edit("config.json", model_type=...), "model type None is not supported"),
    "no tokeniser": (remove("tokenizer.json"), "there is no tokeniser"),
    "tokenizer.json cut off": (truncate("tokenizer.json", 500), "the tokeniser cannot be read"),
    "tokenizer_config.json cut off": (truncate("tokenizer_config.json", 50), "not JSON"),
    "tokeniser too big": (edit("config.json", vocab_size=200), "the tokeniser has the id 329"),
    "other padding": (edit("config.json", pad_token_id=0), "pad_token_id is 1 in the tokeniser and 0 in config.json"),
    "other end of sentence": (edit("config.json", eos_token_id=5), "eos_token_id is 2 in the tokeniser and 5"),
}


@pytest.mark.parametrize("case", BAD_DIRECTORIES)
def test_bad_model_directories_are_refused(case: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_models["mbart"], directory)
    spoil, message = BAD_DIRECTORIES[case]
    spoil(directory)
    before = sorted(path.name for path in directory.iterdir())
    with pytest.raises(HarnessError) as error:
        load_everything(directory)
    assert message in str(error.value)
    assert error.value.exit_code == 3
    assert error.value.where
    assert sorted(path.name for path in directory.iterdir()) == before


def test_an_nllb_tokeniser_without_its_tags_order_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_models["nllb"], tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    shutil.copy(tiny_models["marian"] / "source.spm", tmp_path / "model" / "sentencepiece.bpe.model")
    with pytest.raises(DataError, match=r"needs its tokenizer\.json"):
        load_family(tmp_path / "model")


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such model directory"):
        screen_model_directory(tmp_path / "nothing", weights=True)


def test_good_directories_pass(tiny_models: dict[str, Path]) -> None:
    for directory in tiny_models.values():
        assert screen_model_directory(directory, weights=True)["model_type"]


def test_weights_are_not_needed_for_a_random_model(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_models["mbart"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert screen_model_directory(tmp_path / "model", weights=False)["model_type"] == "mbart"


def test_a_sharded_model_passes_and_loads(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    whole = load_model(ModelConfig(path=str(tiny_models["mbart"])), seed=0)
    shutil.copytree(tiny_models["mbart"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    whole.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    sharded = load_model(ModelConfig(path=str(tmp_path / "model")), seed=0).state_dict()
    assert all((value == sharded[name]).all() for name, value in whole.state_dict().items())
