"""Our model against the class of transformers that `config.json` names: logits, loss and every gradient."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

from loongforge.core.testing.conformance.layouts import TOLERANCE, gradients_agree
from loongforge.core.testing.conformance.report import Skipped
from loongforge.core.testing.conformance.subject import Subject
from loongforge.core.testing.conformance.transformers_side import GRADIENTS, LOGITS, RESULT, UNKNOWN

_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from loongforge.core.testing.conformance.transformers_side import run
sys.exit(run(sys.argv[2:]))
"""


def agrees(subject: Subject) -> str:
    """Compare every case with what `layouts.agree` left of one process."""
    import torch

    if find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    folders = [str(case.directory) for case in subject.cases]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _START, json.dumps(sys.path), *folders],
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == UNKNOWN:
        raise Skipped(last)
    assert done.returncode == 0, f"transformers cannot load and run what was exported: {last}"
    worst = 0.0
    for case in subject.cases:
        ours, theirs = torch.load(case.directory / LOGITS), torch.load(case.directory / RESULT)
        assert ours.shape == theirs.shape, f"logits are {tuple(ours.shape)}, transformers' {tuple(theirs.shape)}"
        distance = float((ours - theirs).abs().max() / theirs.abs().max())
        assert distance <= TOLERANCE, (
            f"{case.label} model: logits differ from transformers' by {distance:.1e} of the largest. A weight in the "
            "wrong place, or a block that computes something else, looks like this"
        )
        worst = max(worst, distance, gradients_agree(subject, case, case.directory / GRADIENTS, "transformers"))
    return f"{', '.join(subject.spec.hf_architectures)}: logits and gradients within {worst:.1e}"
