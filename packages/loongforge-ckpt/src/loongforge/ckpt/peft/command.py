"""`loongforge merge-adapter BASE ADAPTER OUT`: a model with its adapters in its weights, or without them again."""

from __future__ import annotations

import json
from pathlib import Path

from loongforge.core.errors import ConfigError

USAGE = """\
usage: loongforge merge-adapter BASE ADAPTER OUT [--unmerge] [--json]

BASE a Hugging Face directory, ADAPTER a PEFT directory (`adapter_config.json`, `adapter_model.safetensors`) trained on
it: writes the Hugging Face directory OUT, whose matrices are W + scale x B A, computed in fp32 and rounded once to W's
own type. OUT is what transformers and every inference engine load without PEFT.

  --unmerge  BASE is a merged model: take the adapter out of it, W - scale x B A. What rounding lost does not come
             back: in fp32 the numbers agree to about 1e-7 of the largest one, in bf16 to 4e-3. Keep the base where
             bits count.
  --json     print what was done as JSON.

examples:
  loongforge merge-adapter Qwen3-0.6B runs/lora/hf Qwen3-0.6B-merged
  loongforge merge-adapter Qwen3-0.6B-merged runs/lora/hf Qwen3-0.6B-again --unmerge

One matrix at a time is in memory, whatever the size of the model.
"""

FLAGS = ("--unmerge", "--json")


def command(argv: list[str]) -> int:
    """Merge; 0 when OUT is complete."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return 0
    words = [word for word in argv if not word.startswith("-")]
    unknown = [word for word in argv if word.startswith("-") and word not in FLAGS]
    if unknown:
        raise ConfigError(f"merge-adapter: unknown flag {unknown[0]!r}; there are {' and '.join(FLAGS)}.")
    if len(words) != 3:
        raise ConfigError("merge-adapter: three directories are needed: loongforge merge-adapter BASE ADAPTER OUT.")
    from loongforge.ckpt.peft.merge import merge, refuse_target

    base, adapter, target = (Path(word).expanduser() for word in words)
    if problem := refuse_target(base, target):
        raise ConfigError(f"merge-adapter: {problem}")
    as_json = "--json" in argv
    done = merge(base, adapter, target, -1 if "--unmerge" in argv else 1, (lambda _: None) if as_json else _tell)
    if as_json:
        facts = {"matrices": done.matrices, "bytes": done.bytes, "seconds": done.seconds, "path": str(target)}
        print(json.dumps(facts))
    else:
        verb = "without" if "--unmerge" in argv else "with"
        print(f"Wrote {target}: {done.matrices} matrices {verb} their adapters, {done.bytes / 1e9:.3f} GB.")
    return 0


def _tell(file: str) -> None:
    print(f"wrote {file}")
