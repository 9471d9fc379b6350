"""What each key of a DeepSpeed file is to us: ours (the run file decides), supported, unsupported or removed.

DeepSpeed (0.19) refuses unknown keys inside ``zero_optimization`` only when the ranks start, and silently accepts
unknown top-level keys; these tables let ``harness check`` name both at once. A test compares them with the
installed DeepSpeed.
"""

from __future__ import annotations

# Keys that the run file decides, and where.
OWNED: dict[str, str] = {
    "train_batch_size": "set `batch.tokens_per_step`",
    "train_micro_batch_size_per_gpu": "set `batch.max_tokens_per_device`",
    "gradient_accumulation_steps": "set `batch.tokens_per_step` and `batch.max_tokens_per_device`",
    "managed_gradient_accumulation": "the training loop accumulates gradients",
    "gradient_clipping": "set `optimizer.clip_norm`",
    "gradient_allreduce_op": "gradients are divided by the step's number of target tokens",
    "bf16": "set `model.dtype`",
    "bfloat16": "set `model.dtype`",
    "fp16": "set `model.dtype`",
    "torch_autocast": "set `model.dtype`",
    "optimizer": "set the section `optimizer`",
    "scheduler": "set the section `schedule`",
    "zero_allow_untested_optimizer": "set the section `optimizer`",
    "zero_force_ds_cpu_optimizer": "set the section `optimizer`",
}

SUPPORTED: frozenset[str] = frozenset(
    {
        "zero_optimization", "activation_checkpointing", "aio", "checkpoint", "comms_logger", "communication_data_type",
        "compile", "csv_monitor", "comet", "data_types", "disable_allgather", "disable_python_gc", "dump_state",
        "flops_profiler", "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients",
        "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown", "wandb",
    }
)  # fmt: skip

UNSUPPORTED: dict[str, str] = {
    "tensor_parallel": "tensor parallelism is not supported",
    "sequence_parallel_size": "sequence parallelism is not supported",
    "seq_parallel_communication_data_type": "sequence parallelism is not supported",
    "expert_parallel": "expert parallelism is not supported",
    "use_data_before_expert_parallelism": "expert parallelism is not supported",
    "pipeline": "pipeline parallelism is not supported",
    "hybrid_engine": "the hybrid engine is not supported",
    "autotuning": "use `harness plan` to choose a stage",
    "data_efficiency": "the run file's `data` and `batch` decide the rows",
    "dataloader_drop_last": "every row is used exactly once per epoch",
    "datastates_ckpt": "checkpoints are written by harness itself",
    "weight_quantization": "weight quantisation through DeepSpeed is not supported",
}

# Removed in DeepSpeed 0.19: it refuses them when the ranks start.
REMOVED: frozenset[str] = frozenset(
    {
        "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
        "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
    }
)  # fmt: skip

REMOVED_ZERO: frozenset[str] = frozenset({"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"})

UNSUPPORTED_ZERO: dict[str, str] = {
    "cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": 'write "pin_memory" inside "offload_optimizer" and "offload_param"',
    "zenflow": "ZenFlow changes the optimizer's arithmetic and is not supported",
    "compute_grad_norm": "every step is guarded by its gradient norm: remove it",
    "elastic_checkpoint": "harness writes its own checkpoints, which fit any number of ranks",
}

ZERO: frozenset[str] = frozenset(
    {
        "stage", "allgather_bucket_size", "allgather_partitions", "contiguous_gradients",
        "enable_sanity_checks", "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights",
        "log_trace_cache_warnings", "memory_efficient_linear", "offload_optimizer", "offload_param", "overlap_comm",
        "override_module_apply", "parameter_alignment", "pipeline_loading_checkpoint", "reduce_bucket_size",
        "reduce_scatter", "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "sub_group_size",
        "use_multi_rank_bucket_allreduce", "zero_hpz_partition_size", "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights", "zero_quantized_weights", "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
    }
)  # fmt: skip

OFFLOAD: dict[str, frozenset[str]] = {
    "offload_param": frozenset({"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}),
    "offload_optimizer": frozenset(
        {
            "device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init",
            "ratio", "cpuadam_cores_perc",
        }
    ),
}  # fmt: skip
