"""The AWD-LSTM of Merity, Keskar & Socher 2017, "Regularizing and Optimizing LSTM Language Models" (arXiv 1708.02182).

Section numbers are those of the paper. The order of a forward pass:

    tokens -> embedding, whole word types dropped (4.3) -> locked input dropout (4.2)
    -> LSTM 1 -> locked hidden dropout -> LSTM 2 -> ... -> LSTM L, each with DropConnect on weight_hh (2)
    -> `raw` -> locked output dropout -> `dropped` -> decoder, tied to the embedding (4.5)

Legend: B streams, T time steps, V vocabulary, E embedding, H hidden, L layers. Batch first.

Layers are single `nn.LSTM`s, so that we decide what stands between them and cuDNN still runs each (but for Mogrifiers,
which no cuDNN kernel knows, see `ulimi.mogrifier`). The recurrent state
is a value that goes in and comes out. This module knows nothing of text, files or optimizers. It draws from no global
random state when it is given a generator.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ulimi import cpu, cuda, mogrifier

LayerState = tuple[Tensor, Tensor]
"""(h, c) of one layer, each (1, B, H)."""

State = list[LayerState]


class Features(NamedTuple):
    """What the layers give, before the decoder: enough for the loss, for AR and TAR, for the next window."""

    state: State
    """to start the next window with, not detached"""
    raw: Tensor
    """last layer's output before its dropout, (B, T, E): TAR reads it"""
    dropped: Tensor
    """the same after dropout: AR and the decoder read it"""


class Output(NamedTuple):
    """What a forward pass gives: the `Features`, and their logits."""

    logits: Tensor
    """(B, T, V)"""
    state: State
    """to start the next window with, not detached"""
    raw: Tensor
    """last layer's output before its dropout, (B, T, E): TAR and the neural cache read it"""
    dropped: Tensor
    """the same after dropout: AR and the decoder read it"""


