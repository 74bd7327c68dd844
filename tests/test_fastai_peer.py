"""Our network beside fastai's AWD_LSTM, which no one here wrote: the same weights and masks give the same numbers.

Where the two differ on purpose:

- State is a value that goes into our forward pass and comes out; fastai's model keeps it until `reset()`.
- fastai has a padding word (id 1 unless told otherwise), whose vector learns nothing from being read. Streams
  have no padding, and all our words learn: `test_the_padding_word_is_fastais_alone`.
- fastai's `WeightDropout` moves the recurrent matrix to a parameter called `weight_hh_l0_raw`, one level up. Ours
  keeps the name that `nn.LSTM` gives it. In both, the gradient reaches the raw matrix through the mask.
- fastai's last layer is as wide as the embedding always, ours only where it is tied; untied they are compared
  with one width for all.
- fastai adds TAR only where a batch has more than one stream, ours always.
"""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ulimi import model as ulimi_model
from ulimi.loss import regularisation
from ulimi.model import AWDLSTM, detach_state

V, E, H, L, B, T = 29, 6, 10, 3, 4, 7
PAD = 1
NO_DROPOUT = {"embed_p": 0.0, "input_p": 0.0, "weight_p": 0.0, "hidden_p": 0.0, "output_p": 0.0}
ALL_DROPOUTS = {"embed_p": 0.1, "input_p": 0.4, "weight_p": 0.5, "hidden_p": 0.3, "output_p": 0.2}
OUR_NAMES = {
    "embed_p": "embedding_dropout",
    "input_p": "input_dropout",
    "weight_p": "weight_dropout",
    "hidden_p": "hidden_dropout",
    "output_p": "output_dropout",
}


@pytest.fixture(scope="session")
def peer():
    """The modules of fastai; torch deprecates a decorator that fastai uses as it is imported."""
    pytest.importorskip("fastai")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from fastai.callback import rnn
        from fastai.text.models import awdlstm, core
    return SimpleNamespace(awdlstm=awdlstm, core=core, rnn=rnn)


class Masks:
    """Masks from a seed. Two networks that ask for the same shapes in the same order get the same masks."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(3)
        self.drawn: list[tuple[tuple[int, ...], float]] = []

    def draw(self, shape, p: float) -> torch.Tensor:
        self.drawn.append((tuple(shape), p))
        return torch.from_numpy((self._rng.random(tuple(shape)) >= p) / (1 - p))


@pytest.fixture
def masks(peer, monkeypatch):
    """Let both networks draw from `ours` and `theirs` in place of their own generators."""
    ours, theirs = Masks(), Masks()
    monkeypatch.setattr(ulimi_model, "dropout_mask", lambda shape, p, like, rng=None: ours.draw(shape, p))
    monkeypatch.setattr(peer.awdlstm, "dropout_mask", lambda x, sz, p: theirs.draw(sz, p))

    def dropout(weight, p):
        return weight * theirs.draw(weight.shape, p) if p else weight

    monkeypatch.setattr(peer.awdlstm, "F", SimpleNamespace(dropout=dropout, embedding=F.embedding))
    return SimpleNamespace(ours=ours, theirs=theirs)


def make_pair(peer, dropouts, *, tied=True, hidden_size=H):
    """Both networks in float64 with equal weights, large enough that a wrong one shows."""
    config = {"emb_sz": E, "n_hid": hidden_size, "n_layers": L, "pad_token": PAD, "bidir": False, "out_bias": True}
    theirs = peer.core.get_language_model(peer.awdlstm.AWD_LSTM, V, {**config, **dropouts, "tie_weights": tied})
    theirs = theirs.double()
    theirs.reset()  # its state was made before .double()
    ours = AWDLSTM(
        vocab_size=V,
        embedding_size=E,
        hidden_size=hidden_size,
        num_layers=L,
        tie_weights=tied,
        **{OUR_NAMES[name]: p for name, p in dropouts.items()},
    ).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for mine, other in parameter_pairs(ours, theirs).values():
            mine.normal_(std=0.4, generator=generator)
            other.copy_(mine)
    return ours, theirs


def parameter_pairs(ours, theirs):
    """Our name -> (our parameter, fastai's)."""
    encoder, decoder = theirs
    pairs = {"model.embed_tokens.weight": encoder.encoder.weight, "lm_head.bias": decoder.decoder.bias}
    if not ours.tie_weights:
        pairs["lm_head.weight"] = decoder.decoder.weight
    for i, rnn in enumerate(encoder.rnns):
        pairs[f"model.layers.{i}.lstm.weight_hh_l0"] = rnn.weight_hh_l0_raw
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            pairs[f"model.layers.{i}.lstm.{name}"] = getattr(rnn.module, name)
    own = dict(ours.named_parameters())
    assert own.keys() == pairs.keys()
    assert {id(p) for p in theirs.parameters()} == {id(p) for p in pairs.values()}
    return {name: (own[name], other) for name, other in pairs.items()}


def windows_of(num_windows, *, with_padding_word=False):
    """Inputs and targets, each (B, T), one pair a window of the same streams."""
    rng = np.random.default_rng(11)
    ids = rng.choice([i for i in range(V) if i != PAD], size=(B, num_windows * T + 1))
    if with_padding_word:
        ids[:, ::3] = PAD
    streams = torch.from_numpy(ids)
    return [(streams[:, s : s + T], streams[:, s + 1 : s + T + 1]) for s in range(0, num_windows * T, T)]


def cross_entropy(logits, targets_BT):
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())


