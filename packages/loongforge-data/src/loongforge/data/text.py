"""The `text` source: pre-training windows over documents of one or several files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loongforge.core.data.contract import Contents, Sample, SourceRequest
from loongforge.core.errors import DataError
from loongforge.data.blend import Blend, PathGroup, parse_paths, split_range, told_epochs
from loongforge.data.corpus import Corpus, Windows
from loongforge.data.documents import write_documents
from loongforge.data.engine import Local
from loongforge.data.indexed import IndexedFile
from loongforge.data.once import build_once
from loongforge.data.parts import TEXT_SUFFIXES, TextRules
from loongforge.data.permute import derive_key
from loongforge.data.row_files import row_files, stamps
from loongforge.data.tokenise import TokenizerChoice, spare_workers


class TextSource:
    """Windows of `seq_length + 1` tokens over documents, shuffled per epoch and blended by weight.

    Positions count from 0 in every window and documents in a window attend to each other, as in Megatron.
    """

    def __init__(
        self, request: SourceRequest, corpora: list[Corpus], paths: list[PathGroup], facts: dict[str, str]
    ) -> None:
        self._request = request
        self._corpora = corpora
        self._paths = paths
        self._facts = facts
        self._blend = Blend([group.weight for group in paths])
        self._eod = _choice(request).open().eos_id if request.loss_mask_eod else None
        self._windows = [
            Windows(
                corpus,
                seq_length=request.seq_length,
                seed=derive_key(request.seed, number),
                shuffle=request.shuffle,
            )
            for number, corpus in enumerate(corpora)
        ]

    def __len__(self) -> int:
        """Samples asked for; the data repeats in further epochs to reach any number."""
        return self._request.num_samples

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`; `DataError` when a token is outside the model's vocabulary."""
        number, place = self._blend[index]
        stream = self._windows[number][place]
        if int(stream.max()) >= self._request.vocab_size or int(stream.min()) < 0:
            raise DataError(
                f"token id {int(stream.max())} in {self._corpora[number]} is outside the model's vocabulary of "
                f"{self._request.vocab_size}: the data was tokenised for another model."
            )
        length = self._request.seq_length
        tokens = stream[:-1]
        loss_mask = np.ones(length, dtype=np.float32)
        if self._eod is not None:  # as in Megatron: nothing is learned from the end token about the next document
            loss_mask[tokens == self._eod] = 0.0
        return Sample(
            tokens=tokens,
            labels=stream[1:],
            loss_mask=loss_mask,
            position_ids=np.arange(length, dtype=np.int64),
        )

    def contents(self, numbers: Sequence[int]) -> Contents:
        """Every window is as long as a sequence, and what is in it attends to all before it: all cost the same."""
        asked = np.asarray(numbers, dtype=np.int64)
        return Contents(
            documents=asked[:, None],
            samples=np.arange(len(asked)),
            lengths=np.full_like(asked, self._request.seq_length),
            items=np.zeros_like(asked),
            grids=np.empty((0, 3), dtype=np.int64),
        )

    def fill(self, documents: np.ndarray) -> Sample:
        """The one window."""
        return self[int(documents[0, 0])]

    def fingerprint(self) -> Mapping[str, str]:
        """Everything the order and the content of samples depend on."""
        request = self._request
        settings = {"seed": request.seed, "shuffle": request.shuffle, "seq_length": request.seq_length}
        settings |= {"split": request.split, "part": request.part, "loss_mask_eod": request.loss_mask_eod}
        return {"source": "text", **self._facts, **{name: str(value) for name, value in settings.items()}}

    def report(self) -> Mapping[str, Any]:
        """Documents, tokens, and the epochs of every corpus that the samples asked for amount to."""
        tokens = sum(corpus.tokens for corpus in self._corpora)
        documents = sum(corpus.documents for corpus in self._corpora)
        drawn = zip(self._blend.drawn(self._request.num_samples), self._corpora, strict=True)
        epochs = [count * self._request.seq_length / corpus.tokens for count, corpus in drawn]
        return {
            "source": "text",
            "part": self._request.part,
            "documents": documents,
            "tokens": tokens,
            "samples": self._request.num_samples,
            "epochs": told_epochs(self._paths, epochs),
        }


def open_text(request: SourceRequest) -> TextSource:
    """The `text` source. Collective: tokenises files that are not tokenised yet, on the builder alone."""
    groups = parse_paths(request.paths)
    corpora: list[Corpus] = []
    facts: dict[str, str] = {}
    for number, group in enumerate(groups):
        files = [_indexed(path, request) for path in group.paths]
        first, last = split_range(request.split, request.part, sum(file.documents for file in files))
        corpora.append(Corpus(files, first, last))
        facts[f"data.{number}"] = " ".join(file.digest() for file in files)
    facts["weights"] = " ".join(f"{group.weight:g}" for group in groups)
    return TextSource(request, corpora, groups, facts)


def _choice(request: SourceRequest) -> TokenizerChoice:
    return TokenizerChoice(path=request.tokenizer_path, kind=request.tokenizer_type, vocab_size=request.vocab_size)


def _indexed(path: str, request: SourceRequest) -> IndexedFile:
    """The `.bin/.idx` pair of a path, tokenised into the cache first when it is text or rows."""
    file = Path(path)
    if file.suffix not in TEXT_SUFFIXES and (not file.is_dir() or Path(f"{path}.idx").exists()):
        return IndexedFile(path)
    if file.suffix == ".txt" and not file.is_file():
        raise DataError(f"no file {file}.")
    files = [file] if file.suffix == ".txt" else row_files(file)
    choice = _choice(request)
    parts = (stamps(files), choice.open().identity(), request.text_field, request.vocab_size)
    key = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
    prefix = request.cache / f"{file.stem}-{key}"

    def build() -> None:
        rules = TextRules(choice=choice, fields=(request.text_field,), append_eod=True)
        write_documents(files, [str(prefix)], rules, Local(workers=max(spare_workers(one) for one in files)))

    build_once(prefix.with_name(prefix.name + ".idx"), build, is_builder=request.is_builder, barrier=request.barrier)
    return IndexedFile(str(prefix))
