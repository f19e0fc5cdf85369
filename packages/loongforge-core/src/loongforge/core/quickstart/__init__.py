"""`loongforge quickstart`: a small model from nothing to answers, through the commands a user has."""

from loongforge.core.quickstart.places import Places
from loongforge.core.quickstart.recipe import Recipe
from loongforge.core.quickstart.screen import Screen
from loongforge.core.quickstart.stages import Stages
from loongforge.core.quickstart.story import Quickstart
from loongforge.core.quickstart.summary import Summary

__all__ = ["Places", "Quickstart", "Recipe", "Screen", "Stages", "Summary"]
