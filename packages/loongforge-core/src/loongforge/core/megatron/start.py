"""Bring megatron-core up on a platform, once per process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from loongforge.core.platform import Platform


def start_megatron(platform: Platform) -> None:
    """Let the platform answer the device, import megatron-core, then repair what it needs TransformerEngine for.

    Safe to call again. Warnings that megatron-core prints about absent Apex and TransformerEngine are dropped here,
    because the layer choice is printed in one line by `core.megatron.specs`.
    """
    with warnings.catch_warnings(), _quiet("torch.utils.cpp_extension"):
        warnings.simplefilter("ignore")
        platform.activate()
        import megatron.core.distributed
        import megatron.core.inference.contexts
        import megatron.core.models.backends
        import megatron.core.models.mimo.model.base
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel
        import megatron.core.transformer.transformer_block  # noqa: F401

        platform.after_import()
        from loongforge.core.megatron.repairs import install_repairs

        install_repairs()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    # A rank whose parameters are all frozen has none; what trains is printed.
    warnings.filterwarnings("ignore", "WARNING: there is no optimizer on RANK")
    # Advice about the order in which upstream's attention registers its own layers: nobody who trains can follow it.
    warnings.filterwarnings("ignore", "The next bucket's parameter all-gather operation has already been dispatched")


def preload(platform: Platform) -> None:
    """Import once, before workers are forked, what each of them would import: seconds of a processor's time."""
    start_megatron(platform)

    import torch._dynamo  # noqa: F401  what torch's optimizers import when one is made

    import loongforge.core.checkpoint.load
    import loongforge.core.data.open
    import loongforge.core.megatron.language_model
    import loongforge.core.model.build
    import loongforge.core.run
    import loongforge.core.step.forward
    import loongforge.core.step.optimizer  # noqa: F401


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Errors alone from the logger `name`.

    `torch.utils.cpp_extension` looks for a CUDA compiler when megatron-core imports it and says so on the terminal;
    nothing is compiled then, and where something is later, its own error names what is absent.
    """
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
