"""The model against the reference, mask by mask, and a test for each way in which AWD-LSTMs went wrong elsewhere."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from ulimi.loss import regularisation
from ulimi.model import AWDLSTM, WeightDropLSTM, detach_state, dropout_mask, embedding_dropout, locked_dropout

V, E, H, B, T = 11, 4, 6, 3, 7
ALPHA, BETA = 2.0, 1.0
# No two alike, so that a mask's rate says which dropout it belongs to.
RATES = {
    "embedding_dropout": 0.15,
    "input_dropout": 0.3,
    "hidden_dropout": 0.4,
    "output_dropout": 0.45,
    "weight_dropout": 0.5,
}
LAYER_PARAMETERS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(reference.f64(a), reference.f64(b), rtol=tolerance, atol=tolerance)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_model(*, dtype=torch.double, seed=1, **settings):
    """A model with weights so large that no gate is nearly linear, and biases that differ."""
    sizes = {"vocab_size": V, "embedding_size": E, "hidden_size": H, "num_layers": 3}
    model = AWDLSTM(**sizes | settings).double()
    rng = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.8, 0.8, generator=rng)
    return model.to(dtype)


def make_tokens(*shape, seed=2):
    return torch.randint(V, shape or (B, T), generator=generator(seed))


def make_state(model, seed=3):
    rng = generator(seed)
    return [tuple(torch.empty_like(x).uniform_(-1, 1, generator=rng) for x in s) for s in model.initial_state(B)]


def reference_params(weights):
    """Sort named parameters into the reference's form; the names are those that checkpoints have."""
    num_layers = sum(name.endswith("weight_hh_l0") for name in weights)
    return {
        "embedding": weights["model.embed_tokens.weight"],
        "layers": [tuple(weights[f"model.layers.{i}.lstm.{n}"] for n in LAYER_PARAMETERS) for i in range(num_layers)],
        "decoder_weight": weights.get("lm_head.weight"),
        "decoder_bias": weights["lm_head.bias"],
    }


def reference_state(state):
    return None if state is None else [(h[0], c[0]) for h, c in state]


class Masks:
    """Stands in for `dropout_mask`: draws real masks and remembers them by their rate."""

    def __init__(self):
        self.drawn = []

    def __call__(self, shape, p, like, rng=None):
        mask = dropout_mask(shape, p, like, rng)
        self.drawn.append((p, mask))
        return mask

    def of(self, name):
        return [mask for p, mask in self.drawn if p == RATES[name]]

    def for_reference(self):
        (embedding,), (input_,), (output,) = (self.of(f"{n}_dropout") for n in ("embedding", "input", "output"))
        masks = {"embedding": embedding, "input": input_, "output": output}
        return masks | {"hidden": self.of("hidden_dropout"), "weight": self.of("weight_dropout")}


@pytest.fixture
def masks(monkeypatch):
    recorder = Masks()
    monkeypatch.setattr("ulimi.model.dropout_mask", recorder)
    return recorder


def assert_same_output(out, expected, tolerance=1e-12):
    for name in ("logits", "raw", "dropped"):
        close(getattr(out, name), getattr(expected, name), tolerance)
    for (h, c), (h_expected, c_expected) in zip(out.state, expected.state, strict=True):
        close(h[0], h_expected, tolerance)
        close(c[0], c_expected, tolerance)


# --- The whole model ---------------------------------------------------------------------------------


@tied_or_not
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("carried", [False, True], ids=["zero_state", "carried_state"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-12), (torch.float, 2e-5)])
def test_training_pass_is_the_reference_with_the_same_masks(masks, tied, num_layers, carried, dtype, tolerance):
    model = make_model(tie_weights=tied, num_layers=num_layers, dtype=dtype, **RATES)
    tokens, state = make_tokens(), make_state(model) if carried else None
    out = model(tokens, state, generator())
    weights = reference_params(dict(model.named_parameters()))
    expected = reference.awd_lstm_forward(tokens, weights, masks.for_reference(), reference_state(state))
    assert_same_output(out, expected, tolerance)


