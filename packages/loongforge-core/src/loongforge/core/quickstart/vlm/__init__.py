"""`loongforge quickstart --vlm`: a small model that sees learns to read real handwritten digits."""

from loongforge.core.quickstart.vlm.places import VlmPlaces
from loongforge.core.quickstart.vlm.recipe import VlmRecipe
from loongforge.core.quickstart.vlm.story import VlmQuickstart
from loongforge.core.quickstart.vlm.summary import VlmSummary

__all__ = ["VlmPlaces", "VlmQuickstart", "VlmRecipe", "VlmSummary"]
