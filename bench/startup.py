"""Seconds from the command to the first finished step, and to each stage on the way.

    uv run python bench/startup.py [--nproc-per-node 2]

The peer is what nobody can avoid: `import torch; import transformers; AutoModelForCausalLM` and one step of the same
tiny model in one process. Both numbers come from the same run; the ratio is ours / theirs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tokens = torch.randint(64, (1, 32))
model(input_ids=tokens, labels=tokens).loss.backward()
optimizer.step()
"""
MAKE = """
import sys
from transformers import Qwen3Config, Qwen3ForCausalLM
Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64)).save_pretrained(sys.argv[1])
"""


def timed(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Take turns three times and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    loongforge = str(Path(sys.executable).parent / "loongforge")
    with tempfile.TemporaryDirectory(prefix="loongforge-bench-") as directory:
        timed([sys.executable, "-W", "ignore", "-c", MAKE, directory])
        train = [
            loongforge, "train", "--load", directory, "--fp32", "--seq-length", "32", "--train-iters", "1",
            "--nproc-per-node", str(arguments.nproc_per_node), "data.source=mock",
        ]  # fmt: skip
        rows: dict[str, list[float]] = {"list": [], "plan": [], "train": [], "peer": []}
        for _ in range(arguments.rounds):
            rows["list"].append(timed([loongforge, "list", "models"]))
            rows["plan"].append(timed([loongforge, "plan", *train[2:]]))
            rows["train"].append(timed(train))
            rows["peer"].append(timed([sys.executable, "-W", "ignore", "-c", PEER, directory]))
    middle = {name: sorted(values)[len(values) // 2] for name, values in rows.items()}
    for name, seconds in middle.items():
        print(f"{name:>6} {seconds:6.2f} s")
    print(f"train / peer {middle['train'] / middle['peer']:.2f}")


if __name__ == "__main__":
    main()
