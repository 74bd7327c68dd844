# Copyright 2026 the ulimi authors. SPDX-License-Identifier: Apache-2.0
"""The sizes of an AWD-LSTM language model, for Hugging Face transformers from 5.0 on.

`ulimi hub` writes this file beside a model's weights, so that transformers can load them without ulimi.
"""

from typing import Any

from transformers import PretrainedConfig


class AWDLSTMConfig(PretrainedConfig):
    """What `AWDLSTMForCausalLM` is built from.

    Args:
        vocab_size: V.
        embedding_size: E.
        hidden_size: H, of every layer, but for the last one of a tied model, which is as wide as the embedding.
        num_hidden_layers: L.
        tie_word_embeddings: use the embedding matrix as the decoder's.
        mogrifier_rounds: in which each layer's input and state scale one another before a step (Melis, Kočiský &
            Blunsom 2020); 0 is a plain LSTM.
        mogrifier_rank: of the matrices of these rounds.
        use_cache: give the state, to go on from, where nothing else is asked for.
        kwargs: those of every configuration of transformers.
    """

    model_type = "awd_lstm"
    # A state is no tensor, which Trainer would gather from its batches.
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        vocab_size: int = 4000,
        embedding_size: int = 256,
        hidden_size: int = 512,
        num_hidden_layers: int = 2,
        tie_word_embeddings: bool = True,
        mogrifier_rounds: int = 0,
        mogrifier_rank: int = 32,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.mogrifier_rounds = mogrifier_rounds
        self.mogrifier_rank = mogrifier_rank
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        # Some versions read it from their own fields alone.
        self.tie_word_embeddings = tie_word_embeddings
