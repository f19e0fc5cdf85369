"""The loss curve as a picture."""

from __future__ import annotations

from pathlib import Path

from loongforge.core.errors import DataError
from loongforge.core.watch.metrics import read_metrics


def draw_curve(metrics: Path, out: Path) -> None:
    """Draw loss, and every other number whose name ends in `loss`, over steps into the PNG file `out`.

    Needs matplotlib (extra `quickstart`). `DataError` when the file holds no step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    if not rows:
        raise DataError(f"{metrics} holds no steps yet; train before drawing.")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no pyplot state
    axes = figure.add_subplot()
    for name in sorted(
        {key for row in rows for key in row if key.endswith("loss")}, key=lambda key: (key != "loss", key)
    ):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            dense = name == "loss"
            axes.plot(steps, values, label=name, linewidth=1.2, marker="" if dense and len(points) > 1 else "o")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
