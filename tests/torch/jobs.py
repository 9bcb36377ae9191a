"""Training in a process of its own, so that it can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from heldout.engine.template import Tokens
from heldout.pipeline.plan import TrainPlan
from heldout.pipeline.training import Adapter
from heldout.pipeline.types import Split
from heldout.pipeline.watch import Silent, Watch
from heldout.train import sft
from heldout.train.method import Losses
from heldout.train.trainer import TorchTrainer
from tests.torch.conftest import NOISY, SMALL, TOOLS

# Processes are forked from one that has loaded torch and done nothing with it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.torch.jobs"])

WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


class Fragile(sft.ChatTrainee):
    """Its loss is not a number once the adapter has moved further than `reach` from where it started: what a
    learning rate that is too high does, at a step of our choosing."""

    reach = 0.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._first = {name: p.detach().clone() for name, p in self.parameters.items()}

    def losses(self, rows: list[Tokens], number: int = 0) -> Losses:  # type: ignore[override]
        found = super().losses(rows, number)
        if self._training and self.moved() > self.reach:
            return replace(found, loss=found.loss * torch.nan, nll=found.nll * torch.nan)
        return found

    def moved(self) -> float:
        """How far the adapter is from where it started."""
        return sum(float((p.detach() - self._first[name]).square().sum()) for name, p in self.parameters.items()) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Work:
    """One training, as a process is told of it."""

    model: Path
    plan: TrainPlan = NOISY
    split: Split = SMALL
    reach: float = 0.0  # of a Fragile trainee, if not 0

    def train(self, folder: Path, watch: Watch | None = None) -> Adapter:
        """Train in `folder`, in this process."""
        kept = sft.ChatTrainee
        if self.reach:
            Fragile.reach = self.reach
            sft.ChatTrainee = Fragile  # type: ignore[misc]
        try:
            return TorchTrainer(**TOOLS).train(
                self.plan,
                self.split,
                base_model=str(self.model),
                directory=folder,
                watch=watch or Silent(),
                cache=folder / "activations",
            )
        finally:
            sft.ChatTrainee = kept  # type: ignore[misc]

    def start(self, folder: Path, dies_at: int = 0) -> BaseProcess:
        """Train in a process of its own, which kills itself when it writes to `folder` for the `dies_at`th time."""
        process = PROCESSES.Process(target=_work, args=(self, folder, dies_at), daemon=True)
        process.start()
        return process


def _work(work: Work, folder: Path, dies_at: int) -> None:
    writes = 0

    def look(event: str, args: tuple[Any, ...]) -> None:
        nonlocal writes
        if event in WRITES and str(folder) in str(args[0]) and not (event == "open" and args[1] in ("r", "rb")):
            writes += 1
            if writes == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    work.train(folder)
    (folder / "writes").write_text(str(writes))
