"""Slow truth in float64, written from the equations of the papers: what the real code is compared with.

Nothing here comes from an implementation and nothing here is fast: a loop that can be checked by eye
against an equation is worth more than speed. This module must not import the package that it judges.
numpy does the arithmetic; torch appears in `value_and_gradient` alone, for autograd in float64.

    [AWD]      Merity, Keskar & Socher 2017, Regularizing and Optimizing LSTM Language Models (arXiv 1708.02182)
    [Cache]    Grave, Joulin & Usunier 2016, Improving Neural Language Models with a Continuous Cache (arXiv 1612.04426)
    [Dynamic]  Krause, Kahembwe, Murray & Renals 2017, Dynamic Evaluation of Neural Sequence Models (arXiv 1709.07432)
    [AdamW]    Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization (arXiv 1711.05101)
    [KN]       Chen & Goodman 1999, An empirical study of smoothing techniques for language modeling
    [KenLM]    Heafield, Pouzyrevsky, Clark & Koehn 2013, Scalable Modified Kneser-Ney Language Model Estimation
    [Mogrifier] Melis, Kočiský & Blunsom 2020, Mogrifier LSTM (arXiv 1909.01792)
    [EMA]      Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models (arXiv 2312.02696)
    [Clip]     Pascanu, Mikolov & Bengio 2012, On the difficulty of training Recurrent Neural Networks (arXiv 1211.5063)

Shape letters, as suffixes: B streams, T time steps, V vocabulary, E embedding, H hidden, I input of a
layer, L layers, N tokens in all. Arrays may come in as numpy arrays or as torch tensors; float64
numpy arrays go out. Masks hold 0 or 1 / (1 - p): whoever draws them has already scaled them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]
Weights = tuple[Any, Any, Any, Any]  # w_ih (4H, I), w_hh (4H, H), b_ih (4H,), b_hh (4H,): the order of nn.LSTM
LayerState = tuple[Array, Array]  # h (B, H), c (B, H)
Parameters = dict[str, Array]
Loss = Callable[["dict[str, torch.Tensor]", Any], "torch.Tensor"]


def f64(x: Any) -> Array:
    """Copy an array, a tensor or a number into a new float64 numpy array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    return np.array(x, dtype=np.float64)


def ids(x: Any) -> NDArray[np.int64]:
    """Copy token ids into a new int64 numpy array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    return np.array(x, dtype=np.int64)


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), in the equal form that does not overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def log_softmax(logits: Array) -> Array:
    """Return logits - log(sum(exp(logits))) over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)  # the shift cancels; it only keeps exp finite
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def numerical_gradient(f: Callable[[Array], float], x: Any, step: float = 1e-5) -> Array:
    """Return df/dx by central differences, (f(x + s) - f(x - s)) / 2s for one element at a time.

    The gradient of anything in this module, with no autograd: about nine digits for `step` = 1e-5.
    """
    x = f64(x)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (f(above) - f(below)) / (2.0 * step)
    return gradient


# --- The model ---------------------------------------------------------------------------------------


