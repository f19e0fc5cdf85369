"""Names and shapes of all tensors of a released checkpoint, as its index lists them, from its `config.json` alone.

Written from the layout of the releases, not from our weight tables, which are compared with it. Further layers of
multi-token prediction are those that `num_nextn_predict_layers` says; Qwen3-Next's file has no word for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]


def index_of(config: Config) -> dict[str, Shape]:
    """Every tensor of the checkpoint that `config` belongs to."""
    hidden, vocab, kind = config["hidden_size"], config["vocab_size"], config["model_type"]
    embedding, norm, head, layers = ENDS.get(kind, ("model.embed_tokens", "model.norm", "lm_head", "model.layers"))
    found: dict[str, Shape] = {f"{embedding}.weight": (vocab, hidden), f"{norm}.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found[f"{head}.weight"] = (vocab, hidden)
    for number in range(config["num_hidden_layers"]):
        found |= {f"{layers}.{number}.{name}": shape for name, shape in LAYERS[kind](config, number)}
    for depth in range(config.get("num_nextn_predict_layers", 0)):
        found |= dict(further(config, depth))
    return found


def further(config: Config, depth: int) -> Tensors:
    """One further layer: a decoder layer like the last one, and what is around it."""
    hidden, last = config["hidden_size"], config["num_hidden_layers"] - 1
    place, norms, projection, end = {
        "mimo": (
            f"model.mtp_layers.{depth}.",
            (f"model.mtp_layers.{depth}.token_layernorm", f"model.mtp_layers.{depth}.hidden_layernorm"),
            f"model.mtp_layers.{depth}.input_proj",
            f"model.mtp_layers.{depth}.final_layernorm",
        ),
        "qwen3_next": (
            f"mtp.layers.{depth}.", ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"), "mtp.fc", "mtp.norm",
        ),
    }.get(config["model_type"]) or _behind(last + 1 + depth)  # fmt: skip
    for norm in (*norms, end):
        yield f"{norm}.weight", (hidden,)
    yield f"{projection}.weight", (hidden, 2 * hidden)
    # With an indexer, whatever the last layer shares.
    for name, shape in LAYERS[config["model_type"]]({**config, "indexer_types": None}, last):
        yield place + name, shape


def _behind(number: int) -> tuple[str, tuple[str, str], str, str]:
    """A further layer stored as one more layer, which has copies of the embedding and the output matrix besides."""
    place = f"model.layers.{number}."
    return place, (place + "enorm", place + "hnorm"), place + "eh_proj", place + "shared_head.norm"


def norms(config: Config) -> Tensors:
    """The two of every layer."""
    yield "input_layernorm.weight", (config["hidden_size"],)
    yield "post_attention_layernorm.weight", (config["hidden_size"],)


def head_dim(config: Config) -> int:
    """Said, or the model's width over its heads."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def grouped(config: Config, *, bias: bool = False, head_norms: bool = False, gated: bool = False) -> Tensors:
    """Grouped-query attention; `gated`: the query projection has a gate for every channel."""
    hidden, width = config["hidden_size"], head_dim(config)
    query, pair = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    for name, rows in {"q": query * (1 + gated), "k": pair, "v": pair}.items():
        yield f"self_attn.{name}_proj.weight", (rows, hidden)
        if bias:
            yield f"self_attn.{name}_proj.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, query)
    if head_norms:
        yield from ((f"self_attn.{name}_norm.weight", (width,)) for name in "qk")


