# Copyright 2026 the ulimi authors. SPDX-License-Identifier: Apache-2.0
"""The AWD-LSTM of Merity, Keskar & Socher 2017 (arXiv 1708.02182), for Hugging Face transformers from 5.0 on.

`ulimi hub` writes this file beside a model's weights, so that transformers can load them without ulimi:

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

It is for using a model, and computes what ulimi computes. Of training it has the loss, and none of the dropouts that
make an AWD-LSTM one: `ulimi train --init-from` trains on.

Legend: B texts, T tokens, V vocabulary, E embedding, H hidden, K rank. Batch first.
"""

import inspect
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .configuration_awd_lstm import AWDLSTMConfig

logger = logging.get_logger(__name__)

_ASKED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _ASKED else "past_key_values"
"""what transformers calls the state between two calls: the first since 5.24"""


class AWDLSTMState:
    """What a model remembers of the tokens that it has read, under the methods that `generate` calls.

    Args:
        layers: (h, c) of each layer, each (B, H).
        num_read: tokens read, pads included.
    """

    # A cache of transformers says of each layer that its length is known, and of itself what can be done with it.
    is_compileable = False
    is_croppable = False

    def __init__(self, layers: list[tuple[Tensor, Tensor]], num_read: int = 0) -> None:
        self.layers = layers
        self.num_read = num_read

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer, False: what was read is cut off from what is given again, as of attention's caches."""
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, pads included."""
        return self.num_read

    def _index(self, rows: Tensor) -> None:
        self.layers = [
            (h.index_select(0, rows.to(h.device)), c.index_select(0, rows.to(c.device))) for h, c in self.layers
        ]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, in this order."""
        self._index(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._index(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row so often."""
        self.layers = [(h.repeat_interleave(repeats, 0), c.repeat_interleave(repeats, 0)) for h, c in self.layers]


class AWDLSTMLayer(nn.Module):
    """One LSTM layer, a Mogrifier where it has rounds."""

    def __init__(self, input_size: int, hidden_size: int, rounds: int, rank: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        sizes = [(input_size, hidden_size) if r % 2 else (hidden_size, input_size) for r in range(rounds)]
        self.rounds = nn.ModuleList(
            nn.Sequential(nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)) for i, o in sizes
        )

    def step(self, x_BI: Tensor, h_BH: Tensor, c_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Read one token of each row."""
        for r, scale in enumerate(self.rounds):
            if r % 2:
                h_BH = 2 * torch.sigmoid(scale(x_BI)) * h_BH
            else:
                x_BI = 2 * torch.sigmoid(scale(h_BH)) * x_BI
        h_BH, c_BH = torch.lstm_cell(x_BI, (h_BH, c_BH), *self.lstm.all_weights[0])
        return h_BH, c_BH

    def forward(
        self, x_BTI: Tensor, h_BH: Tensor, c_BH: Tensor, lengths_B: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read rows of these lengths, or all of T; pads stand at their ends, and what comes out of them is nothing."""
        if self.rounds or x_BTI.size(1) == 1:  # nn.LSTM on a CPU packs its weights at each call
            out = []
            for t, x_BI in enumerate(x_BTI.unbind(1)):
                next_h_BH, next_c_BH = self.step(x_BI, h_BH, c_BH)
                if lengths_B is not None:
                    is_real_B1 = (t < lengths_B)[:, None]
                    next_h_BH = torch.where(is_real_B1, next_h_BH, h_BH)
                    next_c_BH = torch.where(is_real_B1, next_c_BH, c_BH)
                h_BH, c_BH = next_h_BH, next_c_BH
                out.append(h_BH)
            return torch.stack(out, dim=1), h_BH, c_BH
        if lengths_B is None:
            out_BTH, (h_1BH, c_1BH) = self.lstm(x_BTI, (h_BH[None], c_BH[None]))
            return out_BTH, h_1BH[0], c_1BH[0]
        # A packed row has one token at least; of a row without any, the state of before is kept.
        packed = pack_padded_sequence(x_BTI, lengths_B.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        packed_out, (h_1BH, c_1BH) = self.lstm(packed, (h_BH[None], c_BH[None]))
        out_BTH, _ = pad_packed_sequence(packed_out, batch_first=True, total_length=x_BTI.size(1))
        has_any_B1 = (lengths_B > 0)[:, None]
        return out_BTH, torch.where(has_any_B1, h_1BH[0], h_BH), torch.where(has_any_B1, c_1BH[0], c_BH)


class AWDLSTMPreTrainedModel(PreTrainedModel):
    """What the two models below have in common."""

    config_class = AWDLSTMConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar = ["AWDLSTMLayer"]
    _is_stateful = True  # no assisted decoding: a state cannot be cut back

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the paper: embedding and decoder U(-0.1, 0.1), layers U(-1/sqrt(H), 1/sqrt(H))."""
        if isinstance(module, nn.Embedding | nn.Linear):
            bound = 0.1 if isinstance(module, nn.Embedding) or module.bias is not None else module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LSTM):
            for weight in module.parameters():
                nn.init.uniform_(weight, -(module.hidden_size**-0.5), module.hidden_size**-0.5)


class AWDLSTMModel(AWDLSTMPreTrainedModel):
    """Embedding and layers: ids in, the last layer's output out."""

    # A whole language model has a decoder, too.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^lm_head\."]

    def __init__(self, config: AWDLSTMConfig) -> None:
        super().__init__(config)
        last_size = config.embedding_size if config.tie_word_embeddings else config.hidden_size
        widths = [config.embedding_size, *[config.hidden_size] * (config.num_hidden_layers - 1), last_size]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(
            AWDLSTMLayer(i, o, config.mogrifier_rounds, config.mogrifier_rank) for i, o in pairwise(widths)
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Read tokens.

        Args:
            input_ids: (B, T); the first of a text should be `<eos>`, as the tokenizer gives it.
            attention_mask: (B, T), or longer, of which the end counts: 0 is a pad, which is not read. A pad's place
                among the outputs has what was there before it, among the embeddings 0 if there was nothing.
            inputs_embeds: (B, T, E), instead of ids.
            use_cache: give the state, to go on from; None is as the configuration has it, and so for the next two.
            output_hidden_states: give the embeddings and each layer's output, too.
            return_dict: False gives a tuple.
            kwargs: the state of before, as `cache` (transformers 5.24) or `past_key_values`; others are ignored.

        Raises:
            ValueError: there are no tokens, or twice; the mask is shorter than they are; the state is another model's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if self.training:
            logger.warning_once("An AWD-LSTM in transformers has no dropouts; `ulimi train --init-from` trains on.")
        x_BTE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x_BTE.shape
        if T == 0:
            raise ValueError("there are no tokens to read; a text begins with <eos>, at least")
        if attention_mask is not None and attention_mask.size(1) < T:
            raise ValueError(f"attention_mask has {attention_mask.size(1)} places, fewer than the {T} tokens")
        state = kwargs.get("cache") if kwargs.get("cache") is not None else kwargs.get("past_key_values")
        if state is None:
            sizes = [layer.lstm.hidden_size for layer in self.layers]
            layers = [(x_BTE.new_zeros(B, size), x_BTE.new_zeros(B, size)) for size in sizes]
            state = AWDLSTMState(layers)
        if not isinstance(state, AWDLSTMState):
            raise ValueError(f"the state is a {type(state).__name__}; an AWD-LSTM goes on from an AWDLSTMState")

        lengths_B = back_BT = None
        is_real_BT = None if attention_mask is None else attention_mask[:, -T:].bool()
        if is_real_BT is not None and not is_real_BT.all():
            # Pads go behind each row's own tokens, where nothing comes after them, and back.
            order_BT = is_real_BT.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
            x_BTE = x_BTE.gather(1, order_BT[:, :, None].expand_as(x_BTE))
            lengths_B, back_BT = is_real_BT.sum(dim=1), is_real_BT.cumsum(dim=1) - 1

        def put_back(y_BTH: Tensor, before_BH: Tensor | None) -> Tensor:
            if back_BT is None:
                return y_BTH
            before_BH = torch.zeros_like(y_BTH[:, 0]) if before_BH is None else before_BH
            back_BTH = back_BT.clamp(min=0)[:, :, None].expand_as(y_BTH)
            return torch.where((back_BT < 0)[:, :, None], before_BH[:, None], y_BTH.gather(1, back_BTH))

        seen = [put_back(x_BTE, None)] if output_hidden_states else []
        new_layers = []
        for layer, (h_BH, c_BH) in zip(self.layers, state.layers, strict=True):
            x_BTE, new_h_BH, new_c_BH = layer(x_BTE, h_BH, c_BH, lengths_B)
            new_layers.append((new_h_BH, new_c_BH))
            if output_hidden_states:
                seen.append(put_back(x_BTE, h_BH))
        out_BTE = put_back(x_BTE, state.layers[-1][0])
        new_state = AWDLSTMState(new_layers, state.num_read + T) if use_cache else None
        output = BaseModelOutputWithPast(
            last_hidden_state=out_BTE, hidden_states=tuple(seen) if output_hidden_states else None, **{CACHE: new_state}
        )
        return output if return_dict else output.to_tuple()


class AWDLSTMForCausalLM(AWDLSTMPreTrainedModel, GenerationMixin):
    """The language model: ids in, logits of the next id out."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AWDLSTMConfig) -> None:
        super().__init__(config)
        self.model = AWDLSTMModel(config)
        self.lm_head = nn.Linear(self.model.layers[-1].lstm.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read tokens and predict each next one.

        Args:
            input_ids: as of `AWDLSTMModel.forward`, and so the others that are not named here.
            attention_mask: likewise.
            inputs_embeds: likewise.
            labels: (B, T), the ids themselves: each is compared with what is predicted before it; -100 is left out.
            use_cache: likewise.
            output_hidden_states: likewise.
            return_dict: likewise.
            logits_to_keep: the last places that are wanted, or which; 0 is all.
            kwargs: likewise, and what the loss of transformers takes.
        """
        read = self.model(
            input_ids, attention_mask, inputs_embeds, use_cache, output_hidden_states, return_dict=True, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(read.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits_BTV, hidden_states=read.hidden_states, **{CACHE: getattr(read, CACHE)}
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