def lstm_step(x: Any, h: Any, c: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> LayerState:
    """Take one LSTM step ([AWD] sec. 2, the six equations), with PyTorch's order of gates and two biases.

        i = σ(W_i x + U_i h)    f = σ(W_f x + U_f h)    g = tanh(W_g x + U_g h)    o = σ(W_o x + U_o h)
        c' = f ⊙ c + i ⊙ g      h' = o ⊙ tanh(c')

    The paper leaves the biases out and writes c̃ for g. The four W stand above each other in `w_ih`,
    the four U in `w_hh`, in the order i, f, g, o; each gate adds both of its biases.

    Args:
        x: input, (B, I).
        h: previous output, (B, H).
        c: previous cell, (B, H).
        w_ih: (4H, I).
        w_hh: (4H, H).
        b_ih: (4H,).
        b_hh: (4H,).

    Returns:
        New h and c, each (B, H).
    """
    x, h, c = f64(x), f64(h), f64(c)
    size = h.shape[1]
    w_i, w_f, w_g, w_o = (f64(w_ih)[k * size : (k + 1) * size] for k in range(4))
    u_i, u_f, u_g, u_o = (f64(w_hh)[k * size : (k + 1) * size] for k in range(4))
    b_i, b_f, b_g, b_o = ((f64(b_ih) + f64(b_hh))[k * size : (k + 1) * size] for k in range(4))

    i = sigmoid(x @ w_i.T + h @ u_i.T + b_i)
    f = sigmoid(x @ w_f.T + h @ u_f.T + b_f)
    g = np.tanh(x @ w_g.T + h @ u_g.T + b_g)
    o = sigmoid(x @ w_o.T + h @ u_o.T + b_o)
    c_new = f * c + i * g
    h_new = o * np.tanh(c_new)
    return h_new, c_new


def mogrified_step(x: Any, h: Any, c: Any, rounds: Sequence[tuple[Any, Any]], *weights: Any) -> LayerState:
    """Take one Mogrifier LSTM step ([Mogrifier] eq. 1 and 2, with matrices of low rank).

        x^i = 2σ(Q^i h^(i-1)) ⊙ x^(i-2)   for odd i,      h^i = 2σ(R^i x^(i-1)) ⊙ h^(i-2)   for even i

    Args:
        x: input, (B, I).
        h: previous output, (B, H).
        c: previous cell, (B, H).
        rounds: of each round the two factors of Q or R: (K, what it reads), (what it scales, K).
        weights: of `lstm_step`.
    """
    x, h = f64(x), f64(h)
    for number, (down, up) in enumerate(rounds, start=1):
        matrix = f64(up) @ f64(down)
        if number % 2 == 1:
            x = 2 * sigmoid(h @ matrix.T) * x
        else:
            h = 2 * sigmoid(x @ matrix.T) * h
    return lstm_step(x, h, c, *weights)


def lstm_layer(
    x_BTI: Any, h0: Any, c0: Any, weights: Weights, weight_hh_mask: Any | None = None
) -> tuple[Array, LayerState]:
    """Run one weight-dropped LSTM layer over a window ([AWD] sec. 2).

    DropConnect: the recurrent matrix is multiplied by its mask ONCE, and the product serves every time
    step and every stream of the window, the first step (from the carried `h0`) included.

    Args:
        x_BTI: inputs, (B, T, I).
        h0: carried output, (B, H).
        c0: carried cell, (B, H).
        weights: w_ih (4H, I), w_hh (4H, H), b_ih (4H,), b_hh (4H,).
        weight_hh_mask: (4H, H), scaled; None is no weight dropout.

    Returns:
        All outputs (B, T, H), and the state after the last step: h (B, H), c (B, H).
    """
    x_BTI, h, c = f64(x_BTI), f64(h0), f64(c0)
    w_ih, w_hh, b_ih, b_hh = (f64(w) for w in weights)
    if weight_hh_mask is not None:
        w_hh = w_hh * f64(weight_hh_mask)
    outputs = []
    for t in range(x_BTI.shape[1]):
        h, c = lstm_step(x_BTI[:, t], h, c, w_ih, w_hh, b_ih, b_hh)
        outputs.append(h)
    return np.stack(outputs, axis=1), (h, c)


class ForwardOutput(NamedTuple):
    """What a forward pass gives; E_last is the width of the last layer."""

    logits: Array  # (B, T, V)
    raw: Array  # (B, T, E_last), the last layer's output before the output mask: for TAR and the cache
    dropped: Array  # (B, T, E_last), the same after the output mask: for AR and the decoder
    state: list[LayerState]  # one (h, c) a layer, after the last step


def awd_lstm_forward(
    tokens_BT: Any,
    params: dict[str, Any],
    masks: dict[str, Any] | None = None,
    state: Sequence[tuple[Any, Any]] | None = None,
) -> ForwardOutput:
    """Run the whole AWD-LSTM over a window, with every dropout mask given ([AWD] sec. 2 and 4.2 to 4.5).

        embedding ⊙ type mask → ⊙ input mask → LSTM 1 → ⊙ hidden mask 1 → LSTM 2 → … → LSTM L = raw
        raw ⊙ output mask = dropped → dropped Wᵀ + b = logits

    Hidden masks stand BETWEEN layers only: there are L - 1. The locked masks (input, hidden, output)
    have one value a stream and feature, the same at every time step (sec. 4.2). The embedding's mask
    has one value a word type: a dropped word vanishes at all its positions (sec. 4.3). A tied decoder
    (sec. 4.4) multiplies with the embedding WITHOUT its mask.

    Args:
        tokens_BT: ids, (B, T).
        params: `embedding` (V, E); `layers`, L tuples as in `lstm_layer`; `decoder_weight` (V, E_last),
            absent or None where it is tied to the embedding (then E_last = E); `decoder_bias` (V,).
        masks: `embedding` (V, 1); `input` (B, 1, E); `hidden`, L - 1 of (B, 1, H); `output`
            (B, 1, E_last); `weight`, L of (4H, H). Whatever is absent or None is all ones.
        state: one (h, c) a layer, each (B, H); None is zeros.

    Returns:
        Logits, raw and dropped last output, and the new state.
    """
    tokens_BT = ids(tokens_BT)
    masks = {} if masks is None else masks
    layers = params["layers"]
    num_layers = len(layers)
    hidden_masks = masks.get("hidden") or [None] * (num_layers - 1)
    weight_masks = masks.get("weight") or [None] * num_layers
    assert len(hidden_masks) == num_layers - 1, "hidden masks stand between layers only"
    assert len(weight_masks) == num_layers
    if state is None:
        sizes = [f64(w_hh).shape[1] for _, w_hh, _, _ in layers]
        state = [(np.zeros((len(tokens_BT), size)), np.zeros((len(tokens_BT), size))) for size in sizes]
    assert len(state) == num_layers

    def masked(x: Array, mask: Any | None) -> Array:
        return x if mask is None else x * f64(mask)

    embedding_VE = f64(params["embedding"])
    x = masked(embedding_VE, masks.get("embedding"))[tokens_BT]  # (B, T, E)
    x = masked(x, masks.get("input"))
    new_state = []
    for layer in range(num_layers):
        h0, c0 = state[layer]
        x, layer_state = lstm_layer(x, h0, c0, layers[layer], weight_masks[layer])
        new_state.append(layer_state)
        if layer < num_layers - 1:
            x = masked(x, hidden_masks[layer])
    raw = x
    dropped = masked(raw, masks.get("output"))

    untied = params.get("decoder_weight")
    decoder_VE = embedding_VE if untied is None else f64(untied)
    logits = dropped @ decoder_VE.T + f64(params["decoder_bias"])
    return ForwardOutput(logits, raw, dropped, new_state)


# --- Losses ------------------------------------------------------------------------------------------


def cross_entropy_nats(logits: Any, targets: Any) -> float:
    """Return the mean over predicted tokens of -ln softmax(logits)[target].

    Args:
        logits: (..., V).
        targets: ids, the leading shape of `logits`.
    """
    log_probs_NV = log_softmax(f64(logits)).reshape(-1, np.shape(logits)[-1])
    targets_N = ids(targets).reshape(-1)
    total = 0.0
    for log_probs_V, target in zip(log_probs_NV, targets_N, strict=True):
        total -= log_probs_V[target]
    return float(total / len(targets_N))


def ar(dropped: Any, alpha: float) -> float:
    """Return activation regularization, alpha · mean(h²), of the DROPPED last output ([AWD] sec. 4.6).

    The paper writes alpha · L2(m ⊙ h), m the output mask. Its L2 is taken as the mean square over all
    elements, as in the authors' experiments: alpha = 2 means what it means there.

    Args:
        dropped: last layer's output after its mask, (B, T, E_last).
        alpha: weight of the term.
    """
    return float(alpha * np.mean(f64(dropped) ** 2))


def tar(raw: Any, beta: float) -> float:
    """Return temporal activation regularization, beta · mean((h[t+1] - h[t])²), of the RAW output ([AWD] sec. 4.6).

    Args:
        raw: last layer's output before its mask, (B, T, E_last), T ≥ 2; the mean is over B (T - 1) E_last.
        beta: weight of the term.
    """
    raw = f64(raw)
    assert raw.shape[1] >= 2, "a window of one step has no difference to average"
    squares = [(raw[:, t + 1] - raw[:, t]) ** 2 for t in range(raw.shape[1] - 1)]
    return float(beta * np.mean(squares))


# --- Optimization ------------------------------------------------------------------------------------


def clip_by_global_norm(grads: dict[str, Any], max_norm: float, eps: float = 1e-6) -> tuple[Parameters, float]:
    """Scale all gradients together so that their joint L2 norm is at most `max_norm` ([Clip] alg. 1).

    Args:
        grads: gradients by name, any shapes.
        max_norm: the bound.
        eps: added to the norm in the quotient. The paper has none; `torch.nn.utils.clip_grad_norm_`
            has 1e-6, which shows in the seventh digit.

    Returns:
        The scaled gradients, and the norm before clipping.
    """
    grads = {name: f64(grad) for name, grad in grads.items()}
    norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
    scale = min(1.0, max_norm / (norm + eps))
    return {name: grad * scale for name, grad in grads.items()}, norm


def sgd_step(
    params: dict[str, Any],
    grads: dict[str, Any],
    lr: float,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
) -> Parameters:
    """Take one step of plain SGD with L2 weight decay: θ - lr (clip(g) + weight_decay · θ).

    The gradient of the loss is clipped first; the decay joins it afterwards, unclipped.
    """
    if max_grad_norm is not None:
        grads, _ = clip_by_global_norm(grads, max_grad_norm)
    new = {}
    for name in params:
        theta = f64(params[name])
        new[name] = theta - lr * (f64(grads[name]) + weight_decay * theta)
    return new


class AdamState(NamedTuple):
    """The moments of Adam and how many steps they have seen; a fresh one holds zeros."""

    first: Parameters
    second: Parameters
    num_steps: int


def adamw_step(
    params: dict[str, Any],
    grads: dict[str, Any],
    state: AdamState | None,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Parameters, AdamState]:
    """Take one step of AdamW ([AdamW] alg. 2): the decay acts on θ beside the adaptive step, not through it.

        m ← β1 m + (1 - β1) g          v ← β2 v + (1 - β2) g²
        m̂ = m / (1 - β1^t)             v̂ = v / (1 - β2^t)
        θ ← θ - lr · m̂ / (√v̂ + eps) - lr · weight_decay · θ       (θ on the right is the old one)

    The paper scales both terms with a schedule η and the first with α besides; as in PyTorch, one `lr`
    scales both.
    """
    if state is None:
        zeros = {name: np.zeros_like(f64(theta)) for name, theta in params.items()}
        state = AdamState(zeros, zeros, 0)
    beta1, beta2 = betas
    t = state.num_steps + 1
    new, first, second = {}, {}, {}
    for name in params:
        theta, grad = f64(params[name]), f64(grads[name])
        first[name] = beta1 * state.first[name] + (1.0 - beta1) * grad
        second[name] = beta2 * state.second[name] + (1.0 - beta2) * grad**2
        m_hat = first[name] / (1.0 - beta1**t)
        v_hat = second[name] / (1.0 - beta2**t)
        new[name] = theta - lr * m_hat / (np.sqrt(v_hat) + eps) - lr * weight_decay * theta
    return new, AdamState(first, second, t)


def averaging_trigger(history: Sequence[float], newest: float, n: int) -> bool:
    """Say whether averaging starts at this evaluation ([AWD] sec. 3, alg. 1).

    `history` holds the validation losses of the EARLIER evaluations, oldest first, all from the SGD
    phase; `newest` is not among them yet and is appended after the question is asked. The last n of
    the history are masked, so that a few bad evaluations do not trigger, and `newest` is compared
    with the best of what stands before them. Hence with n = 5 there must be six earlier losses, and
    the seventh evaluation is the first that can trigger.

    The arXiv text of algorithm 1 takes the minimum over the last n instead; the authors call that a
    typo (salesforce/awd-lstm-lm issue 13), and the ICLR text and their experiments have the rule below.
    """
    if len(history) <= n:
        return False
    return newest > min(history[: len(history) - n])


def running_mean_of_iterates(iterates: Sequence[Any]) -> Array:
    """Return the plain mean of the iterates from the trigger on ([AWD] sec. 3: 1 / (K - T + 1) · Σ_{i=T..K} w_i)."""
    total = np.zeros_like(f64(iterates[0]))
    for iterate in iterates:
        total = total + f64(iterate)
    return total / len(iterates)


def power_mean_of_iterates(iterates: Sequence[Any], share: float) -> Array:
    """Return the power-function average of w_1 … w_n ([EMA] sec. 3.1, with gamma = 2 / share - 2).

        mean_n = b_n · mean_(n-1) + (1 - b_n) · w_n,   b_n = (1 - 1/n) ^ (gamma + 1)

    Here as one sum: w_k has the weight (1 - b_k) · Π_{j=k+1..n} b_j, and that product is (k / n) ^ (gamma + 1).
    """
    n, power = len(iterates), 2 / share - 1
    weights = [((k / n) ** power) - ((k - 1) / n) ** power for k in range(1, n + 1)]
    return sum(weight * f64(iterate) for weight, iterate in zip(weights, iterates, strict=True))


class NtAsgdResult(NamedTuple):
    """A whole run of NT-ASGD."""

    iterates: list[Array]  # w_0 (the start) … w_K: iterates[k] is after k steps
    trigger_step: int | None  # the steps taken when averaging was switched on; None: never
    average: Array  # what is returned: the average, or the last iterate while none is running
    history: list[float]  # the validation losses of the SGD phase


def nt_asgd(
    start: Any,
    gradient: Callable[[Array, int], Any],
    valid_loss: Callable[[Array], float],
    *,
    lr: float,
    interval: int,
    n: int,
    num_steps: int,
    weight_decay: float = 0.0,
    average_includes_trigger: bool = False,
) -> NtAsgdResult:
    """Run non-monotonically triggered averaged SGD ([AWD] sec. 3, alg. 1), lr constant throughout.

    Averaging never changes the iterates: they remain those of plain SGD to the end.

    Args:
        start: w_0, any shape.
        gradient: called with w_k and k (0-based), gives the gradient for step k + 1.
        valid_loss: the loss of some weights; asked every `interval` steps, in the SGD phase only.
        lr: learning rate.
        interval: the paper's L, steps between evaluations (an epoch).
        n: non-monotone interval.
        num_steps: K.
        weight_decay: L2.
        average_includes_trigger: whether w_T itself, the iterate that was just found wanting, is the
            average's first term, as the paper's sum from i = T has it, or (default) w_{T+1}, the first
            that the averaging phase makes. The two differ by one term.
    """
    iterates = [f64(start)]
    history: list[float] = []
    trigger_step = None
    for k in range(num_steps):
        w = iterates[-1]
        iterates.append(w - lr * (f64(gradient(w, k)) + weight_decay * w))
        if trigger_step is None and (k + 1) % interval == 0:
            newest = valid_loss(iterates[-1])
            if averaging_trigger(history, newest, n):
                trigger_step = k + 1
            history.append(newest)

    averaged = []
    if trigger_step is not None:
        averaged = iterates[trigger_step if average_includes_trigger else trigger_step + 1 :]
    average = running_mean_of_iterates(averaged) if averaged else iterates[-1]
    return NtAsgdResult(iterates, trigger_step, average, history)


def window_length(uniform: float, normal: float, bptt: int, std: float = 5.0) -> int:
    """Turn two random draws into the length of one training window ([AWD] sec. 4.1).

        base   = bptt if uniform < 0.95 else bptt / 2          (bptt / 2 is not rounded)
        length = max(5, int(base + std · normal)), and at most int(base + 20)

    The cap is ours, not the paper's: it is relative to the BASE, four standard deviations above it, and
    keeps a rare draw from needing much more memory than all others. The last window of an epoch may be
    cut shorter by the end of the data; that is not this function's business.

    Args:
        uniform: a draw from U[0, 1).
        normal: a draw from N(0, 1).
        bptt: the nominal length.
        std: standard deviation of the lengths; the cap assumes 5.
    """
    base = float(bptt) if uniform < 0.95 else bptt / 2.0
    return min(max(5, int(base + std * normal)), int(base + 20.0))


def window_lengths(uniforms: Iterable[float], normals: Iterable[float], bptt: int, std: float = 5.0) -> list[int]:
    """Apply `window_length` to a sequence of draws, one pair a window."""
    return [window_length(u, z, bptt, std) for u, z in zip(uniforms, normals, strict=True)]


# --- Adaptation to recent text -----------------------------------------------------------------------


def cache_distribution(h: Any, past_hiddens: Sequence[Any], past_next: Sequence[int], theta: float, size: int) -> Array:
    """Return p_cache over the vocabulary ([Cache] eq. 2).

        p_cache(w) ∝ Σ_i 1{x_{i+1} = w} · exp(θ h · h_i),     and the sum over w of the right side is
        Σ_i exp(θ h · h_i), so that the attention over i is a softmax.

    Args:
        h: the current output, (H,).
        past_hiddens: the cached h_i, oldest first, W of (H,), W ≥ 1.
        past_next: the W next words x_{i+1} that go with them.
        theta: flatness; 0 makes the cache a count of recent words.
        size: V.

    Returns:
        (V,), sums to one, zero for every word that is not in the cache.
    """
    assert len(past_hiddens) == len(past_next) >= 1
    scores = [theta * float(np.dot(f64(h), f64(h_i))) for h_i in past_hiddens]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    p_V = np.zeros(size)
    for weight, word in zip(weights, past_next, strict=True):
        p_V[word] += weight / sum(weights)
    return p_V


def neural_cache(logits_TV: Any, hiddens_TH: Any, targets_T: Any, theta: float, lam: float, window: int) -> Array:
    """Score one stream with a neural cache ([Cache] eq. 2 and 3, linear interpolation).

        p_t(w) = (1 - λ) softmax(logits_t)(w) + λ p_cache,t(w)

    What is paired with what: `hiddens_TH[t]` is h_t, the RAW output of the last layer from which
    `logits_TV[t]` was computed, that is from which the word `targets_T[t]` = x_{t+1} was predicted. The
    cache holds the pairs (h_i, x_{i+1}) = (hiddens_TH[i], targets_T[i]). At step t it holds those with
    max(0, t - window) ≤ i < t: the words up to x_t, the current input, included, and never the target.
    h_t is compared as it is, without normalising. A cache that is not full yet is used as it stands;
    with an empty one (t = 0, or window = 0) p is p_vocab alone, not (1 - λ) p_vocab.

    Args:
        logits_TV: (T, V).
        hiddens_TH: (T, H).
        targets_T: ids, (T,).
        theta: flatness.
        lam: λ in [0, 1].
        window: how many pairs the cache holds at most.

    Returns:
        log p of each target in nats, (T,); -inf where p is zero.
    """
    logits_TV, hiddens_TH, targets_T = f64(logits_TV), f64(hiddens_TH), ids(targets_T)
    num_steps, size = logits_TV.shape
    log_p_T = np.zeros(num_steps)
    for t in range(num_steps):
        p_V = np.exp(log_softmax(logits_TV[t]))
        cached = range(max(0, t - window), t)
        if len(cached) > 0:
            p_cache_V = cache_distribution(
                hiddens_TH[t], [hiddens_TH[i] for i in cached], [int(targets_T[i]) for i in cached], theta, size
            )
            p_V = (1.0 - lam) * p_V + lam * p_cache_V
        p = float(p_V[targets_T[t]])
        log_p_T[t] = math.log(p) if p > 0.0 else -math.inf
    return log_p_T


def value_and_gradient(loss: Loss, params: dict[str, Any], batch: Any) -> tuple[float, Parameters]:
    """Return loss(params, batch) and its gradient, by torch's autograd in float64; unused parameters get zeros."""
    import torch  # here, so that the numpy-only truths can be used where torch is not installed

    leaves = {name: torch.tensor(f64(theta), requires_grad=True) for name, theta in params.items()}
    value = loss(leaves, batch)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return float(value.detach()), {name: f64(grad) for name, grad in zip(leaves, grads, strict=True)}


def mean_squared_gradients(loss: Loss, params: dict[str, Any], batches: Iterable[Any]) -> Parameters:
    """Return MS_g, the mean over TRAINING batches of the squared gradient at the trained weights ([Dynamic] sec. 5).

    MS_g = 1 / N_b · Σ_k (∇L(M_k))²,   element by element
    """
    total = {name: np.zeros_like(f64(theta)) for name, theta in params.items()}
    count = 0
    for batch in batches:
        _, grads = value_and_gradient(loss, params, batch)
        total = {name: total[name] + grads[name] ** 2 for name in total}
        count += 1
    return {name: square / count for name, square in total.items()}


def rms_norm(ms: dict[str, Any], average: str = "elements") -> Parameters:
    """Return RMS_norm = √MS_g / avg(√MS_g), which scales the decay of each weight ([Dynamic] sec. 5).

    Args:
        ms: MS_g by name.
        average: over what avg runs. `elements`: over all weights of the model alike, as the paper's
            formula reads. `tensors`: the mean over parameter tensors of each tensor's mean, as in the
            authors' released program, where a bias of 40 counts as much as a matrix of a million. The
            two differ by one factor for all weights, that is by a rescaling of the decay rate λ.
    """
    rms = {name: np.sqrt(f64(square)) for name, square in ms.items()}
    if average == "elements":
        mean = sum(float(r.sum()) for r in rms.values()) / sum(r.size for r in rms.values())
    elif average == "tensors":
        mean = sum(float(r.mean()) for r in rms.values()) / len(rms)
    else:
        raise ValueError(f"average is {average!r}; allowed: elements, tensors")
    return {name: r / mean for name, r in rms.items()}


def dynamic_evaluation(
    loss: Loss,
    params: dict[str, Any],
    ms: dict[str, Any],
    segments: Iterable[Any],
    *,
    lr: float,
    decay: float,
    eps: float,
    average: str = "elements",
) -> tuple[Array, Parameters]:
    """Score segments in order, learning from each after it was scored ([Dynamic] sec. 5, RMS with a global prior).

        θ ← θ - lr · ∇L(s) / (√MS_g + eps) + min(decay · RMS_norm, 1) ⊙ (θ_g - θ)

    θ_g are the trained weights, where it starts; both terms see the θ before the update. The paper
    clips RMS_norm at 1 / decay, which is the same as the minimum above: no weight is pulled past θ_g.

    Args:
        loss: called once a segment, in order, with the current weights; a recurrent model may therefore
            carry its (detached) state from call to call in a closure. Whether it is a mean or a sum
            over the segment's tokens scales the gradient, and so what `lr` means; the authors' is a mean.
        params: θ_g by name.
        ms: MS_g by name, from `mean_squared_gradients`.
        segments: whatever `loss` takes.
        lr: η.
        decay: λ.
        eps: ε, beside the square root.
        average: see `rms_norm`.

    Returns:
        The loss of each segment BEFORE anything was learned from it, (S,), and the weights after the last.
    """
    start = {name: f64(theta) for name, theta in params.items()}
    rms = {name: np.sqrt(f64(square)) for name, square in ms.items()}
    rate = {name: np.minimum(decay * norm, 1.0) for name, norm in rms_norm(ms, average).items()}
    theta = start
    losses = []
    for segment in segments:
        value, grads = value_and_gradient(loss, theta, segment)
        losses.append(value)
        theta = {
            name: theta[name] - lr * grads[name] / (rms[name] + eps) + rate[name] * (start[name] - theta[name])
            for name in theta
        }
    return np.array(losses), theta


# --- N-grams -----------------------------------------------------------------------------------------


class KneserNey:
    """Interpolated modified Kneser-Ney in fractions, by dictionaries of tuples [KN, sec. 3; KenLM, sec. 3].

    Args:
        lines: sentences of words, without "<s>" and "</s>".
        words: everything that can be predicted, "</s>" included.
        order: N.
        fallback: discounts of an order whose counts of counts do not define any.
    """

    def __init__(
        self, lines: Iterable[Sequence[str]], words: Sequence[str], order: int,
        fallback: tuple[Fraction, Fraction, Fraction] = (Fraction(1, 2), Fraction(1), Fraction(3, 2)),
    ) -> None:  # fmt: skip
        self.words, self.order = words, order
        occurrences: Counter[tuple[str, ...]] = Counter()
        for line in lines:
            sentence = ("<s>", *line, "</s>")
            for end in range(1, len(sentence)):  # "<s>" is never predicted
                for start in range(max(0, end - order + 1), end + 1):
                    occurrences[sentence[start : end + 1]] += 1
        self.adjusted: dict[tuple[str, ...], int] = {}
        for gram, occurred in occurrences.items():
            if len(gram) == order or gram[0] == "<s>":
                self.adjusted[gram] = occurred
            else:
                self.adjusted[gram] = len({other[0] for other in occurrences if other[1:] == gram})
        self.discounts: list[tuple[Fraction, ...]] = []
        self.fallback_orders: list[int] = []
        for n in range(1, order + 1):
            number = Counter(a for gram, a in self.adjusted.items() if len(gram) == n)
            try:
                y = Fraction(number[1], number[1] + 2 * number[2])
                found = tuple(a - (a + 1) * y * Fraction(number[a + 1], number[a]) for a in (1, 2, 3))
                if not all(0 < d <= a for a, d in zip((1, 2, 3), found, strict=True)):
                    raise ZeroDivisionError
            except ZeroDivisionError:
                found = fallback
                self.fallback_orders.append(n)
            self.discounts.append(found)

    def probability(self, word: str, context: tuple[str, ...]) -> Fraction:
        """Give p(word | context); of a context, the last N - 1 words count."""
        context = context[len(context) - min(len(context), self.order - 1) :]
        return self._interpolated(word, context)

    def _interpolated(self, word: str, context: tuple[str, ...]) -> Fraction:
        shorter = self._interpolated(word, context[1:]) if context else Fraction(1, len(self.words))
        total, left_over = 0, Fraction(0)
        for w in self.words:
            a = self.adjusted.get((*context, w), 0)
            total += a
            left_over += self._discount(len(context) + 1, a)
        if total == 0:
            return shorter
        a = self.adjusted.get((*context, word), 0)
        return (a - self._discount(len(context) + 1, a) + left_over * shorter) / total

    def _discount(self, n: int, a: int) -> Fraction:
        return self.discounts[n - 1][min(a, 3) - 1] if a else Fraction(0)


# --- Scores ------------------------------------------------------------------------------------------


class TextCounts(NamedTuple):
    """How long a text is, by its ORIGINAL characters, whatever tokenizer the model has."""

    num_lines: int
    num_words: int  # without the ends of lines
    num_chars: int  # code points, one newline a line included
    num_bytes: int  # of UTF-8, one newline a line included


def text_counts(lines: Iterable[str]) -> TextCounts:
    """Count a text given as lines without their newlines; words are what whitespace separates."""
    num_lines = num_words = num_chars = num_bytes = 0
    for line in lines:
        num_lines += 1
        num_words += len(line.split())
        num_chars += len(line) + 1
        num_bytes += len(line.encode("utf-8")) + 1
    return TextCounts(num_lines, num_words, num_chars, num_bytes)


def bits_per_char(nats: float, num_chars: int) -> float:
    """Return total nats / ln 2 / characters; `num_chars` counts one newline a line, for the model predicts it."""
    return nats / math.log(2.0) / num_chars


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return total nats / ln 2 / bytes of UTF-8; `num_bytes` counts one newline a line."""
    return nats / math.log(2.0) / num_bytes


def token_perplexity(nats: float, num_tokens: int) -> float:
    """Return exp(total nats / predicted tokens), comparable only between models with one tokenizer."""
    return math.exp(nats / num_tokens)


def word_perplexity(nats: float, num_words: int, num_lines: int) -> float:
    """Return exp(total nats / (words + lines)): one end a line is a word too, whatever the tokenizer.

    For a word-level model with one <eos> a line this is `token_perplexity`, the figure in the papers.
    """
    return math.exp(nats / (num_words + num_lines))
