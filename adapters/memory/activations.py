"""One training micro-batch, run through forward and backward on fake tensors, with every byte it would hold counted.

Fake tensors have shapes, dtypes and lifetimes but no memory, so a model of any size can be rehearsed anywhere. Both
classes come from torch's underscored modules, which torch is pinned for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qformer.image_encoders import ImageEncoder
from qformer.model import TokenBatch, VisionLanguageModel

TEXT_TOKENS = 48  # of a short question in a chat template, with its answer
ANSWER_TOKENS = 8  # of these the loss is on


@dataclass(frozen=True)
class MicroBatch:
    """The shape of the micro-batch that is rehearsed: one short question about each picture.

    Longer texts mean fewer pictures, and so less for the bridge to do. Where pictures share a row in training, what
    their prompts open with is there once, and up to a quarter more of them fit in: that is not counted.
    """

    rows: int
    row_tokens: int
    answer_tokens: int

    @classmethod
    def of(cls, tokens: int, num_queries: int) -> MicroBatch:
        """As many rows as `tokens` holds, at least one."""
        row = num_queries + TEXT_TOKENS
        return cls(max(1, tokens // row), row, ANSWER_TOKENS)


def measure_activations(model: VisionLanguageModel, shape: MicroBatch, *, depth: int = 2) -> int:
    """The most bytes that a micro-batch holds at once besides weights, gradients and the features it is fed.

    The LLM's blocks are alike, so `depth` and `depth` + 1 of them are run: what the forward pass keeps grows by the
    same for each, and what comes on top of it at the peak does not grow (a full run differs by under 2 %, tested).

    Left out are the work space of kernels and the allocator's fragments. Where attention is fused it is the CPU's
    kernel, which keeps what a GPU's do; autocast's rules are the CPU's, which keep a little less in float32.

    Args:
        model: on the meta device, with plain layers for 4-bit ones; it is of no use afterwards.
        shape: of the micro-batch.
        depth: blocks that are run of each stack, encoder and decoder being stacks of their own; 0 runs them all.
    """
    shapes = [(encoder.num_tokens, encoder.width) for encoder in cast("list[ImageEncoder]", list(model.encoders))]
    model.encoders = nn.ModuleList()  # in training, features come from the cache
    with FakeTensorMode():
        _make_fake(model)
        model.train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        features = [torch.empty(shape.rows, tokens, width) for tokens, width in shapes]
        stacks = _block_stacks(model.language) if depth else []
        for parent, name, blocks in stacks:
            setattr(parent, name, blocks[:depth])
        kept, peak = _run(model, shape, features)
        for parent, name, blocks in stacks:
            if len(blocks) > depth:
                setattr(parent, name, blocks[: depth + 1])
                peak += (_run(model, shape, features)[0] - kept) * (len(blocks) - depth)
                setattr(parent, name, blocks[:depth])
    return peak


def _run(model: VisionLanguageModel, shape: MicroBatch, features: Sequence[Tensor]) -> tuple[int, int]:
    """(bytes kept at the end of the forward pass, the most held at once) of one pass forward and backward."""
    with LiveBytes() as live:
        loss = _loss(model, shape, features)
        kept = live.live
        loss.backward()
    return kept, live.peak


def _block_stacks(language: nn.Module) -> list[tuple[nn.Module, str, nn.ModuleList]]:
    """(parent, attribute, blocks) of each list of transformer blocks in a model of transformers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [
        (parent, name, child)
        for parent in language.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and isinstance(child[0], GradientCheckpointingLayer)
    ]


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed.

    Attributes:
        live: bytes held now.
        peak: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it gives."""
        given = {self._key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._key(tensor) not in given:  # a view holds nothing of its own
                self._count(tensor)
        return out

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), self._key(tensor)
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _make_fake(model: nn.Module) -> None:
    """Replace parameters and buffers of the meta device by fake ones of the CPU; tied ones stay tied."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


def _loss(model: VisionLanguageModel, shape: MicroBatch, features: Sequence[Tensor]) -> Tensor:
    """What `VisionLanguageModel.forward` computes, as far as it does not depend on the values of labels and masks."""
    language = model.language
    instruction: tuple[Tensor, ...] = ()
    if model.bridge.config.instruction_aware:
        ids = torch.zeros(shape.rows, TEXT_TOKENS // 2, dtype=torch.long)
        instruction = (ids, torch.ones_like(ids, dtype=torch.bool))
    size = (shape.rows, shape.row_tokens)
    slots = torch.zeros(size, dtype=torch.bool)
    batch = TokenBatch(torch.zeros(size, dtype=torch.long), torch.ones(size), slots)
    embeds = model.place(batch, model.image_embeddings(features, *instruction)).to(language.compute_dtype)
    inputs: dict[str, Any] = {"inputs_embeds": embeds}
    supervised = shape.rows * shape.answer_tokens
    if language.is_encoder_decoder:  # without a mask: its position bias makes one anyway
        inputs["decoder_input_ids"] = torch.zeros(shape.rows, shape.answer_tokens, dtype=torch.long)
    else:
        inputs["attention_mask"] = torch.zeros(
            shape.rows, 1, shape.row_tokens, shape.row_tokens, dtype=language.compute_dtype
        )
        if language.can_pack:
            inputs["position_ids"] = torch.zeros(size, dtype=torch.long)
    head = language.base.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[:supervised],))  # [B, T, D] → [N, D]
    with language.autocast():
        logits = language.model(**inputs, use_cache=False).logits  # [N, V]
    hook.remove()
    return F.cross_entropy(logits.float(), torch.zeros(supervised, dtype=torch.long), reduction="sum")
