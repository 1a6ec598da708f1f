"""A process that reads a portable checkpoint by plain transformers, and can't import twofold. Run as a script, never imported.

It takes one JSON object a line, {"ids": [[…]], "start": bool, "out": path}, writes the logits to that path, and answers with one.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this file's folder comes last, so that its modules hide no other ones


class NoTwofold:
    """Refuses every import of twofold."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "twofold":
            raise ImportError("the portable format must not need twofold")


def main(folder: str, auto: str) -> None:
    """Answer requests until there are no more."""
    import json

    import torch
    import transformers
    from decoding import ModelDecoder  # type: ignore[import-not-found]
    from safetensors.torch import save_file

    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    decoder = ModelDecoder(model)
    print(json.dumps({"class": type(model).__name__, "module": type(model).__module__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["start"]:
            decoder.start()
        save_file({"logits": decoder.read(torch.tensor(request["ids"])).contiguous()}, request["out"])
        print("{}", flush=True)


if __name__ == "__main__":
    sys.meta_path.insert(0, NoTwofold())  # type: ignore[arg-type]
    main(sys.argv[1], sys.argv[2])
