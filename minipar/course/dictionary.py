"""What other frameworks call it: their flags and names beside minipar's, and a reader of Megatron-LM's command lines.

Cells were checked in November 2026 against the frameworks' documentation and source, SOURCES first, and names that are
not there against code that uses them. An empty cell: we found no flag or name that does the same.
"""

import re
import shlex
from typing import NamedTuple


class Row(NamedTuple):
    """One thing, and what each framework calls it. minipar: a Mesh, options of parallelize, or a name."""

    what: str
    minipar: str
    megatron: str = ""
    deepspeed: str = ""
    torchtitan: str = ""
    accelerate: str = ""
    jax: str = ""
    tensorflow: str = ""


FRAMEWORKS = {
    "megatron": "Megatron-LM",
    "deepspeed": "DeepSpeed",
    "torchtitan": "torchtitan",
    "accelerate": "accelerate",
    "jax": "JAX",
    "tensorflow": "TensorFlow",
}

SOURCES = {
    "megatron": "https://docs.nvidia.com/megatron-core/developer-guide/latest/user-guide/parallelism-guide.html",
    "deepspeed": "https://www.deepspeed.ai/docs/config-json/",
    "torchtitan": "https://github.com/pytorch/torchtitan/blob/main/torchtitan/config/parallelism.py",
    "accelerate": "https://github.com/huggingface/accelerate/blob/main/src/accelerate/parallelism_config.py",
    "jax": "https://docs.jax.dev/en/latest/jax.sharding.html",
    "tensorflow": "https://www.tensorflow.org/api_docs/python/tf/experimental/dtensor",
}

ROWS = [
    Row(
        "the grid of devices",
        "Mesh(dp=2, tp=4)",
        "the sizes together",
        "the sizes together",
        "ParallelDims",
        "ParallelismConfig.build_device_mesh",
        "jax.sharding.Mesh",
        "dtensor.create_mesh",
    ),
    Row(
        "tensor ranks",
        "Mesh(tp=4)",
        "--tensor-model-parallel-size 4",
        '"tensor_parallel": {"autotp_size": 4}',
        "parallelism.tensor_parallel_degree",
        "ParallelismConfig(tp_size=4)",
        "PartitionSpec for each weight",
        "dtensor.Layout for each weight",
    ),
    Row(
        "pipeline stages",
        "Mesh(pp=4)",
        "--pipeline-model-parallel-size 4",
        "PipelineModule(layers, num_stages=4)",
        "parallelism.pipeline_parallel_degree",
        "",
        "shard_map and jax.lax.ppermute",
    ),
    Row(
        "data ranks, all with the whole model",
        "Mesh(dp=4)",
        "what is left of the ranks",
        "what is left of the ranks",
        "parallelism.data_parallel_replicate_degree",
        "ParallelismConfig(dp_replicate_size=4)",
        "PartitionSpec for the batch",
        "tf.distribute.MultiWorkerMirroredStrategy",
    ),
    Row(
        "optimizer states shared out",
        "zero=1",
        "--use-distributed-optimizer",
        '"zero_optimization": {"stage": 1}',
        accelerate="DeepSpeedPlugin(zero_stage=1)",
        jax="NamedSharding for the optimizer's state",
    ),
    Row(
        "parameters shared out, too",
        "zero=3",
        "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params",
        '"zero_optimization": {"stage": 3}',
        "parallelism.data_parallel_shard_degree",
        "ParallelismConfig(dp_shard_size=4)",
        "NamedSharding for parameters",
        "dtensor.Layout for parameters",
    ),
    Row(
        "positions of a row shared out",
        "Mesh(cp=2)",
        "--context-parallel-size 2",
        "deepspeed.sequence.layer.DistributedAttention",
        "parallelism.context_parallel_degree",
        "ParallelismConfig(cp_size=2)",
        "shard_map and jax.lax.ppermute",
    ),
    Row(
        "between cut layers, parts of the sequence",
        "sequence_parallel=True",
        "--sequence-parallel",
        "",
        "parallelism.enable_sequence_parallel, on by default",
    ),
    Row(
        "experts shared out",
        "Mesh(ep=8)",
        "--expert-model-parallel-size 8",
        "deepspeed.moe.layer.MoE(ep_size=8)",
        "parallelism.expert_parallel_degree",
        "",
        "shard_map and jax.lax.all_to_all",
    ),
    Row("how many experts", "Config(experts=64)", "--num-experts 64", "deepspeed.moe.layer.MoE(num_experts=64)"),
    Row(
        "microbatches",
        "microbatches=8",
        "--global-batch-size over --micro-batch-size and data ranks",
        '"gradient_accumulation_steps"',
        "parallelism.num_pp_microbatches",
        "Accelerator(gradient_accumulation_steps=8)",
    ),
    Row(
        "one forward, one backward",
        "schedule=one_f_one_b",
        "the default",
        "PipelineModule's own",
        'parallelism.pipeline_parallel_schedule "1F1B"',
    ),
    Row(
        "several thin stages a rank",
        "schedule=interleaved",
        "--num-layers-per-virtual-pipeline-stage 4",
        "",
        'parallelism.pipeline_parallel_schedule "Interleaved1F1B"',
    ),
    Row(
        "zero bubble, folded",
        "schedule=zero_bubble_v",
        torchtitan='parallelism.pipeline_parallel_schedule "ZBVZeroBubble"',
    ),
    Row(
        "recompute whole blocks",
        'recompute="full"',
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        '"activation_checkpointing"',
        'activation_checkpoint.mode "full"',
        "FullyShardedDataParallelPlugin(activation_checkpointing=True)",
        "jax.checkpoint",
        "tf.recompute_grad",
    ),
    Row(
        "recompute what is cheap",
        'recompute="selective"',
        "--recompute-granularity selective",
        "",
        'activation_checkpoint.mode "selective"',
        "",
        "jax.checkpoint(policy=...)",
    ),
    Row(
        "products in 16 bits",
        "dtype=torch.bfloat16",
        "--bf16",
        '"bf16": {"enabled": true}',
        "training.mixed_precision_param",
        'Accelerator(mixed_precision="bf16")',
        tensorflow='tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")',
    ),
    Row(
        "gradients clipped",
        "model.clip_gradients(1.0)",
        "--clip-grad 1.0",
        '"gradient_clipping": 1.0',
        "training.max_norm",
        "Accelerator.clip_grad_norm_",
        "optax.clip_by_global_norm",
        "tf.clip_by_global_norm",
    ),
    Row(
        "sums hidden behind backward",
        "always, see data.Gradients",
        "--overlap-grad-reduce",
        '"zero_optimization": {"overlap_comm": true}',
        "",
        "",
        "the compiler's choice",
        "the strategy's choice",
    ),
    Row(
        "a sum over ranks, by hand",
        "collectives.all_reduce",
        "torch.distributed.all_reduce",
        "deepspeed.comm.all_reduce",
        "torch.distributed.all_reduce",
        "Accelerator.reduce",
        "jax.lax.psum",
        "ReplicaContext.all_reduce",
    ),
]

