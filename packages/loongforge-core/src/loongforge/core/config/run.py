"""What a run is: every section a frozen dataclass, every field named as Megatron names its flag.

Field docstrings become `--help` and the JSON schema. Nothing here imports torch; cross-field rules that need no
world size are checked at construction, the rest in `core.plan`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from loongforge.core.config.bounds import below, refuse
from loongforge.core.config.experts import ExpertConfig
from loongforge.core.config.lora import LoraConfig
from loongforge.core.config.parallel import ComponentParallel, ParallelConfig
from loongforge.core.config.template_arguments import template_arguments

RANDOM = "random"
"""In place of a directory to load from: leave the weights as they were initialised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentConfig:
    """One part of a model: its family, its geometry, and how it trains."""

    family: str
    """Registered model family, `qwen3` or `owner:qwen3`."""
    geometry: Any
    """The family's own frozen config dataclass."""
    freeze: bool = False
    """Keep every parameter of this component as loaded."""
    lr_mult: float = 1.0
    """Learning rate of this component relative to the run's."""
    load: str | None = None
    """Hugging Face directory of this component's weights, its own model or a whole that has it; else as --load says.
    `random` leaves them freshly initialised."""
    parallel: ComponentParallel = field(default_factory=ComponentParallel)
    """Layout of an encoder or projector; in YAML its fields stand beside the others of the component."""

    def __post_init__(self) -> None:
        refuse(below(0, "", self, "lr_mult"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model: a foundation (language model), and an encoder and a projector beside it or not."""

    foundation: ComponentConfig
    image_encoder: ComponentConfig | None = None
    """Turns images and videos into features."""
    image_projector: ComponentConfig | None = None
    """Turns the encoder's features into the foundation's width."""
    model_type: str | None = None
    """Registered composition (`qwen3_vl`), or a free label of a model that is a foundation alone."""
    freeze_parameters: tuple[str, ...] = ()
    """Regular expressions over parameter names to freeze besides whole components; each must match something."""

    @property
    def components(self) -> dict[str, ComponentConfig]:
        """The components there are, by slot, in the order data takes."""
        slots = {
            "image_encoder": self.image_encoder,
            "image_projector": self.image_projector,
            "foundation": self.foundation,
        }
        return {name: component for name, component in slots.items() if component is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length, batch and numerics of the run."""

    training_phase: Literal["pretrain", "sft"] = "pretrain"
    """Next-token training on text, or supervised fine-tuning on conversations."""
    train_iters: int | None = None
    """Optimizer steps. Exactly one of train_iters and train_samples."""
    train_samples: int | None = None
    """Training samples (sequences) in place of train_iters."""
    micro_batch_size: int = 1
    """Sequences per rank and forward pass."""
    global_batch_size: int | None = None
    """Sequences per optimizer step over all ranks; micro_batch_size x data parallel size when unset."""
    seq_length: int = 4096
    """Tokens per sequence."""
    seed: int = 1234
    """Seed of initialisation, dropout and data order."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute type; master weights and optimizer state are fp32."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32 (megatron: --accumulate-allreduce-grads-in-fp32)."""
    eval_iters: int = 0
    """Global batches of held-out data per evaluation; 0 turns evaluation off."""
    eval_interval: int | None = None
    """Optimizer steps between evaluations; only at the end when unset."""
    exit_duration_in_mins: float | None = None
    """Save and exit as after SIGTERM when the run has lasted this long."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms only."""

    def __post_init__(self) -> None:
        problems = below(1, "train", self, "micro_batch_size", "seq_length", "train_iters", "train_samples")
        problems += below(1, "train", self, "global_batch_size", "eval_interval")
        problems += below(0, "train", self, "eval_iters", "seed")
        if self.train_iters is not None and self.train_samples is not None:
            problems.append("train: give train_iters or train_samples, not both.")
        refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule, in Megatron's terms."""

    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay."""
    lr_decay_iters: int | None = None
    """Optimizer steps over which the rate decays; train_iters when unset."""
    lr_warmup_iters: int = 0
    """Optimizer steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of lr_decay_iters, in place of lr_warmup_iters."""
    lr_warmup_init: float = 0.0
    """Learning rate at the first step of the warm-up."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the last phase of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Optimizer steps of the last phase of WSD."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and one-dimensional parameters have none."""
    start_weight_decay: float | None = None
    """Weight decay at the first step, when it grows."""
    end_weight_decay: float | None = None
    """Weight decay at the last step, when it grows."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay grows."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Term added to the denominator."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        problems = below(0, "optimizer", self, "lr_warmup_iters", "lr_warmup_init", "weight_decay", "clip_grad")
        problems += below(1, "optimizer", self, "lr_decay_iters", "lr_wsd_decay_iters")
        if not 0 <= self.min_lr <= self.lr:
            problems.append(f"optimizer: need 0 <= min_lr <= lr, got min_lr={self.min_lr!r} lr={self.lr!r}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"optimizer.{name}: must be in [0, 1), got {getattr(self, name)!r}.")
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction <= 1:
            problems.append(f"optimizer.lr_warmup_fraction: must be in [0, 1], got {self.lr_warmup_fraction!r}.")
        if self.lr_warmup_fraction and self.lr_warmup_iters:
            problems.append("optimizer: give lr_warmup_iters or lr_warmup_fraction, not both.")
        refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where samples come from."""

    data_path: tuple[str, ...] = ()
    """Files or prefixes, or weight and file in turn as Megatron blends: `0.3 a.jsonl 0.7 b`."""
    valid_data_path: tuple[str, ...] = ()
    """Held-out data in the same form; carved out of data_path by `split` when empty."""
    split: str | None = None
    """Shares of documents for training, validation and test: `969,30,1`. All for training when unset."""
    source: str | None = None
    """Registered data source; chosen from the training phase when unset. `mock` makes random tokens."""
    data_cache_path: str | None = None
    """Directory of tokenised files and index caches; `<save>/data_cache` when unset, beside the data without --save."""
    packing: bool = True
    """Fine-tuning: put several conversations into one sequence, each attending to itself alone."""
    text_field: str = "text"
    """Field of a `.jsonl` row that holds the text of pre-training."""
    messages_field: str = "messages"
    """Field of a `.jsonl` row that holds the conversation of fine-tuning."""
    data_format: Literal["auto", "openai", "sharegpt", "alpaca"] = "auto"
    """Form of the rows of fine-tuning; auto: the fields of each row tell."""
    train_on_prompt: bool = False
    """Count the loss on every token of a conversation, not on the assistant's alone."""
    history_mask_loss: bool = False
    """Of what the assistant says, count the loss on the last turn of a conversation alone."""
    overlong: Literal["error", "drop", "truncate", "split"] = "truncate"
    """What happens to a conversation longer than seq_length: whole turns at its end go, or it becomes several; counted,
    reported and named."""
    shuffle: bool = True
    """Draw samples in a seeded random order, another one in every epoch."""
    balance: str | None = None
    """Registered balancer that deals the samples of each step to data parallel ranks by cost: `analytic`, by the
    arithmetic of the model, or `measured`, by `balance_costs`. By position when unset."""
    balance_sync: Literal["step", "micro_batch"] | None = None
    """Where a balancer takes ranks to wait for each other: at the end of a step, or in each micro-batch as with experts
    spread over data parallel ranks. By the layout when unset."""
    balance_costs: str | None = None
    """File of `loongforge data fit-costs`, which the balancer `measured` reckons with."""
    balance_times: str | None = None
    """File to write how long every replica was busy in each step, for `loongforge data fit-costs`; a device is
    synchronised once more in every step."""
    min_pixels: int | None = None
    """Smallest area of an image after resizing; the model's own rule when unset."""
    max_pixels: int | None = None
    """Largest area of an image after resizing; the model's own rule when unset."""
    fps: float | None = None
    """Video frames per second to look at; the model's own rule when unset."""
    fps_min_frames: int | None = None
    """Fewest frames of a video."""
    fps_max_frames: int | None = None
    """Most frames of a video."""
    video_min_pixels: int | None = None
    """Smallest area of a video frame after resizing."""
    video_max_pixels: int | None = None
    """Largest area of a video frame after resizing."""
    max_bad_samples: int | None = None
    """Conversations that may be bad: left out by name, and the run goes on. With no max_bad_* the first one ends it."""
    max_bad_ratio: float | None = None
    """Share of all conversations that may be bad."""
    max_bad_run: int | None = None
    """Samples of the training order that may be bad one after the other."""
    verify_media: bool = False
    """Decode every image, video and sound once before training, so that corrupt ones are known before."""
    num_workers: int = 2
    """Worker processes of the loader; 0 reads in the training process."""
    loss_mask_eod: bool = False
    """Leave the end-of-document token out of the loss (megatron: --eod-mask-loss)."""

    def __post_init__(self) -> None:
        positive = ("min_pixels", "max_pixels", "fps_min_frames", "fps_max_frames", "video_min_pixels")
        problems = below(0, "data", self, "num_workers") + below(1, "data", self, *positive, "video_max_pixels")
        problems += below(0, "data", self, "max_bad_samples", "max_bad_run")
        if self.max_bad_ratio is not None and not 0 <= self.max_bad_ratio <= 1:
            problems.append(f"data.max_bad_ratio: must be in [0, 1], got {self.max_bad_ratio!r}.")
        if self.train_on_prompt and self.history_mask_loss:
            problems.append(
                "data: train_on_prompt counts every token and history_mask_loss the last turn alone: give one of them."
            )
        if self.fps is not None and self.fps <= 0:
            problems.append(f"data.fps: must be above 0, got {self.fps!r}.")
        for least, most in (
            ("min_pixels", "max_pixels"),
            ("fps_min_frames", "fps_max_frames"),
            ("video_min_pixels", "video_max_pixels"),
        ):
            low, high = getattr(self, least), getattr(self, most)
            if low is not None and high is not None and low > high:
                problems.append(f"data: {least}={low!r} is above {most}={high!r}: swap them, or leave one out.")
        refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """How text becomes tokens."""

    tokenizer_type: Literal["HFTokenizer", "NullTokenizer"] | None = None
    """HFTokenizer reads `tokenizer.json`; NullTokenizer reads space-separated numbers. Unset: by what there is."""
    hf_tokenizer_path: str | None = None
    """Directory of the tokenizer; the directory given to --load when unset."""
    chat_template: str | None = None
    """File of a Jinja chat template that replaces the tokenizer's own."""
    chat_template_kwargs: str | None = None
    """Values the chat template reads besides the conversation, as JSON: `{"enable_thinking": false}`."""
    make_vocab_size_divisible_by: int = 1
    """Rows of the embedding are padded to a multiple of this times the tensor parallel size."""

    def __post_init__(self) -> None:
        problems = below(1, "tokenizer", self, "make_vocab_size_divisible_by")
        try:
            template_arguments(self.chat_template_kwargs)
        except ValueError as error:
            problems.append(
                f"tokenizer.chat_template_kwargs: {self.chat_template_kwargs!r}: {error}. Give a JSON object such as "
                "'{\"enable_thinking\": false}'."
            )
        refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What is loaded and what is saved."""

    load: str | None = None
    """A run to resume, or a Hugging Face directory (or any registered format) to start from."""
    save: str | None = None
    """Directory of the run: checkpoints, metrics.jsonl, the resolved configuration."""
    save_interval: int | None = None
    """Optimizer steps between checkpoints; only at the end when unset."""
    save_hf: bool = False
    """Write Hugging Face weights at every save and at the end."""
    save_hf_path: str | None = None
    """Directory of the Hugging Face export; `<save>/hf` when unset."""
    async_save: bool = False
    """Write checkpoints in the background."""
    keep_last: int | None = None
    """Checkpoints to keep; all when unset."""
    finetune: bool = False
    """Load weights only: step, optimizer, schedule and data position start anew."""
    no_load_optim: bool = False
    """Do not load the optimizer state."""
    no_load_rng: bool = False
    """Do not load the random state."""
    no_save_optim: bool = False
    """Do not save the optimizer state."""
    exit_on_missing_checkpoint: bool = False
    """Stop when --load names a directory without a checkpoint, instead of starting anew."""
    allow: tuple[str, ...] = ()
    """Data-fingerprint fields whose change is accepted on resume."""

    def __post_init__(self) -> None:
        refuse(below(1, "checkpoint", self, "save_interval", "keep_last"))


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """What is shown and recorded."""

    log_interval: int = 1
    """Optimizer steps between lines on the terminal; metrics.jsonl has every step."""
    trackers: tuple[str, ...] = ()
    """Registered trackers: `tensorboard`, `wandb`, `swanlab`."""
    tensorboard_dir: str | None = None
    """Directory of TensorBoard files; `<save>/tensorboard` when unset. Turns the tracker on."""
    profile: bool = False
    """Record a torch profiler trace of steps profile_step_start to profile_step_end."""
    profile_step_start: int = 10
    """First profiled step."""
    profile_step_end: int = 12
    """First step after the profile."""
    check_for_nan_in_loss_and_grad: bool = True
    """Stop before the optimizer step when the loss or the gradient norm is not finite."""

    def __post_init__(self) -> None:
        problems = below(1, "watch", self, "log_interval") + below(0, "watch", self, "profile_step_start")
        if self.profile and self.profile_step_end <= self.profile_step_start:
            problems.append(
                f"watch: profile_step_end={self.profile_step_end!r} must come after "
                f"profile_step_start={self.profile_step_start!r}."
            )
        refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """How workers start; a launcher's own variables (torchrun, Slurm, a PyTorchJob's nodes) win over these."""

    nproc_per_node: int | None = None
    """Workers on this node; one per accelerator, or 1 on CPU, when unset."""
    nnodes: int = 1
    """Nodes of the job."""
    node_rank: int = 0
    """Number of this node."""
    rdzv_endpoint: str | None = None
    """host:port of the rendezvous, for more than one node."""
    max_restarts: int = 0
    """Times torch's elastic agent starts the workers again after a failure."""
    distributed_timeout_minutes: float = 10.0
    """Minutes after which a collective gives up."""

    def __post_init__(self) -> None:
        problems = below(1, "launch", self, "nproc_per_node", "nnodes") + below(0, "launch", self, "max_restarts")
        if not 0 <= self.node_rank < max(self.nnodes, 1):
            problems.append(f"launch.node_rank: must be in 0..{self.nnodes - 1}, got {self.node_rank!r}.")
        refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    moe: ExpertConfig = field(default_factory=ExpertConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    platform: str | None = None
    """Device platform: `cpu`, `cuda`, `auto` or a registered one; as LOONGFORGE_PLATFORM says when unset."""
    requires: tuple[str, ...] = ()
    """Requirements that must be installed for this run: `acme-mamba>=0.3`."""