def latent(config: Config) -> Tensors:
    """Multi-head latent attention."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    if config["q_lora_rank"] is None:
        yield "self_attn.q_proj.weight", (heads * (nope + rope), hidden)
    else:
        yield "self_attn.q_a_proj.weight", (config["q_lora_rank"], hidden)
        yield "self_attn.q_a_layernorm.weight", (config["q_lora_rank"],)
        yield "self_attn.q_b_proj.weight", (heads * (nope + rope), config["q_lora_rank"])
    yield "self_attn.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
    yield "self_attn.kv_a_layernorm.weight", (rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), rank)
    yield "self_attn.o_proj.weight", (hidden, heads * value)


def delta(config: Config) -> Tensors:
    """Gated delta rule."""
    hidden, keys, values = config["hidden_size"], config["linear_num_key_heads"], config["linear_num_value_heads"]
    key, value = keys * config["linear_key_head_dim"], values * config["linear_value_head_dim"]
    yield "linear_attn.in_proj_qkvz.weight", (2 * key + 2 * value, hidden)
    yield "linear_attn.in_proj_ba.weight", (2 * values, hidden)
    yield "linear_attn.conv1d.weight", (2 * key + value, 1, config["linear_conv_kernel_dim"])
    yield "linear_attn.dt_bias", (values,)
    yield "linear_attn.A_log", (values,)
    yield "linear_attn.norm.weight", (config["linear_value_head_dim"],)
    yield "linear_attn.out_proj.weight", (hidden, value)


def mlp(config: Config, width: int, place: str = "mlp") -> Tensors:
    """A gated MLP."""
    hidden = config["hidden_size"]
    yield f"{place}.gate_proj.weight", (width, hidden)
    yield f"{place}.up_proj.weight", (width, hidden)
    yield f"{place}.down_proj.weight", (hidden, width)


def experts(config: Config, count: str, *, bias: bool = False) -> Tensors:
    """Router and experts; `count` is the key of their number."""
    yield "mlp.gate.weight", (config[count], config["hidden_size"])
    if bias:
        yield "mlp.gate.e_score_correction_bias", (config[count],)
    for number in range(config[count]):
        yield from mlp(config, config["moe_intermediate_size"], f"mlp.experts.{number}")


def dense(config: Config, number: int) -> Tensors:
    """LLaMA, Qwen1.5 to Qwen3, MiMo."""
    kind = config["model_type"]
    yield from norms(config)
    yield from grouped(config, bias=kind in ("qwen2", "mimo"), head_norms=kind == "qwen3")
    yield from mlp(config, config["intermediate_size"])


def qwen3_moe(config: Config, number: int) -> Tensors:
    """Qwen3 with experts."""
    yield from norms(config)
    yield from grouped(config, head_norms=True)
    yield from experts(config, "num_experts")


def qwen3_next(config: Config, number: int) -> Tensors:
    """Qwen3-Next: attention in every fourth layer."""
    yield from norms(config)
    attends = (number + 1) % config["full_attention_interval"] == 0
    yield from grouped(config, head_norms=True, gated=True) if attends else delta(config)
    yield from experts(config, "num_experts")
    yield from mlp(config, config["shared_expert_intermediate_size"], "mlp.shared_expert")
    yield "mlp.shared_expert_gate.weight", (1, config["hidden_size"])


def _dense_first(config: Config, number: int, *, bias: bool) -> Tensors:
    if number < config["first_k_dense_replace"]:
        yield from mlp(config, config["intermediate_size"])
    else:
        yield from experts(config, "n_routed_experts", bias=bias)
        shared = config["n_shared_experts"] * config["moe_intermediate_size"]
        yield from mlp(config, shared, "mlp.shared_experts")


def deepseek(config: Config, number: int) -> Tensors:
    """DeepSeek-V2, V3 and V3.2, Kimi-K2, GLM-5."""
    yield from norms(config)
    yield from latent(config)
    kinds = config.get("indexer_types")
    if "index_topk" in config and (kinds is None or kinds[number] == "full"):
        yield from indexer(config)
    yield from _dense_first(config, number, bias=config["model_type"] != "deepseek_v2")


def indexer(config: Config) -> Tensors:
    """The small network that chooses the keys of sparse attention."""
    heads, width, place = config["index_n_heads"], config["index_head_dim"], "self_attn.indexer"
    yield f"{place}.wq_b.weight", (heads * width, config["q_lora_rank"])
    yield f"{place}.wk.weight", (width, config["hidden_size"])
    yield f"{place}.weights_proj.weight", (heads, config["hidden_size"])
    yield f"{place}.k_norm.weight", (width,)
    yield f"{place}.k_norm.bias", (width,)


def glm4_moe(config: Config, number: int) -> Tensors:
    """GLM-4.5: biases of query, key and value, none of the output."""
    yield from norms(config)
    yield from grouped(config, bias=config["attention_bias"], head_norms=config["use_qk_norm"])
    yield from _dense_first(config, number, bias=True)


def minimax_m2(config: Config, number: int) -> Tensors:
    """MiniMax-M2: norms over all heads at once, experts under names of their own."""
    hidden, width, place = config["hidden_size"], config["intermediate_size"], "block_sparse_moe"
    yield from norms(config)
    yield from grouped(config)
    yield "self_attn.q_norm.weight", (config["num_attention_heads"] * head_dim(config),)
    yield "self_attn.k_norm.weight", (config["num_key_value_heads"] * head_dim(config),)
    yield f"{place}.gate.weight", (config["num_local_experts"], hidden)
    yield f"{place}.e_score_correction_bias", (config["num_local_experts"],)
    for expert in range(config["num_local_experts"]):
        yield f"{place}.experts.{expert}.w1.weight", (width, hidden)
        yield f"{place}.experts.{expert}.w2.weight", (hidden, width)
        yield f"{place}.experts.{expert}.w3.weight", (width, hidden)


def qwen(config: Config, number: int) -> Tensors:
    """The first Qwen."""
    hidden, width = config["hidden_size"], config["intermediate_size"] // 2
    for norm in ("ln_1", "ln_2"):
        yield f"{norm}.weight", (hidden,)
    yield "attn.c_attn.weight", (3 * hidden, hidden)
    yield "attn.c_attn.bias", (3 * hidden,)
    yield "attn.c_proj.weight", (hidden, hidden)
    yield "mlp.w1.weight", (width, hidden)
    yield "mlp.w2.weight", (width, hidden)
    yield "mlp.c_proj.weight", (hidden, width)


def internlm2(config: Config, number: int) -> Tensors:
    """InternLM2.5."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    for norm in ("attention_norm", "ffn_norm"):
        yield f"{norm}.weight", (hidden,)
    yield "attention.wqkv.weight", (heads * head_dim(config), hidden)
    yield "attention.wo.weight", (hidden, hidden)
    yield "feed_forward.w1.weight", (width, hidden)
    yield "feed_forward.w2.weight", (hidden, width)
    yield "feed_forward.w3.weight", (width, hidden)


ENDS: Mapping[str, tuple[str, str, str, str]] = {
    "qwen": ("transformer.wte", "transformer.ln_f", "lm_head", "transformer.h"),
    "internlm2": ("model.tok_embeddings", "model.norm", "output", "model.layers"),
}
"""Embedding, last norm, output matrix and layers by `model_type`, where they are not called as in LLaMA."""

LAYERS: Mapping[str, Callable[[Config, int], Tensors]] = {
    "llama": dense,
    "qwen": qwen,
    "internlm2": internlm2,
    "mimo": dense,
    "qwen2": dense,
    "qwen3": dense,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "deepseek_v32": deepseek,
    "glm4_moe": glm4_moe,
    "glm_moe_dsa": deepseek,
    "minimax_m2": minimax_m2,
}
"""Tensors of layer `number` by `model_type`."""
