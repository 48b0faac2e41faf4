"""The settings of a run. Every key is listed here once; an unknown key or a wrong type is an error."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Frozen, strict about types (a string is no number, infinity no setting), closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False)


class RunConfig(Section):
    """Where a run lives and what its randomness starts from."""

    dir: str = Field(description="folder of the run: metrics, checkpoints, previews, resolved config")
    seed: int = Field(0, ge=0, description="every random draw of the run is a function of it and of the sample")


class FlowConfig(Section):
    """Probability path, what the network predicts, and how training times are drawn (FLAG-DiT, SiT)."""

    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score"] = "velocity"
    weighting: Literal["none", "velocity", "likelihood"] = Field(
        "none", description="loss weight of noise and score predictions; a velocity prediction takes none"
    )
    time_law: Literal["uniform", "logit_normal"] = "uniform"
    time_shift: float = Field(1.0, gt=0, description="m of t -> t/(t+m-m*t), applied to the drawn time; 1 is no shift")
    epsilon: float | None = Field(
        None, ge=0, lt=0.5, description="training times lie in [epsilon, 1-epsilon]; null takes the path's own"
    )


class TextConfig(Section):
    """The frozen text encoder."""

    encoder: str = Field(
        "bytes",
        description="`bytes`, a transformers text model by name or folder, or `none`: features made beforehand",
    )
    layer: int = Field(-1, description="which hidden state: -1 the last, -2 the one before, …")
    max_tokens: int = Field(128, ge=1, description="captions are cut to this many tokens")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="precision the encoder runs in")
    width: int = Field(64, ge=8, description="feature width of `bytes` and `none`; a transformers model brings its own")


class VaeConfig(Section):
    """The frozen image autoencoder."""

    model: str = Field(
        "identity",
        description="`identity` for pixels, a diffusers AutoencoderKL by name or folder, or `none` for latents made "
        "beforehand",
    )
    factor: int = Field(8, ge=1, description="of `none`: pixels that a row of latents stands for")
    scale: float | None = Field(None, gt=0, description="latents are (z - shift) * scale; null takes the model's own")
    shift: float | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"


class DataSetConfig(Section):
    """One of several data sets that are blended."""

    shards: list[str] = Field(min_length=1, description="as data.shards")
    weight: float = Field(1.0, gt=0, description="how many samples come from it, in proportion to the others")


class StageConfig(Section):
    """From a step on, another resolution."""

    from_step: int = Field(ge=0)
    resolution: int | None = Field(ge=1, description="as data.resolution")


class TrainedConfig(Section):
    """What a model was trained on, as far as its sampler needs it."""

    resolution: int = Field(ge=1, description="pictures have about this many pixels squared")
    frames: int = Field(1, ge=1, description="samples have at most so many frames")


class DataConfig(Section):
    """What is trained on."""

    shards: list[str] = Field(
        default_factory=list, description="tar files, folders of them, URLs, glob patterns or {000..099} ranges"
    )
    sets: list[DataSetConfig] = Field(default_factory=list, description="in place of shards: several sets, blended")
    resolution: int | None = Field(
        None, ge=1, description="pictures are scaled and cropped to about this many pixels squared; null only crops"
    )
    stages: list[StageConfig] = Field(default_factory=list, description="in place of resolution: one after another")
    frames: int = Field(1, ge=1, description="a clip of a video has at most so many frames")
    frame_step: int = Field(1, ge=1, description="every n-th frame of a video")
    crop: Literal["center", "random"] = "center"
    flip: bool = Field(False, description="mirror half of the samples")
    lanes: int | None = Field(
        None, ge=1, description="streams of packs, each over its own shards; null: global_batch_packs when a run starts"
    )
    shuffle_window: int = Field(2048, ge=1, description="samples of a lane that are shuffled among themselves")
    cache_dir: str | None = Field(None, description="folder in which parts of remote shards are kept, one a node")
    cache_gb: float = Field(100.0, gt=0, description="upper bound of that folder, in 10⁹ bytes")
    index_dir: str | None = Field(None, description="folder for the indexes of remote shards without one beside them")
    pipe_programs: list[str] = Field(default_factory=list, description="programs that `pipe:` shards may run")
    pad_channels: bool = Field(
        False, description="latents with fewer channels than model.in_channels are filled up with zeros, not learned"
    )
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of captions (or labels) replaced by none")
    workers: int = Field(0, ge=0, description="processes that read and decode ahead; 0 reads in the trainer")
    bad_samples: float = Field(0.01, ge=0, le=1, description="share of unreadable samples at which the run stops")

    @model_validator(mode="after")
    def _one_of_two(self) -> "DataConfig":
        if bool(self.shards) == bool(self.sets):
            raise ValueError("name what to train on by data.shards, or several sets by data.sets; one of the two")
        if self.stages and self.resolution is not None:
            raise ValueError("data.stages says the resolution of each step; leave data.resolution out")
        return self

    def trained_by(self, step: int) -> TrainedConfig | None:
        """What a run is trained on at a step; None where pictures keep their own size, which only the data tell."""
        begun = [stage for stage in self.stages if stage.from_step <= step]
        resolution = begun[-1].resolution if begun else self.resolution
        return None if resolution is None else TrainedConfig(resolution=resolution, frames=self.frames)


class TrainConfig(Section):
    """Steps and optimizer."""

    steps: int = Field(ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    global_batch_packs: int = Field(1, ge=1, description="packs in one optimizer step, over all ranks")
    tokens_per_pack: int = Field(4096, ge=1, description="upper bound of the tokens of a pack")
    packs_per_forward: int = Field(
        1, ge=1, description="packs a rank runs through the model at once; the rest is gradient accumulation"
    )
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    final_learning_rate: float = Field(0.0, ge=0, description="where cosine and linear end")
    betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(2.0, gt=0, description="largest global gradient norm")
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    skipped_steps_limit: int = Field(3, ge=1, description="so many non-finite steps in a row stop the run")
    init_from: str | None = Field(
        None, description="a new run starts from the weights of this run, checkpoint or model"
    )
    init_weights: Literal["model", "ema"] = Field("model", description="which of its weights, where it has both")
    init_ema: bool = Field(False, description="the average goes on from its average, not from the weights")
    allow_missing: list[str] = Field(
        default_factory=list, description="patterns of tensors that may be missing, left over, or of other shapes"
    )
    new_text_branch: bool = Field(
        False, description="all that reads captions starts anew, and silent: for captions of another encoder or width"
    )

    @field_validator("betas", mode="before")
    @classmethod
    def _betas_from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"both must lie in [0, 1), not {list(value)}")
        return value

    @model_validator(mode="after")
    def _of_init_from(self) -> "TrainConfig":
        told = self.init_weights != "model" or self.init_ema or self.allow_missing or self.new_text_branch
        if self.init_from is None and told:
            raise ValueError(
                "init_weights, init_ema, allow_missing and new_text_branch say how to start from train.init_from; set "
                "it"
            )
        return self


class LoraConfig(Section):
    """Adapters of low rank beside frozen weights, trained in their place (arXiv 2106.09685)."""

    rank: int = Field(16, ge=1, description="of the product B·A that an adapter adds to a weight")
    alpha: float | None = Field(None, gt=0, description="the product counts alpha/rank; null: the rank, so once")
    target_modules: list[str] | str | None = Field(
        None,
        description="linear layers by name or its last parts, as wq or layers.0.attention.wq, or one regular "
        "expression for whole names; null: those of attention and feed-forward",
    )

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class ParallelConfig(Section):
    """Sizes of the mesh axes, data parallel being what remains of the world size; and what is kept where."""

    tensor: int = Field(1, ge=1, description="ranks that share heads and columns of the weights")
    pipeline: int = Field(1, ge=1, description="stages that share the blocks")
    ring: int = Field(1, ge=1, description="ranks that share a pack's tokens by ring attention")
    ulysses: int = Field(1, ge=1, description="ranks that share a pack's tokens, and heads in attention")
    sequence: bool = Field(False, description="Megatron sequence parallel beside tensor parallel")
    zero_stage: int = Field(1, ge=0, le=3)
    offload_optimizer: bool = Field(False, description="masters and moments live, and are updated, on the CPU")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="what of a block the backward pass computes again: all but attention, or all"
    )
    offload_activations: bool = Field(False, description="what full recomputation keeps of a block waits on the CPU")


class CheckpointConfig(Section):
    """When a run is saved and how much of it is kept."""

    every: int = Field(1000, ge=1, description="steps between saves; the last step is always saved")
    keep: int = Field(3, ge=1, description="the newest so many stay")
    keep_every: int | None = Field(None, ge=1, description="those of steps that it divides stay as well")
    asynchronous: bool = Field(
        False, alias="async", description="training goes on while a copy, in host memory, is written"
    )


class HealthConfig(Section):
    """What is looked for in a run, and what is done about it."""

    spike: Literal["none", "warn", "rollback"] = Field(
        "warn", description="of a spike: nothing, a warning, or back to the newest checkpoint without those batches"
    )
    spike_of: Literal["loss", "grad_norm"] = Field("loss", description="what must not spike")
    spike_factor: float = Field(10.0, gt=0, description="spreads above the median from which a value is a spike")
    spike_window: int = Field(100, ge=8, description="steps whose median and spread are taken")
    rollback_limit: int = Field(3, ge=1, description="rollbacks to one checkpoint; one more stops the run")
    check_every: int = Field(50, ge=0, description="steps within which flipped bits are looked for; 0 never looks")


class PreviewConfig(Section):
    """A contact sheet of fixed prompts drawn with the EMA weights during training."""

    every: int = Field(0, ge=0, description="steps between pictures; 0 draws none")
    prompts: list[str] = Field(default_factory=list, description="label-conditional models take class numbers")
    per_prompt: int = Field(1, ge=1)
    height: int = Field(256, ge=1, description="pixels")
    width: int = Field(256, ge=1, description="pixels")
    frames: int = Field(1, ge=1)
    steps: int = Field(20, ge=1)
    guidance: float = Field(4.0, ge=0)
    solver: str = "euler"

    @model_validator(mode="after")
    def _prompts_given(self) -> "PreviewConfig":
        if self.every and not self.prompts:
            raise ValueError("preview.every asks for pictures but preview.prompts is empty; list the prompts to draw")
        return self


class WatchdogConfig(Section):
    """What is done about ranks that stop without a word."""

    enabled: bool = True
    timeout: float = Field(
        300.0,
        ge=1,
        description="seconds of silence, or without progress while others wait, after which a rank has stopped and "
        "the run is ended; longer than a first step takes, or the drawing of a preview",
    )


class LogConfig(Section):
    """Where numbers go besides RUN/metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str | None = Field(None, description="Weights & Biases project (extra `wandb`)")
    peak_tflops: float | None = Field(None, gt=0, description="of one device, for MFU; null: the device's if known")


