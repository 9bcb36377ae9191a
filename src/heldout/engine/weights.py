"""Base models on disk: the bundled GGUF dequantised once, directories as they are, hub ids by download.

Weights are safetensors, never pickles, and no code that comes with a model is run.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from heldout.engine.catalogue import Source
from heldout.errors import ModelNotFound

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# peft asks transformers under an old name; nothing a user could do about it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@functools.cache  # measured once: everything in a process must multiply alike
def choose_precision(setting: str = "auto") -> torch.dtype:
    """bfloat16 where this machine multiplies it clearly faster than float32, else float32.

    Measured, not looked up: a CPU that emulates bfloat16 is several times slower with it. On a GPU
    bfloat16 is taken where the hardware has it.
    """
    if setting != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _gemm_rate(torch.bfloat16) > 1.2 * _gemm_rate(torch.float32) else torch.float32


def _gemm_rate(dtype: torch.dtype) -> float:
    """Matrix products a second at a size typical of a training step; best of several short tries."""
    x, w = torch.ones(384, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = max(best, 1 / (time.perf_counter() - started))
    return best


def prepare(source: Source, cache: Path) -> Path:
    """The folder with the model's safetensors, tokenizer and chat template, made if need be.

    Raises ModelNotFound when a hub model can be had neither from the network nor from the hub's cache.
    """
    if source.directory:
        return source.directory
    if source.gguf:
        return _dequantise(source.gguf, cache / "bases" / source.name)
    assert source.hub_id is not None
    return _download(source.hub_id)


def is_prepared(source: Source, cache: Path) -> bool:
    """False when `prepare` would have to dequantise first (half a minute on two cores)."""
    return source.gguf is None or (cache / "bases" / source.name).is_dir()


def _download(hub_id: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_PATTERNS))
    except Exception as network:  # noqa: BLE001 - the hub's client raises a dozen kinds; all mean "not from there"
        try:
            return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_PATTERNS, local_files_only=True))
        except Exception:  # noqa: BLE001
            reason = re.sub(r"\s+", " ", str(network))[:200]
            raise ModelNotFound(
                f"The model '{hub_id}' does not exist here. Tried: the Hugging Face hub "
                f"({type(network).__name__}: {reason}) and the hub's cache on this machine."
            ) from network


def _dequantise(gguf: Path, folder: Path) -> Path:
    with locked(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model = model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
        # transformers refuses to save a model that it thinks is still quantised.
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock: of two processes that prepare the same model one works, one waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer. Raises ModelNotFound when it has no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ModelNotFound(f"The model in {folder} has no chat template: it cannot hold a conversation.")
    return tokenizer


def load_model(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    """The model in evaluation mode, weights frozen. `attention` names a registered implementation."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"The model in {folder} cannot be loaded: {error}") from error
    # Our loss and our decoding apply the output head themselves; what a model does after it would be lost.
    for rule in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, rule, None) not in (None, 1, 1.0):
            raise ModelNotFound(f"The model in {folder} rescales its logits ({rule}); that is not supported yet.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.requires_grad_(False).eval().to(device)


logging.getLogger("transformers").setLevel(logging.ERROR)
