"""LLaMA as a megatron-core module: the language model that LoongForge ships, with this family's geometry."""

from acme_llama.config import LlamaConfig
from loongforge.core.megatron.language_model import LanguageModel, build_language_model
from loongforge.core.model.contract import BuildContext


def build(config: LlamaConfig, context: BuildContext) -> LanguageModel:
    """One pipeline chunk of the model."""
    return build_language_model(config.geometry(), context)