@tied_or_not
def test_evaluation_pass_is_the_reference_without_masks(masks, tied):
    model = make_model(tie_weights=tied, **RATES).eval()
    tokens, state = make_tokens(), make_state(model)
    out = model(tokens, state)
    expected = reference.awd_lstm_forward(
        tokens, reference_params(dict(model.named_parameters())), None, reference_state(state)
    )
    assert_same_output(out, expected)
    assert masks.drawn == []
    assert torch.equal(out.raw, out.dropped)


@tied_or_not
def test_masks_have_the_shapes_of_their_dropouts(masks, tied):
    last = E if tied else H
    make_model(tie_weights=tied, **RATES)(make_tokens(), rng=generator())
    shapes = {name: [tuple(mask.shape) for mask in masks.of(name)] for name in RATES}
    assert shapes == {
        "embedding_dropout": [(V, 1)],
        "input_dropout": [(B, 1, E)],
        "hidden_dropout": [(B, 1, H), (B, 1, H)],
        "output_dropout": [(B, 1, last)],
        "weight_dropout": [(4 * H, H), (4 * H, H), (4 * last, last)],
    }
    assert len(masks.drawn) == 8


@tied_or_not
def test_gradients_are_finite_differences_of_the_reference_also_after_an_evaluation(masks, tied):
    # Every weight, through the masks, the carried state, AR and TAR: nothing may be cut off from the loss.
    model = make_model(tie_weights=tied, vocab_size=5, embedding_size=3, hidden_size=3, num_layers=2, **RATES)
    rng = generator(8)
    tokens, targets = (torch.randint(5, (B, 3), generator=rng) for _ in range(2))
    state = make_state(model)
    for mode in (True, False, True):
        masks.drawn.clear()
        out = model.train(mode)(tokens, state, rng)
    ar, tar = regularisation(out.raw, out.dropped, ALPHA, BETA)
    (F.cross_entropy(out.logits.flatten(0, 1), targets.flatten()) + ar + tar).backward()

    given = {kind: np.asarray(mask) if kind in ("embedding", "input", "output") else [np.asarray(m) for m in mask]
             for kind, mask in masks.for_reference().items()}  # fmt: skip
    weights = {name: reference.f64(p) for name, p in model.named_parameters()}

    def loss(name, weight):
        params = reference_params({**weights, name: weight})
        expected = reference.awd_lstm_forward(tokens, params, given, reference_state(state))
        nll = reference.cross_entropy_nats(expected.logits, targets)
        return nll + reference.ar(expected.dropped, ALPHA) + reference.tar(expected.raw, BETA)

    for name, parameter in model.named_parameters():
        numerical = reference.numerical_gradient(lambda weight, name=name: loss(name, weight), parameter)
        close(parameter.grad, numerical, 1e-8)


@tied_or_not
def test_gradients_in_single_precision_are_those_in_double(tied):
    # Single precision runs other kernels than double.
    double = make_model(tie_weights=tied, **RATES)
    single = copy.deepcopy(double).float()
    tokens, targets = make_tokens(), make_tokens(seed=9).flatten()
    for model in (double, single):
        F.cross_entropy(model(tokens, rng=generator()).logits.flatten(0, 1), targets).backward()
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        close(a.grad, b.grad, 1e-5)