class Config(Section):
    """A whole run, as in RUN/config.yaml."""

    run: RunConfig
    model: dict[str, Any] = Field(description="fields of FlagDiTConfig, or `preset: 600m` and what differs from it")
    flow: FlowConfig = FlowConfig()
    text: TextConfig | None = Field(None, description="absent in a label-conditional run")
    vae: VaeConfig = VaeConfig()
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig | None = Field(None, description="present: adapters are trained, not the weights")
    precision: Literal["fp32", "bf16"] = "bf16"
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    preview: PreviewConfig = PreviewConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _lora_fits(self) -> "Config":
        if self.lora is None:
            return self
        if self.train.init_from is None:
            raise ValueError("lora trains adapters beside the weights of a model; name it by train.init_from")
        if self.train.init_ema:
            raise ValueError(
                "train.init_ema goes on with an average of weights, and lora averages its adapters, which begin anew; "
                "set it to false (train.init_weights=ema puts adapters beside averaged weights)"
            )
        for axis in ("tensor", "pipeline"):
            if (size := getattr(self.parallel, axis)) > 1:
                raise ValueError(
                    f"parallel.{axis}={size} cuts the layers that lora puts adapters beside; with lora set "
                    f"parallel.{axis}=1, and parallel.zero_stage=3, ring or ulysses where the model does not fit"
                )
        return self
