"""Where everything of a quickstart lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Common:
    """What the output directory of either quickstart holds."""

    output: Path

    @property
    def stages(self) -> Path:
        """One file per stage: what it was made of, how long it took, what it found."""
        return self.output / "stages"

    @property
    def logs(self) -> Path:
        """What the trainings wrote on stderr."""
        return self.output / "logs"

    @property
    def tokenizer(self) -> Path:
        """Hugging Face tokenizer."""
        return self.output / "tokenizer"

    @property
    def model_yaml(self) -> Path:
        """Geometry of the model."""
        return self.output / "model.yaml"

    @property
    def model(self) -> Path:
        """Hugging Face directory of the trained model: the result."""
        return self.output / "model"

    @property
    def curve(self) -> Path:
        """Loss of the trainings as a picture."""
        return self.output / "loss.png"

    @property
    def summary(self) -> Path:
        """All numbers, for programs."""
        return self.output / "summary.json"

    @property
    def shared(self) -> tuple[Path, ...]:
        """Everything that either quickstart writes directly below the output directory."""
        return (self.stages, self.logs, self.tokenizer, self.model_yaml, self.model, self.curve, self.summary)


@dataclass(frozen=True, slots=True)
class Places(Common):
    """Files and folders of the quickstart with text."""

    @property
    def corpus(self) -> Path:
        """`train.jsonl` and `valid.jsonl` of pre-training."""
        return self.output / "corpus"

    @property
    def questions(self) -> Path:
        """`train.jsonl` and `valid.jsonl` of fine-tuning."""
        return self.output / "questions"

    @property
    def pretrain(self) -> Path:
        """Run of pre-training: checkpoints, metrics.jsonl, config.yaml."""
        return self.output / "pretrain"

    @property
    def pretrained(self) -> Path:
        """Hugging Face directory after pre-training."""
        return self.pretrain / "hf"

    @property
    def finetune(self) -> Path:
        """Run of fine-tuning."""
        return self.output / "finetune"

    @property
    def entries(self) -> tuple[Path, ...]:
        """Everything a quickstart writes directly below the output directory."""
        return (*self.shared, self.corpus, self.questions, self.pretrain, self.finetune)
