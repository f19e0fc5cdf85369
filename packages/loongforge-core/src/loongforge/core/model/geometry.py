"""The shape of a component, as plain data.

Every family's own config gives one of these. The plan counts parameters, memory and FLOPs from it and `core.megatron`
translates it; neither knows a family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from loongforge.core.errors import ConfigError
from loongforge.kernels.dsa_costs import Speeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Rotary frequencies stretched by wavelength (Llama 3.1): long ones by `factor`, short ones not at all."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


LoadBalancing = Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"]
"""The share of choices that an expert got: of a micro-batch (Fedus et al., "Switch Transformers", 2021), of each
sequence (DeepSeek-V2, 2024), or of all micro-batches of the step so far on all ranks (Qiu et al., "Demons in the
Detail", 2025)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGeometry:
    """Mixture of experts in place of the MLP."""

    num_experts: int
    topk: int
    """Experts per token."""
    ffn_hidden_size: int
    """Width of one expert's gated MLP."""
    first_dense_layers: int = 0
    """Layers at the beginning that keep a plain MLP of `TransformerGeometry.ffn_hidden_size`."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalise_topk: bool = True
    """The chosen experts' weights sum to one (before `scaling`)."""
    scaling: float = 1.0
    """Factor on the weights of the chosen experts."""
    num_groups: int | None = None
    """Groups of experts, of which `topk_groups` are looked at."""
    topk_groups: int | None = None
    group_score: Literal["best_two", "best"] = "best_two"
    """What a group is judged by: the sum of its two best experts (DeepSeek-V3) or its best one (DeepSeek-V2)."""
    expert_bias: bool = False
    """A per-expert bias takes part in the choice, not in the weight (Wang et al., 2024)."""
    bias_update_rate: float = 1e-3
    """What the bias of an expert goes up or down by after a step in which it had fewer or more tokens than the mean."""
    shared_ffn_hidden_size: int | None = None
    """Width of the expert that every token passes, all shared ones together; None without."""
    shared_gate: bool = False
    """A sigmoid of the token weighs what the shared expert adds (Qwen3-Next)."""
    aux_loss_coeff: float = 0.0
    """Factor of the load-balancing loss while training."""
    load_balancing: LoadBalancing = "aux_loss"
    """Over which tokens that loss counts choices; `none` leaves it out whatever its factor."""

    @property
    def balance_coeff(self) -> float:
        """Factor of the load-balancing loss, 0 without one."""
        return 0.0 if self.load_balancing == "none" else self.aux_loss_coeff

    def __post_init__(self) -> None:
        if problems := list(_expert_problems(self)):
            raise ConfigError(*problems)


def _expert_problems(experts: ExpertGeometry) -> Iterator[str]:
    """What megatron-core's router does not compute, or computes as something else without a word."""
    topk, groups = experts.topk, experts.num_groups
    if not 1 <= topk <= experts.num_experts:
        yield f"topk={topk} must be between 1 and num_experts={experts.num_experts}."
    if experts.normalise_topk and topk == 1:
        yield "normalise_topk=True makes every weight 1 with topk=1: set normalise_topk to false."
    if experts.score_function == "sigmoid" and topk > 1 and not experts.normalise_topk:
        yield "normalise_topk=False goes with score_function='softmax': megatron-core normalises sigmoid scores."
    if experts.expert_bias and experts.score_function != "sigmoid":
        yield f"expert_bias=True goes with score_function='sigmoid', not with {experts.score_function!r}."
    if (groups is None) != (experts.topk_groups is None):
        yield f"num_groups={groups} and topk_groups={experts.topk_groups} go together: give both or neither."
    elif groups is not None and experts.topk_groups is not None:
        if groups < 1 or experts.num_experts % groups:
            yield f"num_groups={groups} must divide num_experts={experts.num_experts}."
        elif not 1 <= experts.topk_groups <= groups:
            yield f"topk_groups={experts.topk_groups} must be between 1 and num_groups={groups}."
        elif topk > experts.topk_groups * (experts.num_experts // groups):
            yield f"topk={topk} is more than topk_groups={experts.topk_groups} groups have experts."
        elif experts.group_score == "best_two" and experts.num_experts == groups:
            yield "group_score='best_two' needs groups of at least two experts: use fewer groups."
        if experts.score_function == "softmax" and experts.normalise_topk:
            yield "groups with score_function='softmax' need normalise_topk=False: else they are chosen by raw logits."


SparseRoute = Literal["auto", "masked", "gather"]
"""How queries meet the chosen keys, with one result: all keys under a mask, or the chosen rows of the latent alone.
`auto` goes by a table of speeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexGeometry:
    """DeepSeek Sparse Attention (DeepSeek-V3.2, 2025): an indexer chooses the keys that each query attends to."""

    heads: int
    head_dim: int
    """Width of an index head; its first qk_rope_head_dim channels turn with the position."""
    topk: int
    """Keys of each query."""
    interleaved: bool = False
    """The rotation pairs neighbouring channels (GLM-5) instead of the two halves (DeepSeek-V3.2)."""
    loss_coeff: float = 0.0
    """Factor of the loss that teaches the indexer what attention looks at; 0 leaves the indexer as it is."""
    warmup: bool = False
    """Attention goes to every key and its indexer alone trains, on all of them (DeepSeek-V3.2, 2025, 2.1.1)."""
    fp8: bool = False
    """Keys are chosen by scores of rotated queries and keys in fp8 (DeepSeek-V3.2); what learns is not rounded."""
    route: SparseRoute = "auto"
    speeds: Speeds | None = None
    """What `auto` goes by; None for an estimate."""
    shared_layers: tuple[int, ...] = ()
    """Layers (from 0) without an indexer, which attend to the keys that the layer before them did (GLM-5.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGeometry:
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values from one low-rank latent."""

    q_lora_rank: int | None
    """Rank of the queries; None projects them directly."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    """Width of a head's part without rotation."""
    qk_rope_head_dim: int
    """Width of the rotated part, one for all heads on the key side."""
    v_head_dim: int
    norm_epsilon: float = 1e-6
    """Of the two latent norms."""
    rope_factor: float = 1.0
    """YaRN (Peng et al., 2023): extension over `original_max_position_embeddings`; 1 is the plain rotation."""
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    index: IndexGeometry | None = None
    """Attention to the keys that an indexer chooses; reads the latent of the queries, so that there must be one."""

    def __post_init__(self) -> None:
        if self.index is not None and self.q_lora_rank is None:
            raise ConfigError("index needs a latent of the queries: give q_lora_rank.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaGeometry:
    """Gated delta rule in place of attention in some layers (Yang et al., "Gated Delta Networks", 2024)."""

    layers: tuple[int, ...]
    """Layers (from 0) that have it; the others have attention."""
    num_key_heads: int
    """Heads of query and key; each serves num_value_heads / num_key_heads value heads."""
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int = 4
    """Tokens that the causal convolution in front of query, key and value looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerGeometry:
    """Sizes and block options of one decoder-only transformer."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the gated MLP (one half of the fused gate-and-up matrix)."""
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    kv_channels: int
    """Width of one head."""
    vocab_size: int
    """Tokens of the vocabulary before padding."""
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    tie_word_embeddings: bool
    qk_layernorm: bool = False
    """RMSNorm of query and key before the rotation, over each head."""
    qk_norm_whole: bool = False
    """With `qk_layernorm`: over all heads of a token at once, with a weight for every channel (MiniMax-M2)."""
    attention_gate: bool = False
    """A sigmoid gate on each channel of the attention's output, from the query projection (Qwen3-Next)."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight (Qwen3-Next), save the one inside a gated delta rule."""
    rotary_percent: float = 1.0
    """Share of a head that is rotated, its first channels; of the whole head without latent attention."""
    add_qkv_bias: bool = False
    init_method_std: float = 0.02
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    swiglu: bool = True
    mrope_section: tuple[int, int, int] | None = None
    """Rotated pairs that belong to time, height and width; position ids then have three rows. None: one row."""
    mrope_interleaved: bool = False
    """Frequencies take turns t, h, w, t, h, w, ... (Qwen3-VL) instead of standing in three sections (Qwen2-VL)."""
    rope_scaling: Llama3Scaling | None = None
    rotary_limit: int | None = None
    """Tokens beyond which the model would take other rotary frequencies, which are not computed here."""
    experts: ExpertGeometry | None = None
    latent: LatentGeometry | None = None
    """Latent attention; num_query_groups equals num_attention_heads and kv_channels is qk_nope + qk_rope then."""
    delta: DeltaGeometry | None = None
    """Layers with a gated delta rule in place of attention."""
    prediction_layers: int = 0
    """Further layers that each predict one more token ahead (Gloeckle et al., 2024; as in DeepSeek-V3, 2024, 2.2):
    blocks like the model's last layer, with attention."""
    prediction_loss_coeff: float = 0.1
    """Factor of the mean loss of the further layers."""

    @property
    def position_rank(self) -> int:
        """Rows of position ids: 3 with sections for time, height and width, else 1."""
        return 1 if self.mrope_section is None else 3

    @property
    def shared_index_layers(self) -> tuple[int, ...]:
        """Layers (from 0) that attend to the keys of the layer before them; none without an indexer."""
        return self.latent.index.shared_layers if self.latent and self.latent.index else ()

    @property
    def rotated_channels(self) -> int:
        """Channels of a head that are rotated, outside of latent attention."""
        return round(self.kv_channels * self.rotary_percent)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderGeometry:
    """Sizes of one vision transformer over patches."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    patch_dim: int
    """Numbers of one patch: channels x frames x height x width."""
    spatial_merge_size: int
    """Patches per side of the square that the projector makes one feature of."""
    normalization: Literal["RMSNorm", "LayerNorm"]
    norm_epsilon: float
    gated: bool
    """SwiGLU in the MLP, else GELU (tanh)."""
    patch_bias: bool
    linear_bias: bool
    """Biases in attention and MLP."""
    position_embeddings: int | None = None
    """Learned positions, a square grid that is interpolated to the image; None without."""
    window_patches: int | None = None
    """Patches in a full attention window; None: every layer sees a whole frame."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers (from 0) that see a whole frame where the others see windows."""
    deepstack_layers: tuple[int, ...] = ()
    """Layers (from 0) after which features are handed to the first layers of the foundation."""
    rotary_base: float = 10000.0
    init_method_std: float = 0.02

    @property
    def levels(self) -> int:
        """Feature levels besides the last one."""
        return len(self.deepstack_layers)

    def features(self, grid: Sequence[int]) -> int:
        """Tokens that an item of `(t, h, w)` patches becomes in the foundation."""
        return grid[0] * grid[1] * grid[2] // self.spatial_merge_size**2

    def cost(self, grid: Sequence[int]) -> float:
        """Multiply-adds of the forward pass of an item of `(t, h, w)` patches, to balance by."""
        patches, frame = grid[0] * grid[1] * grid[2], grid[1] * grid[2]
        matrices = 4 * self.hidden_size**2 + (3 if self.gated else 2) * self.hidden_size * self.ffn_hidden_size
        whole = self.num_layers if self.window_patches is None else len(self.full_attention_layers)
        seen = whole * frame + (self.num_layers - whole) * min(self.window_patches or 0, frame)
        return patches * (self.num_layers * matrices + 2 * self.hidden_size * seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorGeometry:
    """From an encoder's patches to the foundation's width: merge squares of patches, then a two-layer MLP."""

    input_size: int | None
    """Width of the encoder; None takes the encoder's."""
    output_size: int | None
    """Width of the foundation; None takes the foundation's."""
    normalization: Literal["RMSNorm", "LayerNorm"]
    norm_epsilon: float
    deepstack_norm_after_merge: bool = True
    """Deepstack levels are normalised after merging (Qwen3-VL); the last level always before it."""
    init_method_std: float = 0.02
