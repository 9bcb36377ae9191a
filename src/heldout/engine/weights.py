"""Base models on disk: the bundled GGUF dequantised once, directories as they are, hub ids by download.

Weights are safetensors, never pickles, and no code that comes with a model is run.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from heldout.engine import device, frozen, stored
from heldout.engine.catalogue import Source
from heldout.errors import InvalidValue, ModelNotFound
from heldout.kept import read_record, write_record
from heldout.kernels import Kernels

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# peft asks transformers under an old name; nothing a user could do about it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

#: Kinds of layers whose attention we compute; how the settings of recurrent ones begin.
ATTENTION = {"full_attention", "sliding_attention", "attention"}
RECURRENT = ("mamba_", "lru_", "attn_layer_period")
SOFTCAP, RESCALED = "attn_logit_softcapping", ("final_logit_softcapping", "logit_scale", "logits_scaling")

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


#: Beside a job's checkpoints: the precision that it began with.
PRECISION_NOTE = "precision.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_auto: torch.dtype | None = None  # what "auto" means in this process, where everything must multiply alike


def choose_precision(setting: str = "auto") -> torch.dtype:
    """bfloat16 where this machine multiplies it clearly faster than float32, else float32.

    Measured, once in a process, and not looked up: a CPU that emulates bfloat16 is several times slower
    with it. On a GPU bfloat16 is taken where the hardware has it.
    """
    global _auto
    if setting != "auto":
        return _DTYPES[setting]
    if _auto is None:
        _auto = _faster_precision()
    return _auto


def keep_precision(directory: Path, setting: str = "auto") -> torch.dtype:
    """The precision that the job in `directory` began with, noted there by the first process; what "auto" means in
    this process from now on. Measured anew, it might differ, and a resumed job would end with other bits.

    Raises InvalidValue when another precision is asked for.
    """
    global _auto
    noted = read_record(directory / PRECISION_NOTE)
    if noted is None:
        chosen = choose_precision(setting)
        write_record(directory / PRECISION_NOTE, {"precision": str(chosen).removeprefix("torch.")})
        return chosen
    name = noted["precision"]
    if setting not in ("auto", name):
        raise InvalidValue(
            f"This job began with {name} products, but HELDOUT_PRECISION is {setting} now: the rest would not fit what "
            f"was trained so far. Set HELDOUT_PRECISION to {name} or auto to go on, or start a new job."
        )
    _auto = _DTYPES[name]
    return _auto


def _faster_precision() -> torch.dtype:
    if device.is_gpu():
        # Emulated, it would be slower than fp32; torch counts that as support unless told not to.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
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


def config_of(folder: Path) -> dict[str, Any]:
    """The model's config.json with its architecture's defaults. Raises ModelNotFound when it cannot be read."""
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelNotFound(f"The config.json in {folder} cannot be read: {error}") from error
    return config


def context_of(config: Mapping[str, Any]) -> int:
    """Tokens that the model reads: its positions, or the window of its attention where that is smaller. Within its
    window sliding attention is attention; beyond it is not supported."""
    positions = config.get("max_position_embeddings") or 1 << 30
    slides = config.get("use_sliding_window", True) and (
        not config.get("layer_types") or "sliding_attention" in config["layer_types"]
    )
    return int(min(positions, config.get("sliding_window") or positions)) if slides else int(positions)


def head_width(config: Mapping[str, Any]) -> int:
    """Numbers of an attention head's query."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def refuse_unknown_arithmetic(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelNotFound when the model computes something that our attention, loss and decoding leave out."""
    lost = [f"layers of the kind {kind!r}" for kind in sorted({*(config.get("layer_types") or ())} - ATTENTION)]
    # Some architectures mix attention with recurrent layers, and their config does not say which layer is which.
    lost += [f"recurrent layers ({name})" for name in sorted(config) if name.startswith(RECURRENT)][:1]
    lost += [f"attention scores that are capped ({SOFTCAP})"] if config.get(SOFTCAP) else []
    lost += ["attention sinks"] if config.get("model_type") == "gpt_oss" else []
    # Our loss and our decoding apply the output head themselves.
    lost += [f"logits that are rescaled ({name})" for name in RESCALED if config.get(name) not in (None, 1, 1.0)]
    if lost:
        raise ModelNotFound(f"The model in {folder} has {', '.join(lost)}; that is not supported yet.")


def load_model(folder: Path, dtype: torch.dtype, attention: str, kernels: Kernels | None = None) -> Any:
    """The model in evaluation mode, weights frozen, on this process's device.

    Args:
        attention: names a registered implementation.
        kernels: multiply with them (engine/frozen.py): in float32 with weights that stay as their file has them.
    """
    held = stored.precision(folder) if kernels and dtype == torch.float32 else dtype
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=held, attn_implementation=attention, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"The model in {folder} cannot be loaded: {error}") from error
    refuse_unknown_arithmetic(folder, model.config.to_dict())
    if kernels:
        frozen.freeze(model, kernels, dtype)
    return model.requires_grad_(False).eval().to(device.chosen())


logging.getLogger("transformers").setLevel(logging.ERROR)
