"""The spec of `QLoRAFinetune` (`qlora.dev/v1alpha1`): the CRD's only source. Its status stands in status.py.

Rules: every field has a unit, bounds and a default that trains well; whatever can be refused is refused by the API
server itself (bounds, patterns, CEL) with a sentence that says what to write instead; what defines the result of a run
(model, dataset, quantization, lora, training, output) cannot change once the run exists.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from qlora_api.base import ApiModel, cel, rules
from qlora_api.pod import GPU, PodTemplatePatch, ResourcesPerNode

SOURCE_URI = r"^(hf|s3|pvc|file)://[^\s]+$"
S3_URI = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s]*)?$"

SOURCE: dict[str, Any] = {"x-sentence": "write hf://org/name, s3://bucket/path, pvc://claim/path or file:///path"}
S3_SOURCE: dict[str, Any] = {"x-sentence": "write s3://bucket/prefix; a bucket has 3 to 63 of a-z, 0-9, dot and hyphen"}
ENDPOINT: dict[str, Any] = {"x-sentence": "write http://host:port or https://host:port"}


def immutable(field: str) -> dict[str, Any]:
    """Schema extra: the field cannot change while the run exists."""
    return rules(
        cel("self == oldSelf", f"{field} cannot change during a run: create a new QLoRAFinetune with the new {field}")
    )


class SecretRef(ApiModel):
    """A Secret of the run's namespace, mounted into the trainer; the operator never reads it."""

    name: str = Field(min_length=1, max_length=253, description="Name of the Secret.")


class S3Access(ApiModel):
    """How to reach the object store behind an `s3://` URI."""

    secret_ref: SecretRef | None = Field(
        None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, when needed, AWS_ENDPOINT_URL and"
        " AWS_REGION (HF_TOKEN for hf://). Empty: the pod's own identity.",
    )
    endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s]+$",
        max_length=512,
        json_schema_extra=ENDPOINT,
        description="S3 endpoint, for example http://s3.example:8333.",
    )


class ModelSpec(S3Access):
    """The base model: a causal language model of transformers in safetensors (or one GGUF file)."""

    uri: str = Field(
        pattern=SOURCE_URI,
        max_length=1024,
        json_schema_extra=SOURCE,
        description="hf://org/name, s3://bucket/prefix, pvc://claim/path or file:///path in the image.",
    )
    revision: str | None = Field(None, max_length=256, description="Commit, tag or branch of an hf:// model.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository carries.")


class DatasetSpec(S3Access):
    """Training and evaluation samples: JSON Lines, Parquet or CSV files, or a dataset of the hub."""

    uri: str = Field(
        pattern=SOURCE_URI,
        max_length=1024,
        json_schema_extra=SOURCE,
        description="A file, a prefix of files, or hf://org/name.",
    )
    revision: str | None = Field(None, max_length=256, description="Commit, tag or branch of an hf:// dataset.")
    format: Literal["auto", "text", "prompt-completion", "messages"] = Field(
        "auto", description="Shape of a sample, as in TRL; auto looks at the columns."
    )
    text_field: str = Field("text", min_length=1, max_length=128, description="Column of format text.")
    train_on: Literal["auto", "all", "completion", "assistant"] = Field(
        "auto",
        description="Tokens that count in the loss; auto: the completion of prompt-completion, all of other formats.",
    )
    eval_uri: str | None = Field(
        None, pattern=SOURCE_URI, max_length=1024, json_schema_extra=SOURCE, description="Samples for evaluation."
    )
    eval_fraction: float = Field(
        0.0, ge=0, le=0.5, description="Share of the training samples held out for evaluation when evalUri is empty."
    )


