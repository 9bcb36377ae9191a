"""From tokens to hidden states: the embedding, the layers below the cut, the layers that are trained.

Layers below the cut (`freeze_layers`) carry no adapter and nothing random, so what leaves them depends on
the tokens alone: it is computed once for an example and kept (train/activations.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from heldout.engine import device
from heldout.engine.weights import context_of, head_width
from heldout.errors import InvalidValue
from heldout.kernels import Kernels
from heldout.train import norms
from heldout.train.block import Block
from heldout.train.dropout import Dropout
from heldout.train.layout import Layout
from heldout.train.memory import trim
from heldout.train.packing import Pack
from heldout.train.projection import Scratch
from heldout.train.rounding import padded

#: Architectures whose layers train/block.py computes as one operation.
FUSED = ("llama", "mistral", "qwen2")
#: Those whose layers can at least be walked through one by one; others run as a whole and cannot be cut.
WALKED = (*FUSED, "qwen3")


def refuse(config: Mapping[str, Any], *, cut: int, checkpoint: bool = False) -> None:
    """Raise InvalidValue when a model of this config cannot be cut, or not be checkpointed."""
    kind = config["model_type"]
    if cut and kind not in WALKED:
        raise InvalidValue(
            f"freeze_layers={cut} is not supported for models of type {kind!r}; leave it at 0.",
            param="hyperparameters.freeze_layers",
        )
    if checkpoint and not is_fused(config):
        raise InvalidValue(
            "This job needs checkpointing to fit into HELDOUT_MEMORY_LIMIT, but checkpointing is not supported "
            f"for models of type {kind!r}. Use shorter examples, a smaller model, or a higher limit.",
            param="model",
        )


def is_fused(config: Mapping[str, Any]) -> bool:
    """Whether every layer is computed as one operation (train/block.py)."""
    return config["model_type"] in FUSED and config["hidden_act"] == "silu"


class Body:
    """A decoder without its output head. Shapes: L packed tokens, h hidden size."""

    def __init__(
        self,
        model: Any,
        dropout: Dropout,
        *,
        cut: int = 0,
        checkpoint: bool = False,
        kernels: Kernels | None = None,
    ) -> None:
        """Raises InvalidValue as `refuse` does."""
        self.model, self.dropout, self.cut, self.checkpoint = model, dropout, cut, checkpoint
        self._kernels = kernels
        config = model.config.to_dict()
        refuse(config, cut=cut, checkpoint=checkpoint)
        kind = config["model_type"]
        self._inner = model.base_model
        self._walks = kind in WALKED
        self._blocks: list[Block] = []
        if is_fused(config):
            scratch = Scratch(shared=not device.is_gpu())
            for index, layer in enumerate(self._inner.layers):
                self._blocks.append(Block.of(layer, index, kernels, scratch))
                trim()  # or the weights that were copied stay in memory beside their copies until all are
        else:
            norms.fuse(model)
        self._context, self._head_width = context_of(config), head_width(config)

    def below(self, pack: Pack) -> torch.Tensor:
        """What enters the first trained layer, [L, h], without gradient."""
        with torch.no_grad():
            return self._walk(self._inner.embed_tokens(pack.ids), pack.layout, 0, self.cut, None)

    def embed(self, pack: Pack, noise: float, seed: int) -> torch.Tensor:
        """Token embeddings [L, h], with uniform noise of NEFTune's size (alpha / sqrt(n h) for n tokens)."""
        x = self._inner.embed_tokens(pack.ids)
        if not noise:
            return x
        generator = torch.Generator().manual_seed(seed)
        # What is shared gets the same noise in all examples; n is the mean length of the pack's examples.
        n = sum(end - start for spans in pack.spans for start, end in spans) / pack.size
        bound = noise / math.sqrt(n * x.shape[1])
        drawn = torch.rand(x.shape, generator=generator).mul_(2 * bound).sub_(bound)
        return x + drawn.to(x.device, x.dtype)

    @property
    def fused(self) -> bool:
        """Whether every layer is one operation of ours."""
        return bool(self._blocks)

    @property
    def uses_kernels(self) -> bool:
        """Whether there are kernels for at least some of its operations: layers of others only attend with them."""
        return self._kernels is not None and (self.fused or self._kernels.attends(self._head_width))

    def above(self, x: torch.Tensor, layout: Layout, rows: torch.Tensor) -> torch.Tensor:
        """Final hidden states at `rows`, [R, h], from what enters the first trained layer."""
        if not self._walks:
            hidden = self._inner(
                inputs_embeds=x[None],
                position_ids=layout.position_ids,
                layout=layout,
                tree_kernels=self._kernels,
                use_cache=False,
            ).last_hidden_state[0]
            return hidden[rows]
        hidden = self._walk(x, layout, self.cut, len(self._inner.layers), rows)
        return self._inner.norm(hidden)

    def _walk(self, x: torch.Tensor, layout: Layout, first: int, last: int, rows: torch.Tensor | None) -> torch.Tensor:
        if layout.longest > self._context:
            raise InvalidValue(f"an example has {layout.longest} tokens, but the model reads {self._context}")
        if first == last:
            return x
        angles = self._inner.rotary_emb(x[None], layout.position_ids)
        if self._blocks:
            length = len(x)
            flat = (angles[0][0], angles[1][0])
            if not all(block.whole for block in self._blocks[first:last]):
                x, flat = padded(x), (padded(flat[0]), padded(flat[1]))
            for block in self._blocks[first:last]:
                # After the last attention only the positions that predict something are of interest.
                chosen = rows if block is self._blocks[-1] else None
                x = block(x, layout, flat, self.dropout, rows=chosen, checkpoint=self.checkpoint)
                length = length if chosen is None else len(chosen)
            return x[:length]
        for layer in self._inner.layers[first:last]:
            x = layer(
                x[None],
                attention_mask=None,
                position_embeddings=angles,
                position_ids=layout.position_ids,
                past_key_values=None,
                use_cache=False,
                layout=layout,
                tree_kernels=self._kernels,
            )[0]
        return x if rows is None else x[rows]
