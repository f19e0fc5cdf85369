"""`loongforge data convert-to-webdataset` and `loongforge data verify`: their options and what they print."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from loongforge.core.errors import DataError

_MOST_WORKERS = 16
_EXAMPLES = """examples:
  loongforge data convert-to-webdataset --json_file rows.jsonl --image_dir images --output_dir shards \\
    --sample_type multi_mix_qa --media mix --split 95,5,0 --workers 8
  loongforge data convert-to-webdataset --json_file rows.json --output_dir shards --sample_type vqa --on-bad skip
  loongforge data verify shards
"""
_CONVERT = """Write rows (a .json list, .jsonl or .parquet) with their images and videos as webdataset shards. Images
are decoded and headers of videos read; every row is in a shard or named in report.jsonl. The same command goes on where
it was stopped, and finds everything finished when it was not."""
_VERIFY = """Compare the shards of a conversion with its manifest: bytes, checksums, samples, offsets. Exit code 4 when
something differs."""


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the two verbs; options are spelled with dashes here, underscores have been replaced before."""
    raw = argparse.RawDescriptionHelpFormatter
    one = verbs.add_parser(
        "convert-to-webdataset",
        description=_CONVERT,
        epilog=_EXAMPLES,
        formatter_class=raw,
        help="rows with images and videos to shards",
    )
    from loongforge.data.convert.options import MEDIA, SAMPLE_TYPES
    from loongforge.data.engine import ENGINES

    one.add_argument("--json-file", required=True, metavar="FILE", help=".json (a list), .jsonl or .parquet")
    one.add_argument("--output-dir", required=True, metavar="DIR", help="made when it is not there")
    one.add_argument("--sample-type", required=True, choices=SAMPLE_TYPES, help="what a sample looks like in a shard")
    one.add_argument("--image-dir", metavar="DIR", help="where relative paths of images begin (default: beside FILE)")
    one.add_argument("--video-dir", metavar="DIR", help="the same for videos")
    one.add_argument("--media", choices=MEDIA, default="mix", help="what rows may hold beside text (default mix)")
    one.add_argument("--columns-messages", default="messages", metavar="FIELD", help="field of the conversation")
    one.add_argument("--key", choices=("id", "row"), default="id", help="name samples after id, or by row number")
    one.add_argument("--maxcount", type=int, default=10_000, metavar="N", help="most rows of a shard (default 10000)")
    one.add_argument("--maxsize", type=int, default=3_000_000_000, metavar="BYTES", help="most bytes (default 3e9)")
    one.add_argument("--split", metavar="SHARES", help="train, val and test by key, as in 95,5,0; each gets a folder")
    one.add_argument("--engine", choices=ENGINES, default="local", help="processes here (default), or a Ray cluster")
    one.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes or tasks, a shard each (default: cores, at most 16; with ray every CPU of the cluster)",
    )
    one.add_argument("--on-bad", choices=("error", "skip"), default="error", help="rows that cannot be used")
    one.add_argument("--max-bad", type=int, default=1000, metavar="N", help="stop after so many (default 1000)")
    one.add_argument("--resume", action="store_true", help="the default, and only said: finished shards are kept")
    one.add_argument("--overwrite", action="store_true", help="replace what another conversion left in DIR")
    one.add_argument("--json", action="store_true", help="print the account as JSON")
    one.set_defaults(run=_convert)

    two = verbs.add_parser(
        "verify", description=_VERIFY, epilog=_EXAMPLES, formatter_class=raw, help="shards against their manifest"
    )
    two.add_argument("path", metavar="DIR", help="output of convert-to-webdataset")
    two.add_argument("--json", action="store_true", help="print what was found as JSON")
    two.set_defaults(run=_verify)


def _convert(arguments: argparse.Namespace) -> int:
    from loongforge.data.convert.options import ConvertOptions
    from loongforge.data.convert.run import Conduct, convert

    file = Path(arguments.json_file)
    if not file.is_file():
        raise DataError(f"--json_file: no file {file}.")
    here = min(_MOST_WORKERS, len(os.sched_getaffinity(0))) if arguments.engine == "local" else 0
    workers = here if arguments.workers is None else arguments.workers
    if workers < 0 or arguments.max_bad < 0:
        raise DataError(f"--workers {workers} --max-bad {arguments.max_bad}: both must be 0 or more.")
    if arguments.resume and arguments.overwrite:
        raise DataError("--resume keeps finished shards and --overwrite takes them away: give one of the two.")
    options = ConvertOptions(
        json_file=file,
        image_dir=_folder("--image_dir", arguments.image_dir, file),
        video_dir=_folder("--video_dir", arguments.video_dir, file),
        sample_type=arguments.sample_type,
        media=arguments.media,
        columns_messages=arguments.columns_messages,
        key=arguments.key,
        maxcount=arguments.maxcount,
        maxsize=arguments.maxsize,
        split=arguments.split,
    )
    how = Conduct(
        workers=workers,
        engine=arguments.engine,
        on_bad=arguments.on_bad,
        max_bad=arguments.max_bad,
        overwrite=arguments.overwrite,
    )
    folder = Path(arguments.output_dir)
    manifest = convert(options, folder, how)
    said = {"output_dir": str(folder), **manifest["totals"], "parts": manifest["parts"]}
    print(json.dumps(said) if arguments.json else _summary(folder, manifest))
    return 0


def _folder(flag: str, given: str | None, file: Path) -> Path:
    folder = Path(given) if given is not None else file.parent
    if not folder.is_dir():
        raise DataError(f"{flag}: no folder {folder}.")
    return folder.resolve()


def _summary(folder: Path, manifest: dict[str, Any]) -> str:
    totals, parts = manifest["totals"], manifest["parts"]
    apart = "".join(f", {count} {part}" for part, count in parts.items() if manifest["options"]["split"] and count)
    noted = f", {totals['noted']} noted in report.jsonl" if totals["noted"] else ""
    return (
        f"{folder}: {totals['rows']} rows = {totals['written']} written{apart} + {totals['skipped']} skipped; "
        f"{totals['images']} images, {totals['videos']} videos in {totals['shards']} shards, "
        f"{totals['bytes'] / 1e6:.1f} MB{noted}"
    )


def _verify(arguments: argparse.Namespace) -> int:
    from loongforge.data.convert.verify import verify

    totals = verify(Path(arguments.path))
    said = f"{totals['shards']} shards are as written: {totals['written']} samples, {totals['bytes']} bytes"
    print(json.dumps(totals) if arguments.json else f"{arguments.path}: {said}")
    return 0
