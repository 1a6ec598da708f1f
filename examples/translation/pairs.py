"""Write train.jsonl, dev.jsonl and test.jsonl, rows of "source" and "target", from the plain text files of Multi30k.

python pairs.py multi30k/ pairs/
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FILES = {"train": "train", "dev": "val", "test": "test_2016_flickr"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of train.en, train.de, val.en and so on, a sentence a line")
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for part, name in FILES.items():
        sides = [(args.folder / f"{name}.{language}").read_text("utf-8").splitlines() for language in ("en", "de")]
        rows = (json.dumps({"source": s, "target": t}, ensure_ascii=False) for s, t in zip(*sides, strict=True))
        (args.out / f"{part}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main()