def dropout_mask(shape: Sequence[int], p: float, like: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Draw an inverted-dropout mask: 0 with probability `p`, else 1 / (1 - p).

    Args:
        shape: shape of the mask.
        p: probability of a zero, in [0, 1).
        like: a tensor whose dtype and device the mask gets.
        rng: generator on that device; None takes PyTorch's default one.

    Returns:
        A tensor of `shape`.
    """
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - p, generator=rng).div_(1 - p)
    # bernoulli_ on a CPU takes 75 ms for a 4600 x 1150 matrix, a tenth of a training step. Four 16-bit numbers from
    # each 64-bit draw take a thirtieth of that; p is then exact to 2**-16.
    num = math.prod(shape)
    bits = torch.empty((num + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=rng).view(torch.int16)
    keep = bits[:num].view(tuple(shape)) >= min(round(p * 2**16), 2**16 - 1) - 2**15  # 2**15 is no int16
    return keep.to(like.dtype).div_(1 - p)


def locked_dropout(x_BTE: Tensor, p: float, training: bool, rng: torch.Generator | None = None) -> Tensor:
    """Drop the same features at every time step of a stream (variational dropout, sec. 4.2).

    Args:
        x_BTE: activations, (B, T, E).
        p: probability of dropping a feature.
        training: when false, `x_BTE` comes back unchanged.
        rng: see `dropout_mask`.

    Returns:
        (B, T, E); survivors are scaled by 1 / (1 - p), so the expectation is unchanged.
    """
    if not training or p == 0.0:
        return x_BTE
    return x_BTE * dropout_mask((x_BTE.size(0), 1, x_BTE.size(2)), p, x_BTE, rng)


def embedding_dropout(
    tokens_BT: Tensor, weight_VE: Tensor, p: float, training: bool, rng: torch.Generator | None = None
) -> Tensor:
    """Look tokens up with whole word types dropped, at all their positions in the batch (sec. 4.3).

    Args:
        tokens_BT: ids, (B, T).
        weight_VE: embedding matrix, (V, E).
        p: probability of dropping a type.
        training: when false, a plain look-up.
        rng: see `dropout_mask`.

    Returns:
        (B, T, E).
    """
    x_BTE = F.embedding(tokens_BT, weight_VE)
    if not training or p == 0.0:
        return x_BTE
    mask_V1 = dropout_mask((weight_VE.size(0), 1), p, weight_VE, rng)
    # Masking what was looked up equals masking the matrix, values and gradients, without a pass over all of V x E.
    return x_BTE * mask_V1[tokens_BT]


def _own_precision(x: Tensor, weight: Tensor) -> bool | None:
    """As `ulimi.cpu.own_precision`; None also where its passes are not for these tensors."""
    return cpu.own_precision() if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 else None


class WeightDropLSTM(nn.Module):
    """One LSTM layer with DropConnect on its recurrent matrix (sec. 2).

    The mask is drawn once a forward pass, so a recurrent connection is absent for a whole window, which is what lets a
    fused kernel run. The parameter keeps its name and stays a leaf: gradients reach it, and a checkpoint loads into a
    plain `nn.LSTM`. Both of PyTorch's biases are kept: one merged bias would learn at half the published rate.

    With `mogrifier_rounds` it is a Mogrifier LSTM, see `ulimi.mogrifier`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        weight_dropout: float,
        mogrifier_rounds: int = 0,
        mogrifier_rank: int = 32,
    ) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.weight_dropout = weight_dropout
        sizes = [(input_size, hidden_size) if r % 2 else (hidden_size, input_size) for r in range(mogrifier_rounds)]
        self.rounds = nn.ModuleList(
            nn.Sequential(nn.Linear(i, mogrifier_rank, bias=False), nn.Linear(mogrifier_rank, o, bias=False))
            for i, o in sizes
        )

    def round_matrices(self) -> list[mogrifier.Round]:
        """The two matrices of each of a Mogrifier's rounds."""
        matrices = list(self.rounds.parameters())
        return list(zip(matrices[::2], matrices[1::2], strict=True))

    def forward(
        self, x_BTI: Tensor, state: LayerState | None = None, rng: torch.Generator | None = None
    ) -> tuple[Tensor, LayerState]:
        """Map (B, T, I) to (B, T, H), starting from `state` or from zeros."""
        if not self.rounds and not (self.training or torch.is_grad_enabled()):
            out: tuple[Tensor, LayerState] = self.lstm(x_BTI, state)
            return out
        weight_ih, weight_hh, bias_ih, bias_hh = self.lstm.all_weights[0]
        mask_hh = None
        if self.training and self.weight_dropout > 0.0:
            mask_hh = dropout_mask(weight_hh.shape, self.weight_dropout, weight_hh, rng)
        if self.rounds:
            return self._mogrify(x_BTI, state, mask_hh)
        if cuda.has_cudnn(x_BTI.device):
            return cuda.lstm(x_BTI, state, weight_ih, weight_hh, bias_ih, bias_hh, mask_hh)
        if (half := _own_precision(x_BTI, weight_hh)) is not None:
            with torch.autocast("cpu", enabled=False):
                return cpu.lstm(x_BTI, state, weight_ih, weight_hh, bias_ih, bias_hh, mask_hh, half)
        dropped_hh = weight_hh if mask_hh is None else weight_hh * mask_hh
        out = functional_call(self.lstm, {"weight_hh_l0": dropped_hh}, (x_BTI, state))
        return out

    def _mogrify(self, x_BTI: Tensor, state: LayerState | None, mask_hh: Tensor | None) -> tuple[Tensor, LayerState]:
        weight_ih, weight_hh, bias_ih, bias_hh = self.lstm.all_weights[0]
        if state is None:
            zeros = x_BTI.new_zeros(1, x_BTI.size(0), self.lstm.hidden_size)
            state = zeros, zeros
        # A lone step, as generation takes it, is not worth packing matrices for.
        is_lone = x_BTI.size(1) == 1 and not torch.is_grad_enabled()
        if not is_lone and (half := _own_precision(x_BTI, weight_hh)) is not None:
            with torch.autocast("cpu", enabled=False):
                return mogrifier.lstm(
                    x_BTI, state, weight_ih, weight_hh, bias_ih + bias_hh, self.round_matrices(), mask_hh, half
                )
        dropped_hh = weight_hh if mask_hh is None else weight_hh * mask_hh
        return mogrifier.reference(x_BTI, state, weight_ih, dropped_hh, bias_ih + bias_hh, self.round_matrices())


class _Backbone(nn.Module):
    """Embedding and layers under the names that Hugging Face models give them."""

    def __init__(self, vocab_size: int, embedding_size: int, layers: list[WeightDropLSTM]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, embedding_size)
        self.layers = nn.ModuleList(layers)


