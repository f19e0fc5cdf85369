"""What we test with, shipped so that other wheels can pass the same gates.

`run_distributed` runs a function in several processes, on the platform of LOONGFORGE_PLATFORM; `fp32_tolerance` is what
rounding takes there; `check_family` is the conformance kit of a model family:

    def test_family_conforms(tmp_path):
        print(check_family("acme_llama", directory=tmp_path))
"""

from __future__ import annotations

from loongforge.core.testing.conformance import FamilyReport, Outcome, check_family
from loongforge.core.testing.distributed import run_distributed
from loongforge.core.testing.tolerance import fp32_tolerance

__all__ = ["FamilyReport", "Outcome", "check_family", "fp32_tolerance", "run_distributed"]