def assert_close(ours, theirs, name="", tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


WIDTHS = pytest.mark.parametrize(("tied", "hidden_size"), [(True, H), (False, E)])


@WIDTHS
def test_evaluation_gives_equal_logits_and_states_over_two_windows(peer, tied, hidden_size):
    ours, theirs = make_pair(peer, ALL_DROPOUTS, tied=tied, hidden_size=hidden_size)
    ours.eval()
    theirs.eval()
    state = None
    for inputs_BT, _ in windows_of(2, with_padding_word=True):
        out = ours(inputs_BT, state)
        logits, raw, dropped = theirs(inputs_BT)
        assert_close(out.logits, logits)
        assert_close(out.raw, raw)
        assert_close(out.dropped, dropped)
        for mine, other in zip(out.state, theirs[0].hidden, strict=True):
            assert_close(mine, other)
        state = out.state


@WIDTHS
@pytest.mark.parametrize(
    "dropouts",
    [
        pytest.param(NO_DROPOUT, id="none"),
        *(pytest.param({**NO_DROPOUT, name: p}, id=name) for name, p in ALL_DROPOUTS.items()),
        pytest.param(ALL_DROPOUTS, id="all"),
    ],
)
def test_training_with_equal_masks_gives_equal_gradients_and_weights(peer, masks, dropouts, tied, hidden_size):
    ours, theirs = make_pair(peer, dropouts, tied=tied, hidden_size=hidden_size)
    ours.train()
    theirs.train()
    state = None
    for inputs_BT, targets_BT in windows_of(3):
        out = ours(inputs_BT, state)
        logits, raw, dropped = theirs(inputs_BT)
        assert_close(out.logits, logits)
        assert_close(out.raw, raw)
        assert_close(out.dropped, dropped)
        for loss, model in ((cross_entropy(out.logits, targets_BT), ours), (cross_entropy(logits, targets_BT), theirs)):
            model.zero_grad()
            loss.backward()
        for name, (mine, other) in parameter_pairs(ours, theirs).items():
            assert mine.grad.abs().max() > 1e-4, name
            assert_close(mine.grad, other.grad, name)
        with torch.no_grad():
            for parameter in (*ours.parameters(), *theirs.parameters()):
                parameter -= 0.5 * parameter.grad
        state = detach_state(out.state)
    for name, (mine, other) in parameter_pairs(ours, theirs).items():
        assert_close(mine, other, name)
    # The same kinds of masks, of the same shapes, asked for in the same order.
    assert masks.ours.drawn == masks.theirs.drawn
    per_window = {"embed_p": 1, "input_p": 1, "weight_p": L, "hidden_p": L - 1, "output_p": 1}
    assert len(masks.ours.drawn) == 3 * sum(per_window[name] for name, p in dropouts.items() if p)


def test_gradients_are_equal_also_after_an_evaluation(peer, masks):
    ours, theirs = make_pair(peer, ALL_DROPOUTS)
    (inputs_BT, targets_BT), (more_BT, _) = windows_of(2)
    state = ours.train()(inputs_BT).state
    theirs.train()(inputs_BT)
    assert_close(ours.eval()(more_BT, state).logits, theirs.eval()(more_BT)[0])
    theirs.reset()
    out = ours.train()(inputs_BT)
    logits = theirs.train()(inputs_BT)[0]
    cross_entropy(out.logits, targets_BT).backward()
    cross_entropy(logits, targets_BT).backward()
    for name, (mine, other) in parameter_pairs(ours, theirs).items():
        assert_close(mine.grad, other.grad, name)


def test_ar_and_tar_are_those_of_fastais_callback(peer, masks):
    ours, theirs = make_pair(peer, ALL_DROPOUTS)
    inputs_BT, targets_BT = windows_of(1)[0]
    out = ours.train()(inputs_BT)
    loss = cross_entropy(out.logits, targets_BT) + sum(regularisation(out.raw, out.dropped, 2.0, 1.0))
    loss.backward()

    logits, raw, dropped = theirs.train()(inputs_BT)
    callback = peer.rnn.RNNRegularizer(alpha=2.0, beta=1.0)
    callback.learn = SimpleNamespace(
        training=True, rnn=SimpleNamespace(raw_out=raw, out=dropped), loss_grad=cross_entropy(logits, targets_BT)
    )
    callback.after_loss()
    callback.learn.loss_grad.backward()

    # The callback rounds the outputs to float32.
    assert_close(loss, callback.learn.loss_grad, "loss", 1e-6)
    assert loss > cross_entropy(out.logits, targets_BT) + 0.01
    for name, (mine, other) in parameter_pairs(ours, theirs).items():
        assert_close(mine.grad, other.grad, name, 1e-6)


def test_the_padding_word_is_fastais_alone(peer):
    ours, theirs = make_pair(peer, NO_DROPOUT, tied=False, hidden_size=E)  # untied: only reading moves a vector
    inputs_BT, targets_BT = windows_of(1, with_padding_word=True)[0]
    cross_entropy(ours(inputs_BT).logits, targets_BT).backward()
    cross_entropy(theirs(inputs_BT)[0], targets_BT).backward()
    mine, other = (p.grad for p in parameter_pairs(ours, theirs)["model.embed_tokens.weight"])
    assert other[PAD].abs().max() == 0.0
    assert mine[PAD].abs().max() > 1e-4
    rest = torch.arange(V) != PAD
    assert_close(mine[rest], other[rest])
