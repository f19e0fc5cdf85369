"""Draw `docs/balance.svg`: what each rank of a step does, dealt by position and by `data.balance`.

    uv run python bench/balance_picture.py [--out docs/balance.svg]

Eight ranks, four micro-batches of one packed sequence of 32768, the mix `sft_mix` of `length_mix.py`, times from the
arithmetic of Qwen3-VL-8B. Nothing is trained; the same command draws the same picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from length_mix import CAPACITY, load

from loongforge.core.config.resolve import resolve
from loongforge.core.data.contract import Contents
from loongforge.core.plan import Plan
from loongforge.data.balance.cost import AnalyticCost
from loongforge.data.balance.step import open_analytic
from loongforge.data.pack import Packs

RANKS, PARTS = 8, 4
WIDTH, ROW, GAP, LEFT, TOP = 620, 15, 4, 60, 26
COLOURS = {"foundation": ("#3b6ea5", "#6f9bc8"), "encoder": ("#d08a2e", "#e3b06b"), "waits": ("#e6e6e6", "#e6e6e6")}


def step() -> tuple[Plan, Contents]:
    """The plan of the run, and what the first samples of a packed set hold."""
    words = ["--model-name", "qwen3_vl_8b", "--training-phase", "sft", "--train-iters", "1", "--mock-data"]
    words += ["--seq-length", str(CAPACITY), "--global-batch-size", str(RANKS * PARTS), "--balance", "analytic"]
    plan = Plan.of(resolve(words, note=lambda _: None), RANKS)
    samples, _ = load("sft_mix", 4 * RANKS, PARTS, 0)
    packs = Packs.fit(samples.tokens, CAPACITY)
    chosen = [packs[number] for number in np.random.default_rng(3).permutation(len(packs))[: RANKS * PARTS]]
    documents = np.concatenate(chosen)
    sides = np.maximum(2, 2 * np.rint(np.sqrt(samples.visual[documents])).astype(np.int64))
    seen = samples.visual[documents] > 0
    return plan, Contents(
        documents=documents[:, None],
        samples=np.repeat(np.arange(len(chosen)), [len(one) for one in chosen]),
        lengths=samples.tokens[documents],
        items=seen.astype(np.int64),
        grids=np.stack([np.ones_like(sides), sides, sides], axis=1)[seen],
    )


def loads(plan: Plan, contents: Contents, sequences: np.ndarray) -> np.ndarray:
    """Work of each rank, micro-batch and component, float64 `[ranks, parts, 2]`: encoder, foundation."""
    cost = AnalyticCost(plan)
    encoder = np.zeros(len(sequences))
    encoder[contents.items > 0] = cost.encoder(contents.grids)
    room = CAPACITY - np.bincount(sequences, contents.lengths, RANKS * PARTS)
    foundation = np.bincount(sequences, cost.foundation(contents.lengths), RANKS * PARTS) + cost.foundation(room)
    both = [np.bincount(sequences, encoder, RANKS * PARTS), foundation]
    return np.stack(both, axis=1).reshape(RANKS, PARTS, 2)


def bars(work: np.ndarray, scale: float, top: int, title: str) -> list[str]:
    """A row of bars for each rank, grey where it waits for the slowest."""
    end = float(work.sum(axis=(1, 2)).max())
    lines = [f'<text x="{LEFT}" y="{top - 8}" class="title">{title}</text>']
    for rank in range(RANKS):
        y, x = top + rank * (ROW + GAP), float(LEFT)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">rank {rank}</text>')
        for part in range(PARTS):
            for name, amount in zip(("encoder", "foundation"), work[rank, part], strict=True):
                lines.append(_bar(x, y, amount * scale, COLOURS[name][part % 2]))
                x += amount * scale
        lines.append(_bar(x, y, end * scale - (x - LEFT), COLOURS["waits"][0]))
    return lines


def _bar(x: float, y: float, width: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{max(0.0, width):.1f}" height="{ROW}" fill="{colour}"/>'


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/balance.svg")
    options = parser.parse_args()
    plan, contents = step()
    deal = open_analytic(plan)(contents)
    part, rank = np.divmod(contents.samples, RANKS)
    before, after = (loads(plan, contents, one) for one in (rank * PARTS + part, deal.sequences))
    ends = [float(one.sum(axis=(1, 2)).max()) for one in (before, after)]
    scale, height = WIDTH / max(ends), TOP + RANKS * (ROW + GAP)
    saved = 1 - ends[1] / ends[0]
    lines = bars(before, scale, TOP, "by position")
    lines += bars(after, scale, height + TOP, f"dealt by cost: the step is {saved:.0%} shorter")
    for number, (name, colours) in enumerate(COLOURS.items()):
        x = LEFT + 130 * number
        lines += [_bar(x, 2 * height + 12, 14, colours[0]), f'<text x="{x + 20}" y="{2 * height + 24}">{name}</text>']
    body = "\n".join(lines)
    options.out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {2 * height + 36}" '
        'font-family="sans-serif" font-size="11">\n<style>.title { font-weight: bold }</style>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
    print(f"{options.out}: {ends[1] / ends[0]:.3f} of the step by position; {dict(deal.numbers)}")


if __name__ == "__main__":
    main()
