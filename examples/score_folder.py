"""Score a folder of pictures: `python examples/score_folder.py FOLDER --prompt "a red circle" --reward clip_score --reward jpeg=0.1`.

A picture whose name has a .txt beside it is scored with that text. Best first, and as FOLDER/scores.csv.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import visalign

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def main(words: Sequence[str] | None = None) -> Path:
    """Score, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="", help="for pictures without a text of their own")
    parser.add_argument("--reward", action="append", required=True, metavar="NAME[=WEIGHT]")
    given = parser.parse_args(words)
    files = sorted(path for path in given.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    own = [path.with_suffix(".txt") for path in files]
    prompts = [path.read_text(encoding="utf-8").strip() if path.is_file() else given.prompt for path in own]
    named = [word.partition("=") for word in given.reward]
    scores = visalign.score(files, prompts, {name: float(weight or 1) for name, _, weight in named})
    order = scores["total"].nan_to_num(float("-inf")).argsort(descending=True).tolist()
    out = given.folder / "scores.csv"
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "prompt", *scores])
        table.writerows([files[n].name, prompts[n], *(f"{values[n]:.6g}" for values in scores.values())] for n in order)
    for n in order:
        print(f"{scores['total'][n]:10.4f}  {files[n].name}")
    return out


if __name__ == "__main__":
    main()
