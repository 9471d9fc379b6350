"""Right run files: YAML 1.2, overrides, defaults; and that every key of the schema is in the manual."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config.document import parse_value
from harness.config.load import load_run_config
from harness.config.nearest import nearest
from harness.config.reference import reference
from harness.errors import ConfigError
from tests.run_files import write_run_file

ROOT = Path(__file__).parents[2]


def test_yaml_1_2(tmp_path: Path) -> None:
    path = write_run_file(tmp_path, ("target_language: ro_RO", "target_language: no"), ("3e-5", "1e-4"))
    config = load_run_config(path)
    assert config.data.target_language == "no", "Norwegian, not False"
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.betas == (0.9, 0.98)


def test_anchors_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write_run_file(
        tmp_path, ("max_source_length: 128", "max_source_length: &n 64"), ("length: 128", "length: *n")
    )
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert load_run_config(path).data.max_target_length == 64


def test_overrides_apply_in_order_and_reach_into_lists_and_new_sections(tmp_path: Path) -> None:
    config = load_run_config(
        write_run_file(tmp_path),
        [
            "optimizer.lr=1",
            "optimizer.lr=1e-4",
            "data.train=[{path: x.tsv}, {source: a, target: b}]",
            "data.train.1.weight=2.5",
            "early_stopping.patience=3",
            "loss.label_smoothing=0.2",
            "model.path=dir=with=signs",
            "data.source_prefix='a: b '",
        ],
    )
    assert config.optimizer.lr == 1e-4
    assert [source.weight for source in config.data.train] == [1.0, 2.5]
    assert config.early_stopping is not None
    assert config.early_stopping.patience == 3
    assert config.model.path == "dir=with=signs"
    assert config.data.source_prefix == "a: b "


def test_null_switches_a_section_off_and_a_key_turns_it_on_again(tmp_path: Path) -> None:
    path = write_run_file(tmp_path)
    assert load_run_config(path, ["evaluation=null"]).evaluation is None
    config = load_run_config(path, ["evaluation=null", "evaluation.beam_size=2"])
    assert config.evaluation is not None
    assert (config.evaluation.beam_size, config.evaluation.every_steps) == (2, None)


def test_float16_is_right_on_a_gpu(tmp_path: Path) -> None:
    path = write_run_file(tmp_path, ("bfloat16", "float16"))
    assert load_run_config(path, accelerator="cuda").model.dtype == "float16"
    with pytest.raises(ConfigError, match="not possible on a CPU"):
        load_run_config(path, accelerator="cpu")


def test_flash_attention_needs_half_precision_on_a_gpu_too(tmp_path: Path) -> None:
    path = write_run_file(tmp_path, ("dtype: bfloat16", "attention: flash_attention_2"))
    with pytest.raises(ConfigError, match="has no float32"):
        load_run_config(path, accelerator="cuda")


@given(text=st.text(max_size=60))
def test_no_text_breaks_the_reader(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        load_run_config(path)


@given(text=st.text(max_size=60))
def test_no_override_value_breaks_the_reader(text: str) -> None:
    with suppress(ConfigError):
        parse_value(text)


def test_the_nearest_name() -> None:
    assert nearest("LR", ["lr", "eps"]) == "lr"
    assert nearest("keep-last", ["keep_last", "keep_best"]) == "keep_last"
    assert nearest("rl", ["lr", "eps"]) == "lr"
    assert nearest("zzz", ["lr", "eps"]) is None


def test_the_manual_is_up_to_date() -> None:
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == reference(), "run `make docs`"


def test_the_schema_covers_the_run_file() -> None:
    from harness.config.schema import RunConfig

    schema = RunConfig.model_json_schema()
    assert set(schema["required"]) == {"name", "model", "data", "batch", "optimizer", "schedule"}
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema
