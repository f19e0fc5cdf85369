"""The corpus: documentation strings of the Python standard library, read from its sources without importing them."""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loongforge.core.errors import DataError

PARTS = ("train", "valid")
"""Names of the files: what is trained on, and what is held out."""
HELD_OUT_SHARE = 40
"""One document in so many is held out."""
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
"""Folders that are no part of the library or hold no documentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One documentation string."""

    name: str
    """Qualified name of what it documents: `shutil.copyfile`."""
    text: str
    """The string, indentation removed."""

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training; decided by the name alone, so it is the same on every machine."""
        digest = hashlib.blake2b(self.name.encode(), digest_size=4).digest()
        return int.from_bytes(digest) % HELD_OUT_SHARE == 0


def standard_library() -> Path:
    """Folder of the standard library's source files."""
    return Path(sysconfig.get_path("stdlib"))


def read_documents(folder: Path) -> list[Document]:
    """Every documentation string below `folder` once, in the order of the file names and of the source.

    A file that is no valid Python (the library ships some on purpose) is skipped. `DataError` when nothing is found.
    """
    documents: dict[str, Document] = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if SKIPPED.isdisjoint(parts):
            module = ".".join(parts).removesuffix(".__init__")
            for document in _of_file(file, module):
                documents.setdefault(document.text, document)
    if not documents:
        raise DataError(
            f"no documentation strings below {folder}: this Python comes without its library's source files. "
            "Use one that has them."
        )
    return list(documents.values())


def write_corpus(documents: list[Document], folder: Path) -> tuple[int, int]:
    """Write `train.jsonl` and `valid.jsonl` (field `text`) into `folder`; the number of documents in each."""
    parts = [[document for document in documents if document.held_out is held_out] for held_out in (False, True)]
    for name, part in zip(PARTS, parts, strict=True):
        write_rows(folder / f"{name}.jsonl", ({"text": f"{one.name}\n\n{one.text}"} for one in part))
    return len(parts[0]), len(parts[1])


def read_texts(file: Path) -> list[str]:
    """The `text` of every row."""
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def write_rows(file: Path, rows: Iterator[dict[str, object]]) -> None:
    """One JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _of_file(file: Path, module: str) -> Iterator[Document]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in the library's own strings
            tree = ast.parse(file.read_bytes(), filename=str(file))
    except (SyntaxError, ValueError):
        return
    yield from _of_node(tree, module)


def _of_node(node: ast.AST, name: str) -> Iterator[Document]:
    """Documents of a node and of everything inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = (ast.get_docstring(node) or "").strip()
        if text:
            yield Document(name=name, text=text)
    for child in ast.iter_child_nodes(node):
        inner = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if inner or isinstance(child, ast.stmt):
            yield from _of_node(child, f"{name}.{child.name}" if inner else name)
