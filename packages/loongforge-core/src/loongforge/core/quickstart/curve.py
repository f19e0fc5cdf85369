"""The trainings in one picture, beside the unigram entropy they must beat."""

from __future__ import annotations

from pathlib import Path

from loongforge.core.watch.metrics import read_metrics


def draw_curves(trainings: dict[str, Path], unigram_entropy: float | None, out: Path) -> None:
    """Draw the `metrics.jsonl` of each training, by title, side by side on one scale into the PNG file `out`.

    The dashed line in the first is `unigram_entropy`, nats per token; none is drawn without one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(trainings), 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no pyplot state
    panels = figure.subplots(1, len(trainings), sharey=True, squeeze=False)[0]
    if unigram_entropy is not None:
        panels[0].axhline(unigram_entropy, color="gray", linestyle="--", linewidth=1, label="unigram entropy")
    panels[0].set_ylabel("loss (nats per token)")
    for panel, (title, metrics) in zip(panels, trainings.items(), strict=True):
        rows = read_metrics(metrics)
        panel.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1, label="training")
        held_out = [(row["step"], row["valid_loss"]) for row in rows if row.get("valid_loss") is not None]
        if held_out:
            panel.plot(*zip(*held_out, strict=True), marker="o", label="held out")
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(out, format="png")
