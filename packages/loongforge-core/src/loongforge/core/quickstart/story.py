"""The story of a quickstart: corpus -> tokenizer -> pre-training -> fine-tuning -> answers -> loss curve -> summary."""

from __future__ import annotations

import platform as python
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loongforge.core.quickstart.corpus import PARTS, read_documents, read_texts, standard_library, write_corpus
from loongforge.core.quickstart.places import Places
from loongforge.core.quickstart.questions import read_questions, write_questions
from loongforge.core.quickstart.recipe import Recipe
from loongforge.core.quickstart.screen import Screen
from loongforge.core.quickstart.stages import Facts, Stages
from loongforge.core.quickstart.summary import Summary
from loongforge.core.quickstart.training import spoken, train

QUESTIONS = 3
"""Questions asked from the held-out ones, and as many from those trained on."""
LONGEST_ANSWER = 40
"""Tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quickstart:
    """One run of the stages with what they share."""

    recipe: Recipe
    places: Places
    stages: Stages
    screen: Screen
    train_stdout: Any = None
    """Where the progress of the trainings goes; this process's stdout when None."""

    def run(self) -> Summary:
        """All stages, then the summary; `<output>/summary.json` has the same numbers."""
        recipe, places = self.recipe, self.places
        self.stages.run(
            "corpus",
            "Corpus: the documentation strings of Python's standard library",
            [python.python_version(), str(standard_library())],
            [places.corpus, places.questions],
            self._corpus,
        )
        tokens = self.stages.run(
            "tokenizer",
            "Tokenizer: byte-level BPE, and the unigram entropy to beat",
            [recipe.vocab_size, recipe.seq_length, recipe.global_batch_size, recipe.model_yaml(0)],
            [places.tokenizer, places.model_yaml],
            self._tokenizer,
        )
        pretrain = recipe.pretrain(places, tokens["held_out_batches"])
        first = self._train("pretrain", "Pre-training a small Qwen3 from fresh weights", pretrain, [places.pretrain])
        finetune = recipe.finetune(places, tokens["sft_held_out_batches"])
        owned = [places.finetune, places.model]
        second = self._train("finetune", "Fine-tuning it on questions and answers", finetune, owned)
        self.stages.run("curve", "Drawing the loss curve", [], [places.curve], self._curve)
        answers = self.stages.run("answers", "Asking it, through transformers", [], [], self._answers)
        self._show(answers)
        return Summary(
            unigram_entropy=tokens["unigram_entropy"],
            held_out_loss=first["held_out_loss"],
            sft_held_out_loss=second["held_out_loss"],
            stages=tuple(self.stages.records),
            places=places,
        )

    def _corpus(self) -> Facts:
        documents = read_documents(standard_library())
        trained, held_out = write_corpus(documents, self.places.corpus)
        asked, asked_held_out = write_questions(documents, self.places.questions)
        self.screen.say(
            f"{trained:,} documents and {asked:,} questions to train on, {held_out:,} and {asked_held_out:,} held out."
        )
        return {"documents": trained, "held_out": held_out, "questions": asked, "questions_held_out": asked_held_out}

    def _tokenizer(self) -> Facts:
        from loongforge.core.quickstart.entropy import unigram_entropy
        from loongforge.core.quickstart.tokenizer import token_stream, train_tokenizer

        recipe, places = self.recipe, self.places
        texts = read_texts(places.corpus / "train.jsonl")
        vocab_size = train_tokenizer(texts, recipe.vocab_size, places.tokenizer)
        places.model_yaml.write_text(recipe.model_yaml(vocab_size), encoding="utf-8")
        trained = token_stream(places.tokenizer, texts)
        held_out = token_stream(places.tokenizer, read_texts(places.corpus / "valid.jsonl"))
        batches = recipe.held_out_batches(len(held_out))
        # Evaluation predicts exactly these: the first token of the stream has nothing before it.
        predicted = held_out[1 : 1 + batches * recipe.tokens_per_step]
        entropy = unigram_entropy(trained, predicted, vocab_size)
        self.screen.say(f"{vocab_size:,} tokens know {len(trained):,} tokens of text; held out {len(predicted):,}.")
        self.screen.say(f"Unigram entropy of the held-out text: {entropy:.3f} nats per token.")
        questions = read_questions(places.questions / "valid.jsonl")
        said = token_stream(places.tokenizer, [one.question + one.answer for one in questions])
        return {
            "vocab_size": vocab_size,
            "tokens": len(trained),
            "held_out_tokens": len(predicted),
            "held_out_batches": batches,
            "sft_held_out_batches": recipe.held_out_batches(len(said)),
            "unigram_entropy": entropy,
        }

    def _train(self, name: str, title: str, arguments: list[str], owns: Sequence[Path]) -> Facts:
        def work() -> Facts:
            from loongforge.core.watch.metrics import read_metrics

            self.screen.command(spoken(arguments))
            train(arguments, self.places.logs / f"{name}.txt", self.train_stdout)
            last = read_metrics(owns[0] / "metrics.jsonl")[-1]
            return {"held_out_loss": last["valid_loss"], "loss": last["loss"], "steps": last["step"]}

        facts = self.stages.run(name, title, arguments, owns, work)
        self.screen.say(f"Held-out loss after {facts['steps']} steps: {facts['held_out_loss']:.3f} nats per token.")
        return facts

    def _curve(self) -> Facts:
        from loongforge.core.quickstart.curve import draw_curves

        places = self.places
        trainings = {"pre-training": places.pretrain, "fine-tuning": places.finetune}
        entropy = self.stages.facts("tokenizer")["unigram_entropy"]
        draw_curves({title: run / "metrics.jsonl" for title, run in trainings.items()}, entropy, places.curve)
        self.screen.say(str(places.curve))
        return {}

    def _answers(self) -> Facts:
        from loongforge.core.quickstart.answers import ask

        trained, held_out = (read_questions(self.places.questions / f"{part}.jsonl", QUESTIONS) for part in PARTS)
        answers = ask(self.places.model, [*trained, *held_out], LONGEST_ANSWER)
        return {"answers": [asdict(answer) for answer in answers], "held_out": len(held_out)}

    def _show(self, facts: Facts) -> None:
        answers = facts["answers"]
        for number, one in enumerate(answers):
            held_out = number >= len(answers) - facts["held_out"]
            self.screen.say("")
            self.screen.say(f"Q ({'held out' if held_out else 'trained on'}): {one['question']}")
            self.screen.say(f"A: {one['answer']}")
            self.screen.say(f"documentation: {one['documentation']}")
