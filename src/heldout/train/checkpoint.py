"""Checkpoints on disk: written whole or not at all, read back only when their checksum holds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from heldout.train.sft import Trainee

ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


def save(root: Path, step: int, trainee: Trainee, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` below `root`; a reader sees all of it or nothing."""
    folder = root / f"step-{step:06d}"
    temporary = root / f".writing-{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        trainee.peft.save_pretrained(temporary)
        save_file(_optimizer_tensors(trainee, optimizer), temporary / OPTIMIZER)
        sums = {path.name: _checksum(path) for path in sorted(temporary.iterdir()) if path.is_file()}
        (temporary / STATE).write_text(json.dumps({**state, "step": step, "sha256": sums}))
        for path in temporary.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    except BaseException:
        # On a full disk the failure itself needs a little room to be noted.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return folder


def latest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest sound checkpoint and its state; a damaged one is passed over."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        try:
            state = json.loads((folder / STATE).read_text())
            if all(_checksum(folder / name) == wanted for name, wanted in state["sha256"].items()):
                return folder, state
        except (OSError, ValueError, KeyError):
            continue
    return None


def restore(folder: Path, trainee: Trainee, optimizer: torch.optim.Optimizer) -> None:
    """Put adapter and optimizer back as they were."""
    load_adapter(folder, trainee)
    tensors = load_file(folder / OPTIMIZER)
    for name, parameter in trainee.parameters.items():
        optimizer.state[parameter] = {
            "step": tensors[f"{name}.step"],
            "exp_avg": tensors[f"{name}.exp_avg"].to(parameter.device),
            "exp_avg_sq": tensors[f"{name}.exp_avg_sq"].to(parameter.device),
        }


def load_adapter(folder: Path, trainee: Trainee) -> None:
    """Put the adapter's weights of a checkpoint into the model."""
    tensors = load_file(folder / ADAPTER)
    with torch.no_grad():
        for name, parameter in trainee.parameters.items():
            # PEFT leaves the adapter's own name ("default") out of the file.
            parameter.copy_(tensors[name.replace(".default.", ".")])


def prune(root: Path, keep: set[int]) -> None:
    """Delete all checkpoints but those of these steps."""
    for folder in root.glob("step-*"):
        if int(folder.name.removeprefix("step-")) not in keep:
            shutil.rmtree(folder)


def publish(folder: Path, target: Path) -> Path:
    """Copy a checkpoint's adapter, and nothing else, to `target` in the standard PEFT layout."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        for name in (ADAPTER, "adapter_config.json"):
            shutil.copy2(folder / name, target / name)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def _optimizer_tensors(trainee: Trainee, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in trainee.parameters.items():
            for key, value in optimizer.state[parameter].items():
                yield f"{name}.{key}", value.contiguous()

    return dict(tensors())


def _checksum(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(handle)


def _sha256(handle: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := handle.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
