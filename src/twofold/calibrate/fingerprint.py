"""What moments belong to: a hash of the model, the samples, the seed and the settings that change them."""

from __future__ import annotations

import hashlib
import json
import secrets
from functools import partial
from pathlib import Path

import torch
from torch import nn

from twofold.calibrate.request import Request
from twofold.calibrate.settings import Calibrating
from twofold.checkpoint.shards import Shards
from twofold.host import processes
from twofold.host.cache import cache_folder
from twofold.host.parts import FORMAT
from twofold.model.target import Targets
from twofold.task import Samples
from twofold.version import __version__


def model_hash(model: nn.Module, shards: Shards | None = None) -> str:
    """Return the hash of a model's configuration and weights: those in its files, or else those in memory.

    What a module in memory computes is known by its class; one whose forward is not that of its class has a hash of its own
    each time, so nothing that was measured before is taken for its own.
    """
    config = getattr(model, "config", None)
    described = ""
    if config is not None:
        settings = config.to_dict()
        for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
            settings.pop(volatile, None)
        described = json.dumps(settings, sort_keys=True, default=str)
    if shards is not None:
        return shards.hash(described)
    digest = hashlib.sha256(described.encode())
    for name, module in model.named_modules():
        kind = type(module)
        digest.update(f"{name} {kind.__module__}.{kind.__qualname__} {module.extra_repr()}".encode())
    if any("forward" in vars(module) for module in model.modules()):
        digest.update(processes.same(partial(secrets.token_bytes, 16)))
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(
    hashed: str, samples: Samples, request: Request, recipe: Calibrating, dtype: torch.dtype, draws: int
) -> str:
    """Return what moments belong to: a hash of the model's weights, the samples, the seed and the settings that change them."""
    parts: dict[str, object] = {"format": FORMAT, "model": hashed, "ids": samples.sha256, "shape": samples.shape}
    parts |= {"seed": recipe.seed, "batch": recipe.batch_size, "dtype": str(dtype), "request": request.sizes}
    if recipe.curvature != "sampled" and request.backward:
        parts["curvature"] = recipe.curvature
    if draws > 1 and request.backward:
        parts["draws"] = draws
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def moments_path(mark: str) -> Path:
    """Return the folder of the moments of a fingerprint."""
    return cache_folder() / "moments" / mark[:24]


def spectra_mark(hashed: str, moments: str, recipe: Calibrating, targets: Targets) -> str:
    """Return what the spectra of a run belong to."""
    centred = ["centred"] if any(target.centred for target in targets.targets) else []
    return json.dumps([FORMAT, __version__, hashed, moments, recipe.objective, recipe.damping, recipe.dtype, *centred])
