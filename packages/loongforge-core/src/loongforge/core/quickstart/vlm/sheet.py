"""A contact sheet: held-out images with what the model reads in them, mistakes first and in red."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

COLUMNS, ROWS = 12, 8


def draw_sheet(files: Sequence[Path], answers: Sequence[str], right: Sequence[str], out: Path) -> None:
    """Draw up to 96 images, each above its answer, into the PNG file `out`."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    wrong = [number for number, answer in enumerate(answers) if answer != right[number]]
    others = [number for number in range(len(files)) if answers[number] == right[number]]
    shown = [*wrong, *others][: COLUMNS * ROWS]
    figure = Figure(figsize=(COLUMNS, 1.2 * ROWS + 0.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no pyplot state
    figure.suptitle(
        f"{len(files)} held-out images, {len(wrong)} misread" + (" (red, with the right answer)" if wrong else "")
    )
    panels = figure.subplots(ROWS, COLUMNS)
    for panel in panels.flat:
        panel.axis("off")
    for panel, number in zip(panels.flat, shown, strict=False):
        with Image.open(files[number]) as image:
            panel.imshow(np.asarray(image.convert("L")), cmap="gray_r")
        mistaken = answers[number] != right[number]
        text = f"{answers[number]!r}, not {right[number]}" if mistaken else answers[number]
        panel.set_title(text, fontsize=8, color="red" if mistaken else "black", parse_math=False)
    figure.savefig(out, format="png")