# Megatron-LM's flags: name -> what it says here. Those without a value are True.
SIZES = {
    "tensor-model-parallel-size": "tp",
    "pipeline-model-parallel-size": "pp",
    "context-parallel-size": "cp",
    "expert-model-parallel-size": "ep",
}


def lookup(word: str) -> list[Row]:
    """The rows that have this word in any cell."""
    return [row for row in ROWS if any(word.lower() in cell.lower() for cell in row)]


def read_megatron(command: str, ranks: int) -> tuple[dict[str, int], dict[str, object]]:
    """What a Megatron-LM command line on so many ranks means here: the axes of a Mesh, the options of parallelize.

    schedule and dtype are given by name. Flags that parallelize has nothing to do with are left out.
    Raises ValueError where the sizes do not fit the ranks, or the batch the data ranks.
    """
    flags: dict[str, str] = {}
    for word, after in zip(words := shlex.split(command), [*words[1:], "--"], strict=False):
        if found := re.fullmatch(r"--([\w-]+?)(?:=(.*))?", word):
            flags[found[1].replace("_", "-")] = found[2] or ("" if after.startswith("--") else after)
    axes = {axis: int(flags.get(flag, 1)) for flag, axis in SIZES.items()}
    experts = axes["ep"]  # Megatron takes them out of the data ranks; here they are an axis beside dp
    rest = axes["tp"] * axes["pp"] * axes["cp"]
    if ranks % (rest * experts):
        raise ValueError(f"{ranks} ranks are no multiple of {rest * experts}, the product of the sizes")
    axes["dp"] = ranks // (rest * experts)
    options: dict[str, object] = {}
    if "global-batch-size" in flags and "micro-batch-size" in flags:
        rows, each = int(flags["global-batch-size"]), int(flags["micro-batch-size"]) * axes["dp"] * experts
        if rows % each:
            raise ValueError(f"{rows} rows are no multiple of {each}, a microbatch on each data rank")
        options["microbatches"] = rows // each
    interleaved = "num-layers-per-virtual-pipeline-stage" in flags
    if axes["pp"] > 1:
        options["schedule"] = "interleaved" if interleaved else "one_f_one_b"
    if "use-distributed-optimizer" in flags:
        options["zero"] = 1
    strategies = {"optim": 1, "optim-grads": 2, "optim-grads-params": 3}
    if stage := strategies.get(flags.get("data-parallel-sharding-strategy", "").replace("_", "-")):
        options["zero"] = stage
    if "sequence-parallel" in flags:
        options["sequence_parallel"] = True
    if "recompute-granularity" in flags:
        options["recompute"] = flags["recompute-granularity"]
    if "recompute-activations" in flags:
        options["recompute"] = "selective"
    for flag, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if flag in flags:
            options["dtype"] = name
    return axes, options
