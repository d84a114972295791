"""The language model: any causal or encoder-decoder LLM of transformers, frozen, in 4-bit or not, with LoRA or not.

The rest of the code sees one interface: token embeddings in, a summed loss or generated tokens out.
Only LoRA's matrices are ever trainable here (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from qformer.errors import UserError, first_line
from qformer.lm_head import logits_at
from qformer.lora import LoraSettings, speed_up_lora
from qformer.precision import keep_four_bit_trainable
from qformer.tensor_names import describe_differences

IGNORED = -100  # label of a position that carries no loss, as torch's cross-entropy has it


class LanguageModel(nn.Module):
    """A frozen LLM with its tokenizer.

    Args:
        model: a causal or an encoder-decoder model of transformers.
        tokenizer: its tokenizer. A missing padding token is replaced by the end-of-text token.
        compute_dtype: bfloat16 runs the model under autocast; float32 does not.
        end_ids: tokens that end an answer; left out, the tokenizer's end token and the model's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        compute_dtype: torch.dtype = torch.float32,
        *,
        end_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.end_ids = end_ids
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.compute_dtype = compute_dtype
        self.checkpointing = False
        self.label_smoothing = 0.0  # of training, see `supervised_loss`
        self._lora: str | None = None  # the name PEFT knows this one's matrices by
        self._family: list[LanguageModel] = [self]  # all that share the same weights; the first is active
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.requires_grad_(False)
        keep_four_bit_trainable(self.model)
        self.train(False)

    # What the rest of the code asks of a language model -------------------------------------------------

    @property
    def base(self) -> Any:
        """The model of transformers below PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the LLM, as transformers has it."""
        return cast(PretrainedConfig, self.base.config)

    @property
    def width(self) -> int:
        """Width of the token embeddings, D_l (OPT-350m's differs from its hidden size)."""
        return int(self.base.get_input_embeddings().embedding_dim)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the prompt goes to an encoder and the answer to a decoder, as in T5."""
        return bool(self.config.is_encoder_decoder)

    @property
    def can_pack(self) -> bool:
        """Whether several answers may share one sequence: needs a causal model that takes positions."""
        return not self.is_encoder_decoder and "position_ids" in inspect.signature(self.base.forward).parameters

    @property
    def can_reuse_prefix(self) -> bool:
        """Whether a prompt's first part can be read once and continued: a causal model of full attention only."""
        if self.is_encoder_decoder or "past_key_values" not in inspect.signature(self.base.forward).parameters:
            return False
        return all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.config).layers)

    @property
    def device(self) -> torch.device:
        """Where the token embeddings lie."""
        return cast(torch.device, self.base.get_input_embeddings().weight.device)

    @property
    def has_lora(self) -> bool:
        """Whether LoRA matrices are in place."""
        return self._lora is not None

    @property
    def lora_config(self) -> Any:
        """PEFT's configuration of the LoRA in place."""
        return self.model.peft_config[self._lora]

    def sibling(self) -> LanguageModel:
        """Another adapter's language model over the very same frozen weights, without LoRA yet.

        Of all siblings one is active at a time: `activate` switches. They are for serving, not for training.
        """
        other = LanguageModel.__new__(LanguageModel)
        nn.Module.__init__(other)
        other.model, other.tokenizer, other.compute_dtype = self.model, self.tokenizer, self.compute_dtype
        other.checkpointing, other.label_smoothing, other.end_ids = False, 0.0, self.end_ids
        other._lora, other._family = None, self._family
        self._family.append(other)
        return other.train(False)

    def activate(self) -> None:
        """Make this one's LoRA active and that of its siblings inactive; nothing is loaded."""
        if self._family[0] is self:
            return
        if self.model is not self.base:  # else none of them has LoRA
            if self._lora is None:
                self.model.base_model.disable_adapter_layers()
            else:
                self.model.base_model.enable_adapter_layers()
                self.model.set_adapter(self._lora, inference_mode=True)
        self._family.remove(self)
        self._family.insert(0, self)

    def train(self, mode: bool = True) -> LanguageModel:
        """Set LoRA's dropout; the frozen LLM itself is in training mode only if gradient checkpointing asks for it."""
        super().train(mode)
        self.model.train(mode and self.checkpointing)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Dropout) and "lora_dropout" in name:
                module.train(mode)
        return self

    def enable_checkpointing(self) -> None:
        """Keep only each block's input and compute the rest again in the backward pass: less memory, more time."""
        self.base.activation_checkpointing_enable()
        self.checkpointing = True
        self.train(self.training)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to embeddings [B, T, D_l]."""
        return cast(Tensor, self.base.get_input_embeddings()(ids))

    def supervised_loss(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        *,
        position_ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Cross-entropy summed over the supervised positions; logits exist at those positions alone.

        Args:
            inputs_embeds: [B, T, D_l].
            attention_mask: [B, T] with 1 where there is a token, or bool [B, 1, T, T], True where attention may go.
            labels: causal: [B, T], `IGNORED` where nothing is to be learned, not shifted. Encoder-decoder: [B, S],
                the decoder's targets.
            position_ids: [B, T], needed with a four-dimensional mask.
            weights: as `labels`, what each label's loss counts; left out, 1.

        In training, `label_smoothing` of each target is spread over all tokens (Szegedy et al. 2016, arXiv
        1512.00567, section 7), unless labels are weighed.

        Returns:
            The summed loss (a float32 scalar) and the number of positions it sums over.
        """
        logits, targets = self._supervised(inputs_embeds, attention_mask, labels, position_ids)
        wanted = targets[targets != IGNORED]
        if weights is None:
            smoothing = self.label_smoothing if self.training else 0.0
            return F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=smoothing), len(wanted)
        counted = weights[labels != IGNORED]  # [N]: labels are one place later than their targets, in the same order
        return (F.cross_entropy(logits, wanted, reduction="none") * counted).sum(), len(wanted)

    @torch.no_grad()
    def label_log_probs(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        *,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of each supervised token, [N] in reading order; arguments as in `supervised_loss`."""
        logits, targets = self._supervised(inputs_embeds, attention_mask, labels, position_ids)
        return -F.cross_entropy(logits, targets[targets != IGNORED], reduction="none")

    def _supervised(
        self, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, V] in float32 at the N supervised positions, and what each position [B, T] should predict."""
        if attention_mask.dim() == 4:  # transformers wants what is added to the scores, in the scores' dtype
            dtype = self.compute_dtype
            attention_mask = torch.zeros_like(attention_mask, dtype=dtype).masked_fill_(
                ~attention_mask, torch.finfo(dtype).min
            )
        inputs: dict[str, Any] = {
            "inputs_embeds": inputs_embeds.to(self.compute_dtype),
            "attention_mask": attention_mask,
        }
        if self.is_encoder_decoder:
            targets = labels
            inputs["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(labels=labels)
        else:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
            if position_ids is not None:
                inputs["position_ids"] = position_ids
        with self.autocast(), logits_at(self.base, targets != IGNORED):
            logits = self.model(**inputs, use_cache=False).logits  # [N, V]
        return logits.float(), targets

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while; training mode comes back also if something raises.

        Generation needs it: with checkpointing on, a model in training mode keeps no cache. A model that is in it
        already, with all that share its frozen LLM, is not walked through: that takes a fifth of the time to a short
        question's first token on a CPU.
        """
        if not any(one.training for one in self._family):
            yield
            return
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: `end_ids`, or the tokenizer's end token and the model's own."""
        if self.end_ids is not None:
            return sorted(self.end_ids)
        ids = {self.tokenizer.eos_token_id}
        configured = getattr(self.base.generation_config, "eos_token_id", None)
        ids.update(configured if isinstance(configured, list) else [configured])
        return sorted(i for i in ids if i is not None)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context the computation runs in: autocast in half precision, nothing in float32."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    # LoRA ------------------------------------------------------------------------------------------------

    def add_lora(self, settings: LoraSettings) -> None:
        """Put fresh LoRA matrices (B is zero, so nothing changes yet) on the LLM; they are trained in float32."""
        from peft import LoraConfig

        targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
            bias="none",
            task_type="SEQ_2_SEQ_LM" if self.is_encoder_decoder else "CAUSAL_LM",
        )
        try:
            self._wrap(config)
        except ValueError as error:
            raise UserError(f"lora.targets: {targets} names no layer of {self.config.model_type}: {error}") from error
        self.train(self.training)

    def load_lora(self, folder: Path, dropout: float | None = None) -> None:
        """Put LoRA matrices read from a folder in PEFT's own format on the LLM, trainable.

        Args:
            folder: where PEFT saved them.
            dropout: on LoRA's input while training; None for what the folder says.

        Raises:
            UserError: the folder is damaged, or its matrices do not fit this LLM.
        """
        from peft import PeftConfig, set_peft_model_state_dict
        from safetensors.torch import load_file

        weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        try:
            state = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{weights}: cannot be read ({first_line(error)}); fetch a fresh copy") from error
        try:
            if not settings.is_file():  # PEFT would look for it on the hub
                raise FileNotFoundError("no such file")
            config = PeftConfig.from_pretrained(str(folder))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{settings}: cannot be read ({first_line(error)}); fetch a fresh copy") from error
        config.inference_mode = False
        config.base_model_name_or_path = None  # a recipe's source: PEFT would warn that the folder is called otherwise
        if dropout is not None:
            config.lora_dropout = dropout
        try:
            self._wrap(config)
        except ValueError as error:
            raise UserError(f"{folder}: its LoRA names layers {self.config.model_type} does not have") from error
        if differences := describe_differences(state, self.lora_state()):
            raise UserError(f"{folder}: the LoRA matrices do not fit {self.config.model_type}: {differences}")
        set_peft_model_state_dict(
            self.model, {name: tensor.float() for name, tensor in state.items()}, adapter_name=self._lora
        )
        self.train(self.training)

    def lora_state(self) -> dict[str, Tensor]:
        """LoRA's matrices under the names PEFT stores them by."""
        from peft import get_peft_model_state_dict

        if self._lora is None:
            return {}
        return cast(dict[str, Tensor], get_peft_model_state_dict(self.model, adapter_name=self._lora))

    def _wrap(self, config: Any) -> None:
        """Put fresh matrices on the frozen model, beside those of siblings, and make them the active ones."""
        from peft import get_peft_model

        alone = self.model is self.base
        name = "default" if alone else f"adapter{len(self.model.peft_config)}"
        if alone:
            with warnings.catch_warnings():  # PEFT reads a property by a name that transformers means to drop
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                wrapped = get_peft_model(self.base, config, adapter_name=name)
            for one in self._family:
                one.model = wrapped
        else:
            self.model.add_adapter(name, config)
        speed_up_lora(self.model)
        self._lora = name
        if len(self._family) > 1:
            self._family.remove(self)
            self._family.append(self)  # so that it is switched to
            self.activate()
