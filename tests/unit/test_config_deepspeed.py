"""Presets and DeepSpeed files, against DeepSpeed itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.config import deepspeed_keys as keys
from harness.config.deepspeed import PRESET_DIRECTORY, merged_document, owned_values, preset_names
from harness.config.load import load_run_config
from harness.config.schema import DeepSpeedConfig
from harness.plan.deepspeed import final_deepspeed_config
from harness.plan.zero import offload_device, zero_stage
from tests.run_files import write_run_file

PRESETS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_nvme", "zero3_offload")


def test_the_presets() -> None:
    assert tuple(preset_names()) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_deepspeed_accepts_each_preset_as_it_is(preset: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeedsOwnConfig

    document = json.loads((PRESET_DIRECTORY / f"{preset}.json").read_text())
    accepted = DeepSpeedsOwnConfig(document)
    assert accepted.zero_optimization_stage == zero_stage(document) == int(preset[4])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_deepspeed_accepts_each_final_configuration(preset: str, dtype: str, tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeedsOwnConfig

    path = write_run_file(tmp_path, ("bfloat16", dtype), ("{preset: zero2}", f"{{preset: {preset}, nvme_path: /nvme}}"))
    config = load_run_config(path, ["optimizer.clip_norm=0.5"], accelerator="cuda")
    accepted = DeepSpeedsOwnConfig(final_deepspeed_config(config, 1))
    assert accepted.gradient_clipping == 0.5
    assert (accepted.bfloat16_config.enabled, accepted.float16_config.enabled) == (
        dtype == "bfloat16",
        dtype == "float16",
    )
    assert accepted.train_micro_batch_size_per_gpu == accepted.gradient_accumulation_steps == 1
    assert accepted.optimizer_name is None
    assert accepted.scheduler_name is None
    for offload in (accepted.zero_config.offload_optimizer, accepted.zero_config.offload_param):
        if preset == "zero3_nvme":
            assert str(offload.nvme_path) == "/nvme"


def test_no_clipping_is_told_to_deepspeed_whose_default_is_one(tmp_path: Path) -> None:
    config = load_run_config(write_run_file(tmp_path), ["optimizer.clip_norm=null"])
    assert final_deepspeed_config(config, 4)["gradient_clipping"] == 0.0


def test_our_tables_of_keys_are_deepspeeds() -> None:
    from deepspeed.runtime import config as deepspeed_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    assert set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS) == keys.REMOVED
    assert set(deepspeed_config._REMOVED_ZERO_CONFIG_KEYS) == keys.REMOVED_ZERO
    fields = {info.alias or name for name, info in DeepSpeedZeroConfig.model_fields.items()}
    assert fields == keys.ZERO | set(keys.UNSUPPORTED_ZERO)
    assert set(DeepSpeedZeroOffloadParamConfig.model_fields) == keys.OFFLOAD["offload_param"]
    unsupported = {"super_offload"}
    assert set(DeepSpeedZeroOffloadOptimizerConfig.model_fields) - unsupported == keys.OFFLOAD["offload_optimizer"]


def test_a_file_may_repeat_what_the_run_file_says_or_leave_it_open(tmp_path: Path) -> None:
    document = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(document))
    config = load_run_config(write_run_file(tmp_path, ("zero2", str(tmp_path / "ds.json"))))
    final = final_deepspeed_config(config, 2)
    assert final["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert final["train_batch_size"] == 2
    assert "fp16" not in final
    assert {**final, **owned_values(config)} == final


def test_overrides_are_merged_key_by_key_and_null_removes_one() -> None:
    overrides = {"zero_optimization": {"overlap_comm": None, "reduce_bucket_size": 7}, "steps_per_print": 5}
    merged = merged_document(DeepSpeedConfig(preset="zero2", overrides=overrides))
    plain = merged_document(DeepSpeedConfig(preset="zero2"))
    assert "overlap_comm" not in merged["zero_optimization"]
    assert merged["zero_optimization"]["reduce_bucket_size"] == 7
    assert merged["zero_optimization"]["reduce_scatter"] is True
    assert merged["steps_per_print"] == 5
    assert plain["zero_optimization"]["overlap_comm"] is True, "the preset itself is not changed"


def test_the_placeholder_path_of_the_nvme_preset_is_never_used() -> None:
    assert (
        "nvme_path" not in merged_document(DeepSpeedConfig(preset="zero3_nvme"))["zero_optimization"]["offload_param"]
    )
    own = DeepSpeedConfig(preset="zero3_nvme", nvme_path="/fast")
    assert merged_document(own)["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/fast"


def test_reading_offload_and_stage() -> None:
    assert zero_stage({}) == 0
    assert offload_device({"zero_optimization": {"offload_param": None}}, "param") == "none"
    offloaded = merged_document(DeepSpeedConfig(preset="zero3_offload"))
    assert (zero_stage(offloaded), offload_device(offloaded, "optimizer")) == (3, "cpu")
