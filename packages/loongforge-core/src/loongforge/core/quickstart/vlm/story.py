"""The story: images -> shards -> tokenizer -> training -> export -> reload -> answers -> contact sheet -> summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loongforge.core.quickstart.screen import Screen
from loongforge.core.quickstart.stages import Facts, Stages
from loongforge.core.quickstart.training import spoken, train
from loongforge.core.quickstart.vlm.places import VlmPlaces
from loongforge.core.quickstart.vlm.recipe import VlmRecipe
from loongforge.core.quickstart.vlm.summary import VlmSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmQuickstart:
    """One run of the stages with what they share."""

    recipe: VlmRecipe
    places: VlmPlaces
    stages: Stages
    screen: Screen
    train_stdout: Any = None
    """Where the progress of the training goes; this process's stdout when None."""

    def run(self) -> VlmSummary:
        """All stages, then the summary; `<output>/summary.json` has the same numbers."""
        from importlib.metadata import version

        recipe, places = self.recipe, self.places
        digits = self.stages.run(
            "digits",
            "Images: handwritten digits as webdataset shards",
            [version("scikit-learn"), recipe.side],
            [places.shards, places.held_out],
            self._digits,
        )
        self.stages.run(
            "tokenizer",
            "Tokenizer, image processor and model.yaml",
            [recipe.vocab_size, recipe.model_yaml(0)],
            [places.tokenizer, places.model_yaml],
            self._tokenizer,
        )
        arguments = recipe.train(places, recipe.held_out_batches(digits["held_out"]))
        trained = self.stages.run(
            "train",
            "Training a small Qwen3-VL from fresh weights",
            arguments,
            [places.train, places.model],
            lambda: self._train(arguments),
        )
        self.screen.say(f"Held-out loss after {trained['steps']} steps: {trained['held_out_loss']:.3f} nats per token.")
        read = self.stages.run(
            "reading", "Reading the held-out images, through transformers", [], [places.sheet], self._reading
        )
        self.screen.say(f"{read['right']} of {read['images']} right; {places.sheet} shows what it reads.")
        self.stages.run("curve", "Drawing the loss curve", [], [places.curve], self._curve)
        return VlmSummary(
            images=read["images"],
            right=read["right"],
            held_out_loss=trained["held_out_loss"],
            stages=tuple(self.stages.records),
            places=places,
        )

    def _digits(self) -> Facts:
        from loongforge.core.quickstart.vlm.digits import read_digits, write_digits

        places = self.places
        trained, held_out = write_digits(read_digits(self.recipe.side), places.shards, places.held_out)
        self.screen.say(f"{trained:,} images to train on, {held_out:,} held out.")
        return {"images": trained, "held_out": held_out}

    def _tokenizer(self) -> Facts:
        from loongforge.core.quickstart.vlm.words import write_words

        recipe, places = self.recipe, self.places
        vocab_size = write_words(recipe.vocab_size, recipe.area, places.tokenizer)
        places.model_yaml.write_text(recipe.model_yaml(vocab_size), encoding="utf-8")
        self.screen.say(f"{vocab_size:,} tokens; the model is in {places.model_yaml}.")
        return {"vocab_size": vocab_size}

    def _train(self, arguments: list[str]) -> Facts:
        from loongforge.core.watch.metrics import read_metrics

        workers = self.recipe.workers
        if workers > 1:
            self.screen.say(
                f"The foundation is split over {workers} workers (TP {workers}); the encoder is whole on each (TP 1) "
                "and shares out the images."
            )
        self.screen.command(spoken(arguments))
        train(arguments, self.places.logs / "train.txt", self.train_stdout)
        last = read_metrics(self.places.train / "metrics.jsonl")[-1]
        return {"held_out_loss": last["valid_loss"], "loss": last["loss"], "steps": last["step"]}

    def _reading(self) -> Facts:
        from loongforge.core.quickstart.vlm.digits import read_held_out
        from loongforge.core.quickstart.vlm.reading import read_images
        from loongforge.core.quickstart.vlm.sheet import draw_sheet

        files, right = zip(*read_held_out(self.places.held_out), strict=True)
        answers = read_images(self.places.model, files)
        draw_sheet(files, answers, right, self.places.sheet)
        misread = {
            file.name: {"answer": answer, "right": wanted}
            for file, answer, wanted in zip(files, answers, right, strict=True)
            if answer != wanted
        }
        return {"images": len(files), "right": len(files) - len(misread), "misread": misread}

    def _curve(self) -> Facts:
        from loongforge.core.quickstart.curve import draw_curves

        draw_curves({"training": self.places.train / "metrics.jsonl"}, None, self.places.curve)
        self.screen.say(str(self.places.curve))
        return {}
