"""Checkpoints on disk: written whole or not at all, read back only when their checksums hold."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from heldout.errors import CheckpointDamaged
from heldout.train.averaging import Average
from heldout.train.method import Trainee

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
#: Behind a parameter's name: its value at this step, where the adapter holds an average.
NOW = "now"


def save(
    root: Path,
    step: int,
    trainee: Trainee[Any],
    optimizer: torch.optim.Optimizer,
    average: Average,
    state: dict[str, Any],
) -> Path:
    """Write the checkpoint of `step` below `root`; a reader sees all of it or nothing.

    The adapter's file holds the average; the weights of this very step lie with the optimizer's state.
    """
    folder = root / f"step-{step:06d}"
    with _written_whole(folder) as temporary:
        with average.in_place():
            trainee.save(temporary)
        save_file(_optimizer_tensors(trainee, optimizer, average), temporary / OPTIMIZER)
        _write_state(temporary, state)
    return folder


def read(root: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of `step` and its state. Raises CheckpointDamaged when it is missing or damaged."""
    folder = root / f"step-{step:06d}"
    try:
        stored = json.loads((folder / STATE).read_text())
        state: dict[str, Any] = stored["state"]
        sound = stored["sha256_of_state"] == _digest(state) and all(
            _checksum(folder / name) == wanted for name, wanted in stored["sha256"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointDamaged(f"the checkpoint of step {step} cannot be read: {error}") from error
    if not sound:
        raise CheckpointDamaged(f"the checkpoint of step {step} is damaged: its checksums do not hold")
    return folder, state


def latest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest sound checkpoint and its state; a damaged one is passed over."""
    return next(sound(root), None)


def sound(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Checkpoints that can be read and their states, the newest first; each is read when it is asked for."""
    for step in reversed(steps(root)):
        with contextlib.suppress(CheckpointDamaged):
            yield read(root, step)


def steps(root: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    return sorted(int(state.parent.name.removeprefix("step-")) for state in root.glob(f"step-*/{STATE}"))


def rewind(root: Path, step: int, state: dict[str, Any]) -> None:
    """Make the checkpoint of `step` the newest, with this state. Killed half way, the next process finds the
    later checkpoints whole and comes to the same decision again."""
    folder = root / f"step-{step:06d}"
    _write_state(folder, state)
    for later in steps(root):
        if later > step:
            _delete(root / f"step-{later:06d}")


def restore(folder: Path, trainee: Trainee[Any], optimizer: torch.optim.Optimizer, average: Average) -> None:
    """Put adapter, average and optimizer back as they were."""
    trainee.load(folder)
    tensors = load_file(folder / OPTIMIZER)
    average.restart({name: tensors[f"{name}.{NOW}"] for name in average.weights})
    optimizer.state.clear()
    for name, parameter in trainee.parameters.items():
        if f"{name}.step" in tensors:  # that of step 0 had no state once
            optimizer.state[parameter] = {
                "step": tensors[f"{name}.step"].to(parameter.device),
                "exp_avg": tensors[f"{name}.exp_avg"].to(parameter.device),
                "exp_avg_sq": tensors[f"{name}.exp_avg_sq"].to(parameter.device),
            }


def prune(root: Path, keep: set[int]) -> None:
    """Delete all checkpoints but those of these steps."""
    for step in steps(root):
        if step not in keep:
            _delete(root / f"step-{step:06d}")


def _delete(folder: Path) -> None:
    (folder / STATE).unlink()  # from here on it is no checkpoint, whatever is left of it
    shutil.rmtree(folder)


def average(folders: Sequence[Path], target: Path) -> Path:
    """Write the mean of these checkpoints' adapters to `target`: of every tensor, A and B each by itself."""
    with _written_whole(target) as temporary:
        several = [load_file(folder / ADAPTER) for folder in folders]
        mean = {name: torch.stack([one[name].float() for one in several]).mean(0) for name in several[0]}
        typed = {name: tensor.to(several[0][name].dtype) for name, tensor in mean.items()}
        save_file(typed, temporary / ADAPTER, metadata={"format": "pt"})
        shutil.copy2(folders[0] / CONFIG, temporary / CONFIG)
    return target


def publish(folder: Path, target: Path) -> Path:
    """Copy a checkpoint's adapter, and nothing else, to `target`."""
    with _written_whole(target) as temporary:
        for name in (ADAPTER, CONFIG):
            shutil.copy2(folder / name, temporary / name)
    return target


@contextlib.contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when everything in it is on the disk."""
    temporary = folder.parent / f".writing-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    except BaseException:
        # On a full disk the failure itself needs a little room to be noted.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    # A process that was killed while it wrote the state leaves a file whose name begins with a dot.
    written = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    sums = {path.name: _checksum(path) for path in written if path.name != STATE}
    temporary = folder / f".{STATE}"
    try:
        with temporary.open("w") as file:
            json.dump({"state": state, "sha256_of_state": _digest(state), "sha256": sums}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / STATE)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _optimizer_tensors(
    trainee: Trainee[Any], optimizer: torch.optim.Optimizer, average: Average
) -> dict[str, torch.Tensor]:
    moments = {
        f"{name}.{key}": value.contiguous()
        for name, parameter in trainee.parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return moments | {f"{name}.{NOW}": trainee.parameters[name].detach().contiguous() for name in average.weights}


def _checksum(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(handle)


def _sha256(handle: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := handle.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