@tied_or_not
@pytest.mark.parametrize("training", [True, False])
def test_without_dropout_it_is_a_stack_of_plain_lstms(tied, training):
    # The plain layers are loaded by name, strictly: a checkpoint's layers are those of `nn.LSTM`.
    model = make_model(tie_weights=tied).train(training)
    last = E if tied else H
    tokens, state = make_tokens(), make_state(model)
    tensors = model.state_dict()
    x, plain_state = F.embedding(tokens, tensors["model.embed_tokens.weight"]), []
    for i, (input_size, hidden_size) in enumerate([(E, H), (H, H), (H, last)]):
        lstm = nn.LSTM(input_size, hidden_size, batch_first=True).double()
        lstm.load_state_dict({name: tensors[f"model.layers.{i}.lstm.{name}"] for name in LAYER_PARAMETERS})
        x, layer_state = lstm(x, state[i])
        plain_state.append(layer_state)
    out = model(tokens, state)
    close(out.raw, x)
    close(out.dropped, x)
    close(out.logits, x @ tensors["lm_head.weight"].T + tensors["lm_head.bias"])
    for layer_state, expected in zip(out.state, plain_state, strict=True):
        close(layer_state[0], expected[0])
        close(layer_state[1], expected[1])


@tied_or_not
@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_one_long_pass_is_two_with_carried_state_is_one_token_at_a_time(tied, dtype):
    model = make_model(tie_weights=tied, dtype=dtype, **RATES).eval()
    tokens = make_tokens(B, 12)
    whole = model(tokens)
    for cuts in ([5, 7], [1, 11], [1] * 12):
        state, parts = None, []
        for part in tokens.split(cuts, dim=1):
            out = model(part, state)
            state = out.state
            parts.append(out)
        tolerance = 1e-12 if dtype == torch.double else 2e-6
        for name in ("logits", "raw", "dropped"):
            close(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name), tolerance)
        for layer_state, expected in zip(state, whole.state, strict=True):
            close(layer_state[0], expected[0], tolerance)
            close(layer_state[1], expected[1], tolerance)


def test_a_stream_does_not_see_its_neighbours():
    model = make_model(**RATES).eval()
    tokens, state = make_tokens(), make_state(model)
    whole = model(tokens, state)
    for b in range(B):
        alone = model(tokens[b : b + 1], [(h[:, b : b + 1], c[:, b : b + 1]) for h, c in state])
        close(alone.logits[0], whole.logits[b])


def test_no_position_sees_a_later_token():
    model = make_model().eval()
    tokens = make_tokens()
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % V
    before, after = model(tokens).logits, model(changed).logits
    close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=2).min() > 1e-6


def test_initial_state_is_zero_and_what_no_state_means():
    model = make_model().eval()
    state = model.initial_state(B)
    assert all(not x.any() for layer_state in state for x in layer_state)
    assert all(x.dtype == torch.double for layer_state in state for x in layer_state)
    tokens = make_tokens()
    assert torch.equal(model(tokens, state).logits, model(tokens).logits)


def test_the_state_that_is_passed_in_is_not_changed():
    model = make_model(**RATES)
    state = make_state(model)
    before = copy.deepcopy(state)
    model(make_tokens(), state, generator())
    assert all(torch.equal(x, y) for a, b in zip(state, before, strict=True) for x, y in zip(a, b, strict=True))


