"""What DeepSpeed is told, derived from our configuration: no fact is set twice."""

from typing import Any

from lumina.config.schema import Config

# Elements, at most, of the buffer that gradients are reduced through; DeepSpeed's own default would take 2 GB in fp32.
REDUCE_BUCKET = 100_000_000


def deepspeed_config(config: Config, accumulation_steps: int, elements: int) -> dict[str, Any]:
    """The dict for ``deepspeed.initialize``.

    Args:
        accumulation_steps: forward passes of a rank in one optimizer step.
        elements: that a rank trains, before ZeRO shards them.
    """
    bf16 = config.precision == "bf16"
    offload = {"offload_optimizer": {"device": "cpu"}} if config.parallel.offload_optimizer else {}
    return {
        "train_micro_batch_size_per_gpu": 1,  # a forward pass takes packs, which DeepSpeed need not count
        "gradient_accumulation_steps": accumulation_steps,
        # ZeRO 0 in fp32 leaves clipping to our optimizer (see parallel.engine).
        "gradient_clipping": config.train.clip_norm if config.parallel.zero_stage else 0.0,
        "bf16": {"enabled": bf16},
        # Over passes and over ranks gradients add up in fp32: bf16 would lose the small ones, the more the more ranks.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": min(REDUCE_BUCKET, elements),  # allocated whole
            # DeepSpeed gathers a parameter below this size once and keeps it whole; we want none forgotten.
            "stage3_param_persistence_threshold": 0,
            **offload,
        },
        # Ours is torch's AdamW, which runs on a CPU as it does elsewhere.
        "zero_force_ds_cpu_optimizer": False,
        # With tensor parallelism it would cut up what goes from stage to stage, which it can do for one tensor alone.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