class AWDLSTM(nn.Module):
    """Language model: ids in, logits of the next id out.

    Args:
        vocab_size: V.
        embedding_size: E.
        hidden_size: H, of every layer, but for a tied last one, which is as wide as the embedding.
        num_layers: L.
        tie_weights: use the embedding matrix as the decoder's (sec. 4.5).
        embedding_dropout: on whole word types.
        input_dropout: locked, after the embedding.
        hidden_dropout: locked, between layers (none after the last).
        output_dropout: locked, after the last layer.
        weight_dropout: DropConnect on each layer's `weight_hh`.
        mogrifier_rounds: in which each layer's input and state scale one another before a step, see `ulimi.mogrifier`;
            0 is a plain LSTM.
        mogrifier_rank: of the matrices of these rounds.
        rng: generator of the initial weights; None takes PyTorch's default one.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        tie_weights: bool = True,
        embedding_dropout: float = 0.0,
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        output_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        mogrifier_rounds: int = 0,
        mogrifier_rank: int = 32,
        rng: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.mogrifier_rounds = mogrifier_rounds
        last_size = embedding_size if tie_weights else hidden_size
        widths = [embedding_size, *[hidden_size] * (num_layers - 1), last_size]
        # PyTorch's modules fill themselves from the global random state; what they draw is overwritten below.
        with torch.random.fork_rng(devices=[]):
            layers = [
                WeightDropLSTM(i, o, weight_dropout, mogrifier_rounds, mogrifier_rank) for i, o in pairwise(widths)
            ]
            self.model = _Backbone(vocab_size, embedding_size, layers)
            self.lm_head = nn.Linear(last_size, vocab_size)
        self.set_dropouts(
            embedding_dropout=embedding_dropout, input_dropout=input_dropout, hidden_dropout=hidden_dropout,
            output_dropout=output_dropout, weight_dropout=weight_dropout,
        )  # fmt: skip
        if tie_weights:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.tie_weights = tie_weights
        self._initialise(rng)

    def _initialise(self, rng: torch.Generator | None) -> None:
        """Embedding and decoder U(-0.1, 0.1), decoder bias 0; each layer U(-1/sqrt(H), 1/sqrt(H)), as PyTorch does.

        A Mogrifier's matrices: U(-1/sqrt(n), 1/sqrt(n)), n what they read, so that each round begins near a scale of 1.
        """
        with torch.no_grad():
            self.model.embed_tokens.weight.uniform_(-0.1, 0.1, generator=rng)
            if not self.tie_weights:
                self.lm_head.weight.uniform_(-0.1, 0.1, generator=rng)
            self.lm_head.bias.zero_()
            for layer in self.layers:
                bound = layer.lstm.hidden_size**-0.5
                for weight in layer.lstm.parameters():
                    weight.uniform_(-bound, bound, generator=rng)
            for layer in self.layers:
                for matrix in layer.rounds.parameters():
                    matrix.uniform_(-(matrix.size(1) ** -0.5), matrix.size(1) ** -0.5, generator=rng)

    @property
    def layers(self) -> list[WeightDropLSTM]:
        """The layers, first to last."""
        return list(self.model.layers)  # type: ignore[arg-type]

    def set_dropouts(
        self,
        *,
        embedding_dropout: float,
        input_dropout: float,
        hidden_dropout: float,
        output_dropout: float,
        weight_dropout: float,
    ) -> None:
        """Use these dropouts from now on."""
        self.embedding_dropout = embedding_dropout
        self.input_dropout = input_dropout
        self.hidden_dropout = hidden_dropout
        self.output_dropout = output_dropout
        for layer in self.layers:
            layer.weight_dropout = weight_dropout

    def initial_state(self, batch_size: int) -> State:
        """Zeros for `batch_size` streams."""
        weight = self.model.embed_tokens.weight
        sizes = [layer.lstm.hidden_size for layer in self.layers]
        return [(weight.new_zeros(1, batch_size, size), weight.new_zeros(1, batch_size, size)) for size in sizes]

    def forward(self, tokens_BT: Tensor, state: State | None = None, rng: torch.Generator | None = None) -> Output:
        """Read a window of tokens and predict each next one.

        Args:
            tokens_BT: ids, (B, T).
            state: what the last window gave, or None for zeros.
            rng: generator of all dropout masks, on the model's device.

        Returns:
            Logits (B, T, V), the new state, and the last layer's output before and after dropout.
        """
        new_state, raw, dropped = self.features(tokens_BT, state, rng)
        return Output(self.lm_head(dropped), new_state, raw, dropped)

    def features(self, tokens_BT: Tensor, state: State | None = None, rng: torch.Generator | None = None) -> Features:
        """Do what `forward` does, without the decoder: a training step has a faster way from here to the loss."""
        x = embedding_dropout(tokens_BT, self.model.embed_tokens.weight, self.embedding_dropout, self.training, rng)
        x = locked_dropout(x, self.input_dropout, self.training, rng)
        new_state: State = []
        last = len(self.model.layers) - 1
        for i, layer in enumerate(self.layers):
            x, layer_state = layer(x, None if state is None else state[i], rng)
            new_state.append(layer_state)
            if i < last:
                x = locked_dropout(x, self.hidden_dropout, self.training, rng)
        dropped = locked_dropout(x, self.output_dropout, self.training, rng)
        return Features(new_state, x, dropped)


def detach_state(state: State) -> State:
    """Cut the graph between two windows (truncated back-propagation through time)."""
    return [(h.detach(), c.detach()) for h, c in state]
