"""The language model every text family shares: embedding, decoder block, further prediction layers, output layer, loss.

One class over megatron-core's parts, so that no family depends on `GPTModel` (deprecated upstream) or `HybridModel`
(without multimodal rotary embedding). Families add blocks through the spec, not through subclasses.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlock

from loongforge.core.megatron.deepstack import levels_context
from loongforge.core.megatron.layers import PackedRow
from loongforge.core.megatron.positions import Rotary
from loongforge.core.megatron.prediction import prediction_block
from loongforge.core.megatron.specs import block_spec
from loongforge.core.megatron.visual import merge
from loongforge.core.model.contract import Ahead, BuildContext, Visual
from loongforge.core.model.geometry import TransformerGeometry


class OutputLayer(tensor_parallel.ColumnParallelLinear):
    """Hidden states to logits, or straight to losses, so that logits never exist as a whole.

    The loss is computed inside this module's own call because megatron-core's parameter gather waits in the hooks of
    the module that owns a parameter.
    """

    def __init__(self, *args: Any, linear_cross_entropy: Any, tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_cross_entropy = linear_cross_entropy
        group: Any = self.tp_group  # upstream annotates as optional what its constructor fills in
        each = self.output_size_per_partition
        # Rows that pad the vocabulary are left out: loss and gradients must not depend on the tensor parallel size.
        self.rows = tuple(min(max(0, tokens - rank * each), each) for rank in range(group.size()))

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[S, B, H]` to logits `[S, B, V / tp]`, or with labels `[B, S]` to losses `[B, S]`; the bias is None.

        S is divided by tp under sequence parallelism. The gradient of losses with a `loss_mask` has to be the mask
        times one number: no step waits to find out, and every gradient of other losses is NaN.
        """
        if labels is None:
            return super().forward(input_, weight)
        whole: Any = self.weight if weight is None else weight  # upstream annotates its own as optional
        group: Any = self.tp_group
        mine = self.rows[group.rank()]
        matrix = whole if mine == len(whole) else whole[:mine]  # the gradient of a part is padded, which copies it
        mask = None if loss_mask is None else loss_mask.t()
        shared = {}
        if group.size() > 1:
            # The gather's gradient sums what the ranks find.
            shared = {"tp_group": group, "tp_rows": self.rows, "sum_hidden": not self.sequence_parallel}
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, group=group)
        losses = self.linear_cross_entropy(input_, matrix, labels.t(), mask, proportional=mask is not None, **shared)
        return losses.t(), None