class QuantizationSpec(ApiModel):
    """How the frozen base is stored (bitsandbytes' formats, block size 64)."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            cel(
                "self.storageDtype == self.computeDtype",
                "storageDtype must equal computeDtype: set both to bfloat16 (or both to float16 or float32)",
            )
        )
    )
    type: Literal["nf4", "fp4", "none"] = Field("nf4", description="4-bit format; none keeps computeDtype.")
    double_quant: bool = Field(True, description="Quantize the scales, too (saves 0.37 bit a parameter).")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Type of the products.")
    storage_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Type of what is not quantized (embeddings, norms, head)."
    )


class LoraSpec(ApiModel):
    """The adapter; names as in PEFT's LoraConfig."""

    r: int = Field(16, ge=1, le=512, description="Rank of the adapter.")
    alpha: float = Field(32, gt=0, le=4096, description="Scale: alpha / r (alpha / sqrt(r) with useRslora).")
    dropout: float = Field(0.0, ge=0, le=0.9, description="Dropout on the adapter's input.")
    target_modules: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        ["all-linear"], min_length=1, max_length=64, description="Module name suffixes, or all-linear."
    )
    use_rslora: bool = Field(False, description="Rank-stabilized scale (arXiv:2312.03732).")
    use_dora: bool = Field(False, description="Weight-decomposed adapter (arXiv:2402.09353).")
    lora_plus_ratio: float = Field(
        1.0, ge=1, le=64, description="Learning rate of B over that of A (LoRA+, arXiv:2402.12354)."
    )
    freeze_a: bool = Field(False, description="Train B alone (LoRA-FA, arXiv:2308.03303).")


class TrainingSpec(ApiModel):
    """The optimization. Global batch, order and schedule do not depend on the number of nodes."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            cel(
                "!has(self.microBatchSize) || self.globalBatchSize % self.microBatchSize == 0",
                "globalBatchSize must be a multiple of microBatchSize",
            )
        )
    )
    max_steps: int | None = Field(None, ge=1, le=10_000_000, description="Optimizer steps; wins over epochs.")
    epochs: float = Field(1.0, gt=0, le=1000, description="Passes over the training samples.")
    global_batch_size: int = Field(16, ge=1, le=65536, description="Sequences an optimizer step, over all nodes.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Sequences a forward pass; empty: up to 8192 tokens that fit the GPU and leave one for every GPU.",
    )
    max_length: int = Field(2048, ge=8, le=1_048_576, description="Tokens a sequence; longer samples are cut.")
    packing: bool = Field(True, description="Fill sequences with several samples, each attending to itself only.")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warm-up.")
    warmup_ratio: float = Field(0.03, ge=0, le=0.5, description="Share of the steps that warm up linearly.")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="8-bit forms need CUDA; the paged one runs on one GPU only, it cannot be checkpointed sharded.",
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    max_grad_norm: float = Field(1.0, ge=0, le=1e6, description="Gradient clipping by global norm; 0: off.")
    seed: int = Field(42, ge=0, le=2**31 - 1, description="Data order, initialization and dropout follow from it.")
    eval_interval_steps: int | None = Field(
        None, ge=1, le=1_000_000, description="Steps between evaluations; empty: at the start and at the end."
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Stop after so many evaluations without a better loss and publish the adapter of the best one.",
    )
    neftune_noise_alpha: float | None = Field(None, gt=0, le=100, description="NEFTune noise (arXiv:2310.05914).")
    gradient_checkpointing: Literal["auto", "full", "none"] = Field(
        "auto", description="Recompute activations; auto: only as far as memory asks for."
    )
    sharding_strategy: Literal["auto", "FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"] = Field(
        "auto",
        description="How the base is spread over the GPUs; auto: whole on each while it fits, else FULL_SHARD, else"
        " that with cpuOffload.",
    )
    cpu_offload: bool = Field(False, description="Keep the sharded base in host memory.")


class ElasticPolicy(ApiModel):
    """The run starts at minNodes, grows to maxNodes when nodes come, shrinks and goes on when they go."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            cel(
                # Below 1 the bound of maxNodes speaks, with better advice.
                "self.maxNodes < 1 || self.minNodes <= self.maxNodes",
                "minNodes must not exceed maxNodes: lower minNodes or raise maxNodes",
            )
        )
    )
    min_nodes: int = Field(1, ge=1, le=512, description="Fewest nodes to train on; below it the run waits.")
    max_nodes: int = Field(
        1,
        ge=1,
        le=512,
        json_schema_extra={
            "x-sentence": "write at least 1; to stop the run and free its GPUs set spec.suspend to true"
        },
        description="Most nodes to train on; kubectl scale sets it.",
    )


class FailurePolicy(ApiModel):
    """Disruptions (lost nodes, evictions) are free; failures of the application count."""

    max_failures: int = Field(3, ge=0, le=1000, description="Failures allowed within windowSeconds.")
    window_seconds: int = Field(3600, ge=1, le=604_800, description="Length of the window in seconds.")