def test_detached_state_has_the_values_and_no_history():
    state = make_model()(make_tokens()).state
    assert all(x.requires_grad for layer_state in state for x in layer_state)
    detached = detach_state(state)
    assert all(not x.requires_grad for layer_state in detached for x in layer_state)
    for a, b in zip(detached, state, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_dropout_draws_from_the_given_generator_alone():
    model, tokens = make_model(**RATES), make_tokens()
    before = torch.get_rng_state()
    rng = generator(4)
    first, second = model(tokens, rng=rng).logits, model(tokens, rng=rng).logits
    assert torch.equal(torch.get_rng_state(), before)
    again = generator(4)
    assert torch.equal(model(tokens, rng=again).logits, first)
    assert torch.equal(model(tokens, rng=again).logits, second)
    assert not torch.equal(first, second)


# --- Weight dropout ----------------------------------------------------------------------------------


def test_the_recurrent_weight_learns_also_after_an_evaluation():
    model, tokens, rng = make_model(**RATES), make_tokens(), generator()
    for mode in (True, False, True):
        out = model.train(mode)(tokens, rng=rng)
    out.logits.square().sum().backward()
    for layer in model.layers:
        weight = layer.lstm.weight_hh_l0
        assert weight.is_leaf
        # Half of the connections are absent in this window, and none of the others may be.
        assert 0.3 < (weight.grad != 0).double().mean() < 0.7
    before = [layer.lstm.weight_hh_l0.detach().clone() for layer in model.layers]
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(not torch.equal(b, layer.lstm.weight_hh_l0) for b, layer in zip(before, model.layers, strict=True))


def test_training_passes_differ_and_evaluation_passes_do_not():
    model, tokens, rng = make_model(weight_dropout=0.5), make_tokens(), generator()
    first, second = model(tokens, rng=rng).logits, model(tokens, rng=rng).logits
    assert not torch.equal(first, second)
    model.eval()
    evaluated = model(tokens, rng=rng).logits
    assert torch.equal(evaluated, model(tokens, rng=rng).logits)
    model.train()(tokens, rng=rng)
    assert torch.equal(evaluated, model.eval()(tokens, rng=rng).logits)


def test_passes_leave_parameters_and_their_names_as_they_were():
    model, rng = make_model(**RATES), generator()
    before = {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    names = list(model.state_dict())
    for mode in (True, False, True, True, False):
        model.train(mode)(make_tokens(), rng=rng)
        assert list(model.state_dict()) == names
        assert list(dict(model.named_parameters())) == list(before)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, nn.Parameter)
            assert (id(parameter), parameter.data_ptr()) == before[name][:2]
            assert torch.equal(parameter, before[name][2])


def test_weight_dropout_is_on_the_recurrent_matrix_alone():
    # Before the first step of a zero state nothing is recurrent; of a carried state already the first step is.
    model, rng = make_model(num_layers=1, weight_dropout=0.5), generator()
    tokens, state = make_tokens(), make_state(model)
    from_zero, evaluated = model(tokens, rng=rng).raw, model.eval()(tokens).raw
    close(from_zero[:, 0], evaluated[:, 0])
    assert (from_zero[:, 1:] - evaluated[:, 1:]).abs().amin() > 0
    carried, evaluated = model.train()(tokens, state, rng).raw, model.eval()(tokens, state).raw
    assert (carried[:, 0] - evaluated[:, 0]).abs().amin() > 0


def test_weight_dropout_is_the_same_for_all_streams_and_steps(masks):
    model = make_model(weight_dropout=RATES["weight_dropout"])
    tokens = make_tokens(1, T).expand(B, T)
    logits = model(tokens, rng=generator()).logits
    close(logits[0], logits[1])
    close(logits[0], logits[2])
    assert len(masks.drawn) == len(model.layers)


def test_weight_dropout_is_drawn_for_each_element(masks):
    make_model(hidden_size=40, weight_dropout=RATES["weight_dropout"])(make_tokens(), rng=generator())
    for mask in masks.of("weight_dropout")[:2]:
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        for dim in (0, 1):
            assert 0 < (mask > 0).double().mean(dim).min() <= (mask > 0).double().mean(dim).max() < 1


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_no_warning_reaches_the_user(dtype):
    model = make_model(dtype=dtype, **RATES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (True, False, True):
            out = model.train(mode)(make_tokens(), rng=generator())
        out.logits.sum().backward()


def test_nn_lstm_drops_nothing_by_itself():
    for layer in make_model(**RATES).layers:
        assert layer.lstm.dropout == 0
        assert layer.lstm.num_layers == 1


# --- Masks -------------------------------------------------------------------------------------------


def within(share, expected, p, num, sigmas=5.0):
    """Whether a share of `num` draws is as near to `expected` as chance allows; a rate is exact to 2**-16."""
    return abs(share - expected) < sigmas * math.sqrt(p * (1 - p) / num) + 2**-16


@pytest.mark.parametrize("p", [0.001, 0.05, 0.2, 0.5, 0.65, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_a_mask_holds_zeros_and_scaled_survivors_in_the_right_share(p, dtype):
    mask = dropout_mask((403, 1001), p, torch.empty(0, dtype=dtype), generator())
    assert mask.dtype == dtype
    assert mask.shape == (403, 1001)
    scaled = torch.tensor(1.0, dtype=dtype).div(1 - p).item()
    assert set(mask.unique().tolist()) == {0.0, scaled}
    keep = (mask > 0).double().flatten()
    # One lane for each quarter of a 64-bit draw: a generator that leaves out the top bit spoils the last.
    for lane in range(4):
        assert within(keep[lane::4].mean().item(), 1 - p, p, keep[lane::4].numel())
    assert within(keep.mean().item(), 1 - p, p, keep.numel())
    close(mask.double().mean(), keep.mean() / (1 - p), 1e-6)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_positions_of_a_mask_are_independent(p):
    rng = generator(1)
    rows, columns = 400, 1003
    first, second = (dropout_mask((rows, columns), p, torch.empty(0).double(), rng) > 0 for _ in range(2))
    keep = first.flatten().double()
    z = (keep - (1 - p)) / math.sqrt(p * (1 - p))
    for lag in (1, 2, 3, 4, 5, 8, 16, columns):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(keep.numel() - lag)
    z_second = (second.flatten().double() - (1 - p)) / math.sqrt(p * (1 - p))
    assert abs((z * z_second).mean()) < 5 / math.sqrt(keep.numel())

    # The sixteen patterns of the four that come from one draw; 60 is beyond the 1e-6 tail of chi-square(15).
    fours = keep[: keep.numel() // 4 * 4].view(-1, 4).long()
    observed = torch.bincount(fours @ torch.tensor([1, 2, 4, 8]), minlength=16).double()
    num_kept = torch.tensor([bin(pattern).count("1") for pattern in range(16)])
    expected = len(fours) * (1 - p) ** num_kept * p ** (4 - num_kept)
    assert ((observed - expected) ** 2 / expected).sum() < 60


@pytest.mark.parametrize("shape", [(0, 3), (1,), (2,), (3,), (4,), (5, 1), (3, 1, 7), (2, 3, 5)])
def test_a_mask_may_have_any_shape(shape):
    mask = dropout_mask(shape, 0.5, torch.empty(0), generator())
    assert mask.shape == shape
    assert set(mask.unique().tolist()) <= {0.0, 2.0}


def test_extreme_rates_keep_their_meaning():
    like = torch.empty(0)
    assert dropout_mask((100_000,), 1e-9, like, generator()).count_nonzero() == 100_000
    for p in (1 - 2**-16, 1 - 2**-17, 1 - 2**-18, 1 - 1e-9):
        assert dropout_mask((100_000,), p, like, generator()).count_nonzero() < 15


def test_the_same_generator_state_gives_the_same_mask():
    like = torch.empty(0)

    def draw(rng):
        return dropout_mask((50, 7), 0.5, like, rng)

    rng = generator(7)
    first = draw(rng)
    state = rng.get_state()
    second = draw(rng)
    assert torch.equal(first, draw(generator(7)))
    assert not torch.equal(first, draw(generator(8)))
    assert not torch.equal(first, second)
    rng.set_state(state)
    assert torch.equal(second, draw(rng))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        assert torch.equal(first, draw(None))


# --- Where the other dropouts act --------------------------------------------------------------------


def test_locked_dropout_is_constant_over_time_and_differs_by_stream():
    ones_BTE = torch.ones(5, T, 64, dtype=torch.double)
    x = locked_dropout(ones_BTE, 0.5, True, generator())
    assert set(x.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(x, x[:, :1].expand_as(x))
    for b in range(1, 5):
        assert not torch.equal(x[0], x[b])
    assert torch.equal(locked_dropout(ones_BTE, 0.5, False), ones_BTE)
    assert torch.equal(locked_dropout(ones_BTE, 0.0, True), ones_BTE)


@pytest.mark.parametrize("name", ["input_dropout", "output_dropout"])
def test_locked_dropouts_are_drawn_anew_for_each_window(masks, name):
    model, rng = make_model(embedding_size=64, **{name: RATES[name]}), generator()
    for _ in range(2):
        model(make_tokens(), rng=rng)
    first, second = masks.of(name)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_embedding_dropout_drops_a_word_at_all_its_positions():
    weight_VE = torch.rand(V, E, dtype=torch.double) + 1
    tokens = make_tokens(B, 50)
    x = embedding_dropout(tokens, weight_VE, 0.4, True, generator(3))
    scale = x / F.embedding(tokens, weight_VE)
    dropped = set()
    for token in range(V):
        (value,) = {round(v, 9) for v in scale[tokens == token].flatten().tolist()}
        assert value in (0.0, round(1 / 0.6, 9))
        dropped |= {token} if value == 0 else set()
    assert 0 < len(dropped) < V
    assert torch.equal(embedding_dropout(tokens, weight_VE, 0.4, False), F.embedding(tokens, weight_VE))


def test_embedding_dropout_has_the_gradient_of_a_masked_matrix(masks):
    tokens = make_tokens(B, 50)
    weight_VE = torch.rand(V, E, dtype=torch.double, requires_grad=True)
    p = RATES["embedding_dropout"]
    factor = torch.rand(B, 50, E, dtype=torch.double)
    (embedding_dropout(tokens, weight_VE, p, True, generator(5)) * factor).sum().backward()
    (mask_V1,) = masks.of("embedding_dropout")
    assert set(mask_V1.unique().tolist()) == {0.0, 1 / (1 - p)}
    expected = np.zeros((V, E))
    for b in range(B):
        for t in range(50):
            expected[tokens[b, t]] += reference.f64(mask_V1[tokens[b, t]] * factor[b, t])
    close(weight_VE.grad, expected)


@tied_or_not
def test_the_decoder_reads_the_unmasked_embedding(tied):
    model = make_model(tie_weights=tied, embedding_dropout=0.6)
    out = model(make_tokens(), rng=generator())
    decoder_VE = model.model.embed_tokens.weight if tied else model.lm_head.weight
    close(out.logits, reference.f64(out.dropped) @ reference.f64(decoder_VE).T + reference.f64(model.lm_head.bias))


def test_no_hidden_dropout_after_the_last_layer(masks):
    tokens = make_tokens()
    single = make_model(num_layers=1, hidden_dropout=RATES["hidden_dropout"])
    assert torch.equal(single(tokens, rng=generator()).logits, single.eval()(tokens).logits)
    assert masks.drawn == []
    double = make_model(num_layers=2, hidden_dropout=RATES["hidden_dropout"])
    out = double(tokens, rng=generator())
    assert len(masks.drawn) == 1
    assert out.raw.abs().min() > 0
    assert torch.equal(out.raw, out.dropped)


def test_output_dropout_makes_dropped_of_raw(masks):
    out = make_model(**RATES)(make_tokens(), rng=generator())
    (mask_B1E,) = masks.of("output_dropout")
    assert torch.equal(out.dropped, out.raw * mask_B1E)
    assert out.raw.abs().min() > 0
    assert not torch.equal(out.dropped, out.raw)


# --- AR and TAR --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (0.0, 1.0), (2.0, 0.0), (0.5, 3.0)])
def test_ar_is_of_the_dropped_output_and_tar_of_the_raw_one(alpha, beta):
    out = make_model(**RATES)(make_tokens(), rng=generator())
    ar, tar = regularisation(out.raw, out.dropped, alpha, beta)
    close(ar, reference.ar(out.dropped, alpha))
    close(tar, reference.tar(out.raw, beta))


@tied_or_not
def test_ar_and_tar_divide_by_their_own_number_of_elements(tied):
    # Doubling the streams changes neither: a mean, not the sum or the norm of the paper's notation.
    rng = np.random.default_rng(0)
    raw, dropped = (torch.from_numpy(rng.normal(size=(B, T, E if tied else H))) for _ in range(2))
    once = regularisation(raw, dropped, ALPHA, BETA)
    twice = regularisation(raw.repeat(2, 1, 1), dropped.repeat(2, 1, 1), ALPHA, BETA)
    for a, b in zip(once, twice, strict=True):
        close(a, b)


def test_two_steps_are_enough_for_tar():
    raw = torch.tensor([[[1.0, 2.0], [2.0, 5.0]]])
    close(regularisation(raw, raw, ALPHA, BETA)[1], (1 + 9) / 2)


# --- Parameters --------------------------------------------------------------------------------------


@tied_or_not
def test_last_layer_is_as_wide_as_the_embedding_if_and_only_if_tied(tied):
    model = make_model(tie_weights=tied)
    last = E if tied else H
    assert [tuple(layer.lstm.weight_hh_l0.shape) for layer in model.layers] == [(4 * s, s) for s in (H, H, last)]
    assert [tuple(layer.lstm.weight_ih_l0.shape) for layer in model.layers] == [(4 * H, E), (4 * H, H), (4 * last, H)]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    out = model(make_tokens())
    assert out.logits.shape == (B, T, V)
    assert out.raw.shape == out.dropped.shape == (B, T, last)
    for state in (out.state, model.initial_state(B)):
        assert [(tuple(h.shape), tuple(c.shape)) for h, c in state] == [((1, B, s),) * 2 for s in (H, H, last)]


def test_a_single_tied_layer_maps_the_embedding_to_itself():
    (layer,) = make_model(num_layers=1).layers
    assert (layer.lstm.input_size, layer.lstm.hidden_size) == (E, E)


@tied_or_not
def test_parameter_names_are_those_of_checkpoints(tied):
    model = make_model(tie_weights=tied, num_layers=2, **RATES)
    layers = [f"model.layers.{i}.lstm.{name}" for i in range(2) for name in LAYER_PARAMETERS]
    untied = [] if tied else ["lm_head.weight"]
    names = ["model.embed_tokens.weight", *layers, *untied, "lm_head.bias"]
    assert sorted(dict(model.named_parameters())) == sorted(names)
    assert sorted(model.state_dict()) == sorted({*names, "lm_head.weight"})


@tied_or_not
def test_initial_weights_are_uniform_in_the_published_ranges(tied):
    sizes = {"vocab_size": 300, "embedding_size": 30, "hidden_size": 50, "num_layers": 3}
    model = AWDLSTM(**sizes, tie_weights=tied, rng=generator())
    bounds = {"model.embed_tokens.weight": 0.1} | ({} if tied else {"lm_head.weight": 0.1})
    for i, size in enumerate((50, 50, 30 if tied else 50)):
        bounds |= {f"model.layers.{i}.lstm.{name}": size**-0.5 for name in LAYER_PARAMETERS}
    weights = dict(model.named_parameters())
    assert not weights.pop("lm_head.bias").any()
    assert set(weights) == set(bounds)
    for name, bound in bounds.items():
        # The forget gate's quarter too: its bias gets nothing extra.
        quarters = weights[name].detach().chunk(4) if ".lstm." in name else [weights[name].detach()]
        for weight in quarters:
            num = weight.numel()
            assert weight.abs().max() <= bound
            assert weight.min() < -bound * (1 - 10 / num)
            assert weight.max() > bound * (1 - 10 / num) or num < 60
            assert abs(weight.mean()) < 5 * bound / math.sqrt(3 * num)
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=3 / math.sqrt(num))


def test_initial_weights_come_from_the_given_generator():
    sizes = {"vocab_size": V, "embedding_size": E, "hidden_size": H, "num_layers": 2, "tie_weights": False}
    first, again, other = (AWDLSTM(**sizes, rng=generator(seed)) for seed in (3, 3, 4))
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        assert name == "lm_head.bias" or not torch.equal(weight, other.get_parameter(name))


def test_both_biases_learn():
    model = make_model(**RATES)
    model(make_tokens(), rng=generator()).logits.square().sum().backward()
    for layer in model.layers:
        assert layer.lstm.bias_ih_l0.grad.abs().min() > 0
        close(layer.lstm.bias_ih_l0.grad, layer.lstm.bias_hh_l0.grad)


def test_a_tied_matrix_learns_from_both_of_its_places():
    tied, untied = (make_model(hidden_size=E, tie_weights=tie) for tie in (True, False))
    with torch.no_grad():
        for name, parameter in tied.named_parameters():
            untied.get_parameter(name).copy_(parameter)
        untied.lm_head.weight.copy_(tied.lm_head.weight)
    targets = make_tokens(seed=9).flatten()
    for model in (tied, untied):
        F.cross_entropy(model(make_tokens()).logits.flatten(0, 1), targets).backward()
    close(tied.lm_head.weight.grad, untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad)


def test_the_penn_treebank_model_has_24_million_parameters():
    # V = 10,000, E = 400, H = 1150, three layers, tied; a layer has 4 H (I + H + 2) parameters, two biases included.
    embedding = 10_000 * 400
    layers = 4 * 1150 * (400 + 1150 + 2) + 4 * 1150 * (1150 + 1150 + 2) + 4 * 400 * (1150 + 400 + 2)
    assert embedding + layers + 10_000 == 24_221_600
    with torch.device("meta"):
        model = AWDLSTM(vocab_size=10_000, embedding_size=400, hidden_size=1150, num_layers=3)
    assert sum(p.numel() for p in model.parameters()) == 24_221_600


@tied_or_not
def test_a_copy_is_whole_and_independent(tied):
    model, tokens, rng = make_model(tie_weights=tied, **RATES), make_tokens(), generator()
    model(tokens, rng=rng).logits.sum().backward()  # a dropped matrix left behind on the module would forbid the copy
    twin = copy.deepcopy(model)
    expected = model.eval()(tokens).logits
    assert torch.equal(twin.eval()(tokens).logits, expected)
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tied
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(model(tokens).logits, expected)
    assert not torch.equal(twin(tokens).logits, expected)


@tied_or_not
def test_saved_and_loaded_gives_the_same_logits(tied):
    model, tokens = make_model(tie_weights=tied, **RATES), make_tokens()
    model(tokens, rng=generator())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = make_model(tie_weights=tied, seed=99, **RATES)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


def test_conversion_to_another_type_keeps_the_tie():
    model = make_model(**RATES).to(torch.float)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out = model(make_tokens(), rng=generator())
    assert out.logits.dtype == out.state[0][0].dtype == torch.float


@pytest.mark.parametrize(("hip", "expected"), [(None, "cuda"), ("6.4", "pytorch")])
def test_which_lstm_a_device_takes(monkeypatch, hip, expected):
    """On a GPU that is called cuda: cuDNN's where it is NVIDIA's; never the CPU's, which is given raw addresses."""
    taken = []
    monkeypatch.setattr("ulimi.model.cpu.lstm", lambda *args: taken.append("cpu"))
    monkeypatch.setattr("ulimi.model.cuda.lstm", lambda *args: taken.append("cuda"))
    monkeypatch.setattr("ulimi.model.functional_call", lambda *args: taken.append("pytorch"))
    monkeypatch.setattr(torch.version, "hip", hip)
    layer = WeightDropLSTM(E, H, 0.0).train()

    class OnAGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    layer(torch.zeros(B, T, E).as_subclass(OnAGpu))
    layer(torch.zeros(B, T, E))
    assert taken == [expected, "cpu"]
