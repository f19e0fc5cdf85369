"""`loongforge new-model`: a package of one's own that begins as a registered language model."""

from __future__ import annotations

from pathlib import Path

from loongforge.core import plugins
from loongforge.core.cli import arguments
from loongforge.core.scaffold.package import scaffold


def command(argv: list[str]) -> int:
    """Write the package and say what comes next; 0."""
    parser = arguments.parser("new-model", "acme_llama --like qwen3", "acme_moe --like qwen3_moe --output acme-moe")
    parser.add_argument("name", metavar="NAME", help="of the package and of the model: lower case, digits and _")
    parser.add_argument("--like", metavar="FAMILY", required=True, help="as in loongforge list models")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="a new folder; NAME with dashes when left out")
    asked = parser.parse_args(argv)
    like = plugins.pick("models", asked.like)
    folder = asked.output or Path(asked.name.replace("_", "-"))
    written = scaffold(asked.name, like, folder)
    print("\n".join(f"wrote {path}" for path in written))
    print(f"next: cd {folder} && pip install -e '.[test]' && pytest")
    return 0