class LanguageModel(LanguageModule):
    """One pipeline chunk of a decoder-only transformer."""

    def __init__(self, geometry: TransformerGeometry, context: BuildContext) -> None:
        config: Any = context.config  # upstream annotates as optional what its constructor fills in
        groups = context.groups
        super().__init__(config=config, pg_collection=groups)
        self.model_type = ModelType.encoder_or_decoder  # megatron-core's schedules ask
        self.pre_process, self.post_process = context.pre_process, context.post_process
        self.vp_stage = context.vp_stage
        self.share_embeddings_and_output_weights = geometry.tie_word_embeddings
        self.vocab_size = context.padded_vocab_size
        self.tp_rank, self.tp_size = groups.tp.rank(), groups.tp.size()
        # Further layers embed tokens too: the last stage has a copy of the embedding, which megatron-core keeps equal.
        self.mtp_process = self.post_process and geometry.prediction_layers > 0  # its helpers ask for this name
        if self.pre_process or self.mtp_process:
            self.embedding = LanguageModelEmbedding(
                config=config, vocab_size=self.vocab_size, max_sequence_length=context.seq_length,
                position_embedding_type="rope", tp_group=groups.tp,
            )  # fmt: skip
        # Latent attention turns its own part of each head.
        self.rotary = None if geometry.latent else Rotary(geometry, groups.cp)
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(
                config, context.layers, context.vp_stage, geometry, context.deepstack, pp_rank=groups.pp.rank()
            ),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups,
            vp_stage=context.vp_stage,
        )
        self.deepstack = context.deepstack
        # Levels do not travel between stages.
        assert not self.pre_process or len(self.decoder.layers) >= context.deepstack, (
            f"the first chunk's {len(self.decoder.layers)} layers cannot add {context.deepstack} deepstack levels"
        )
        if self.mtp_process:  # megatron-core's schedules look into whatever has this name
            self.mtp = prediction_block(geometry, context)
        if self.post_process:
            self.output_layer = OutputLayer(
                config.hidden_size, self.vocab_size, config=config, init_method=config.init_method, bias=False,
                skip_bias_add=False, gather_output=False, tp_group=groups.tp,
                linear_cross_entropy=context.layers.linear_cross_entropy, tokens=geometry.vocab_size,
                skip_weight_param_allocation=self.share_embeddings_and_output_weights
                and (self.pre_process or self.mtp_process),
            )  # fmt: skip
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hidden states from the previous stage; called by the pipeline schedule."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        packed: PackedRow | None = None,
        loss_mask: torch.Tensor | None = None,
        visual: Visual | None = None,
        ahead: Ahead | None = None,
    ) -> torch.Tensor:
        """Tokens int64 `[B, S]` to hidden `[S, B, H]` before the last stage; position ids `[B, S]` or `[3, B, S]`.

        On the last stage the loss of every token, fp32 `[B, S]`; without labels the logits of this tensor parallel
        rank, `[B, S, V / tp]`. `loss_mask` `[B, S]` says in what proportion the caller weights the losses: it changes
        no loss, but weighted otherwise they give gradients of NaN. `visual` goes to the first chunk alone: its features
        replace the embeddings at their positions. With `ahead` the last stage's answer has one more dimension in
        front, `[1 + D, ...]`: the model's own, then each depth's.
        """
        hidden = self._embed(tokens, position_ids, visual) if self.pre_process else None
        rotary = None if self.rotary is None else self.rotary(tokens, position_ids, packed)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=packed,
            **levels_context(visual, self.config.params_dtype),
        )
        if not self.post_process:
            return hidden
        if ahead is None:
            return self._answer(hidden, labels, loss_mask)
        assert self.mtp_process, "the geometry has further layers where a batch says what they see"
        everything = self.mtp(
            input_ids=ahead.tokens, position_ids=None, hidden_states=hidden, attention_mask=None,
            rotary_pos_emb=rotary, packed_seq_params=packed, embedding=self.embedding,
        )  # fmt: skip
        own, *further = everything.chunk(1 + len(ahead.tokens))
        answers = [self._answer(own, labels, loss_mask)]
        for depth, one in enumerate(further):
            asked = None if labels is None else ahead.labels[depth]
            answers.append(self._answer(one, asked, ahead.loss_mask[depth]))
        return torch.stack(answers)

    def _answer(
        self, hidden: torch.Tensor, labels: torch.Tensor | None, loss_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Normed hidden states `[S, B, H]` to losses `[B, S]`, or without labels to logits `[B, S, V / tp]`."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if labels is not None:
            return self.output_layer(hidden, weight=weight, labels=labels, loss_mask=loss_mask)[0]
        logits, _ = self.output_layer(hidden, weight=weight)
        return self._without_padding(logits).transpose(0, 1)

    def _embed(self, tokens: torch.Tensor, position_ids: torch.Tensor | None, visual: Visual | None) -> torch.Tensor:
        hidden = self.embedding(input_ids=tokens, position_ids=position_ids)
        if visual is not None:
            levels = visual.rows.size(1) - 1
            assert levels == self.deepstack, (
                f"features have {levels} deepstack levels, the model takes {self.deepstack}"
            )
            hidden = merge(hidden, visual)
        if self._needs_gradient(hidden):
            hidden.requires_grad_()
        return hidden

    def _needs_gradient(self, hidden: torch.Tensor) -> bool:
        """Whether a gradient is asked for of the hidden states of a frozen embedding.

        Recomputation records no graph when none of its inputs needs a gradient: what it covers would silently not
        train. The backward pass of a pipeline begins at the output of every stage, one that is all frozen too.
        """
        frozen = not hidden.requires_grad and torch.is_grad_enabled()
        return frozen and (
            self.config.recompute_granularity is not None or self.config.pipeline_model_parallel_size > 1
        )

    def _without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Rule out the rows that pad the vocabulary. `[S, B, V / tp]` to the same."""
        valid = self.output_layer.rows[self.tp_rank]
        if valid == logits.size(-1):
            return logits
        padding = torch.arange(logits.size(-1), device=logits.device) >= valid
        return logits.masked_fill(padding, float("-inf"))


def build_language_model(geometry: TransformerGeometry, context: BuildContext) -> LanguageModel:
    """One pipeline chunk; what a family's `build` returns when it adds nothing."""
    return LanguageModel(geometry, context)