class CheckpointSpec(ApiModel):
    """The durable tier. The step snapshot in the pods' memory needs no setting."""

    interval_steps: int | None = Field(
        None, ge=1, le=1_000_000, description="Steps between checkpoints; empty: continuously, see intervalSeconds."
    )
    interval_seconds: int = Field(
        60, ge=1, le=86_400, description="Seconds between checkpoints when intervalSteps is empty."
    )
    keep: int = Field(2, ge=1, le=100, description="Complete checkpoints kept.")


class OutputSpec(S3Access):
    """Where the adapter and the checkpoints go."""

    uri: str = Field(
        pattern=S3_URI,
        max_length=1024,
        json_schema_extra=S3_SOURCE,
        description="s3://bucket/prefix; the run writes below prefix/NAME-UID8 (eight characters of its uid).",
    )
    merge: bool = Field(False, description="Write the base with the adapter merged into it, too (bf16 safetensors).")


class QLoRAFinetuneSpec(ApiModel):
    """One fine-tune: what to train, on what, and where the adapter goes."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            cel(
                "self.training.optimizer != 'paged_adamw_8bit'"
                " || (self.numProcPerNode == 1 && self.elasticPolicy.maxNodes == 1)",
                "paged_adamw_8bit runs on one GPU only, its state cannot be checkpointed when sharded:"
                " write adamw or adamw_8bit, or set numProcPerNode and elasticPolicy.maxNodes to 1",
            ),
            cel(
                # No whole number: pod.py's rule speaks. 0: a run on CPUs.
                f"!('{GPU}' in self.resourcesPerNode.limits)"
                f" || !string(self.resourcesPerNode.limits['{GPU}']).matches('^[0-9]{{1,6}}$')"
                f" || int(self.resourcesPerNode.limits['{GPU}']) == 0"
                f" || int(self.resourcesPerNode.limits['{GPU}']) >= self.numProcPerNode",
                f"every worker needs a GPU of its own: raise resourcesPerNode.limits['{GPU}'] or lower numProcPerNode",
            ),
            cel(
                "!has(self.training.earlyStoppingPatience) || (has(self.training.evalIntervalSteps)"
                " && (has(self.dataset.evalUri) || self.dataset.evalFraction > 0.0))",
                "earlyStoppingPatience needs evaluations: set training.evalIntervalSteps, and dataset.evalUri or"
                " dataset.evalFraction",
            ),
            cel(
                "!(self.training.cpuOffload && self.training.shardingStrategy == 'NO_SHARD')",
                "cpuOffload keeps the sharded base in host memory: set shardingStrategy to auto or FULL_SHARD",
            ),
        )
    )
    model: ModelSpec = Field(json_schema_extra=immutable("model"))
    dataset: DatasetSpec = Field(json_schema_extra=immutable("dataset"))
    quantization: QuantizationSpec = Field(QuantizationSpec(), json_schema_extra=immutable("quantization"))
    lora: LoraSpec = Field(LoraSpec(), json_schema_extra=immutable("lora"))
    training: TrainingSpec = Field(TrainingSpec(), json_schema_extra=immutable("training"))
    checkpoint: CheckpointSpec = CheckpointSpec()
    output: OutputSpec = Field(json_schema_extra=immutable("output"))
    elastic_policy: ElasticPolicy = ElasticPolicy()
    num_proc_per_node: int = Field(1, ge=1, le=16, description="Worker processes a node, one for each GPU.")
    resources_per_node: ResourcesPerNode = ResourcesPerNode()
    failure_policy: FailurePolicy = FailurePolicy()
    suspend: bool = Field(False, description="True stops at a step boundary, saves and releases the GPUs.")
    active_deadline_seconds: int | None = Field(
        None, ge=1, description="Seconds from the start or the last resumption; then Failed."
    )
    start_deadline_seconds: int | None = Field(
        None, ge=1, description="Seconds to get minNodes warm from creation or resumption; then Failed."
    )
    progress_deadline_seconds: int = Field(
        1800,
        ge=10,
        le=604_800,
        description="Seconds without any sign of work after which the workers are restarted, at the latest.",
    )
    ttl_seconds_after_finished: int | None = Field(
        None, ge=0, description="Seconds after which a finished run is deleted; the adapter in S3 stays."
    )
    image: str | None = Field(None, max_length=512, description="Trainer image; empty: the operator's default.")
    pod_template: PodTemplatePatch = PodTemplatePatch()
