"""The reference is checked by hand-worked numbers, and by PyTorch in double where it has the same thing."""

import math

import numpy as np
import pytest

import reference

torch = pytest.importorskip("torch")
F = torch.nn.functional

V, E, H, B, T = 11, 4, 6, 3, 7


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(reference.f64(a), reference.f64(b), rtol=tolerance, atol=tolerance)


def make_params(rng, tied=True, last=E):
    sizes = [(E, H), (H, H), (H, last)]
    layers = [
        tuple(rng.normal(size=shape) * 0.5 for shape in [(4 * h, i), (4 * h, h), (4 * h,), (4 * h,)]) for i, h in sizes
    ]
    params = {"embedding": rng.normal(size=(V, E)), "layers": layers, "decoder_bias": rng.normal(size=V)}
    if not tied:
        params["decoder_weight"] = rng.normal(size=(V, last))
    return params


def make_mask(rng, *shape):
    return rng.integers(0, 2, size=shape) / 0.5


def make_masks(rng, last=E):
    return {
        "embedding": make_mask(rng, V, 1),
        "input": make_mask(rng, B, 1, E),
        "hidden": [make_mask(rng, B, 1, H), make_mask(rng, B, 1, H)],
        "output": make_mask(rng, B, 1, last),
        "weight": [make_mask(rng, 4 * h, h) for h in (H, H, last)],
    }


def torch_lstm(weights):
    w_ih, w_hh, _, _ = weights
    lstm = torch.nn.LSTM(w_ih.shape[1], w_hh.shape[1], batch_first=True, dtype=torch.double)
    with torch.no_grad():
        for parameter, weight in zip(lstm.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(weight))
    return lstm


def test_lstm_step_by_hand():
    # One unit, weights zero: the biases alone decide. i = σ(1), f = σ(2), g = tanh(3), o = σ(4).
    zero = np.zeros((4, 1))
    h, c = reference.lstm_step([[9.0]], [[9.0]], [[0.5]], zero, zero, [1.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 4.0])

    def sigma(x):
        return 1 / (1 + math.exp(-x))

    cell = sigma(2) * 0.5 + sigma(1) * math.tanh(3)
    close(c, [[cell]])
    close(h, [[sigma(4) * math.tanh(cell)]])


@pytest.mark.parametrize("masked", [False, True])
def test_lstm_layer_is_torch(rng, masked):
    weights = make_params(rng)["layers"][0]
    x, h0, c0 = rng.normal(size=(B, T, E)), rng.normal(size=(B, H)), rng.normal(size=(B, H))
    mask = make_mask(rng, 4 * H, H) if masked else None
    out, (h, c) = reference.lstm_layer(x, h0, c0, weights, mask)
    w_ih, w_hh, b_ih, b_hh = weights
    lstm = torch_lstm((w_ih, w_hh * mask if masked else w_hh, b_ih, b_hh))
    out_torch, (h_torch, c_torch) = lstm(torch.from_numpy(x), (torch.from_numpy(h0)[None], torch.from_numpy(c0)[None]))
    close(out, out_torch)
    close(h, h_torch[0])
    close(c, c_torch[0])
    assert np.array_equal(out[:, -1], h)


def test_numerical_gradient_reaches_the_dropped_recurrent_weight(rng):
    weights = make_params(rng)["layers"][2]
    w_ih, w_hh, b_ih, b_hh = weights
    x, zeros, mask = rng.normal(size=(B, 3, H)), np.zeros((B, E)), make_mask(rng, 4 * E, E)

    def total(w):
        return float((reference.lstm_layer(x, zeros, zeros, (w_ih, w, b_ih, b_hh), mask)[0] ** 2).sum())

    lstm = torch_lstm(weights)
    leaf = lstm.weight_hh_l0
    out, _ = torch.func.functional_call(lstm, {"weight_hh_l0": leaf * torch.from_numpy(mask)}, (torch.from_numpy(x),))
    out.pow(2).sum().backward()
    close(reference.numerical_gradient(total, w_hh), leaf.grad, 1e-7)


@pytest.mark.parametrize(("tied", "last"), [(True, E), (False, E), (False, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_awd_lstm_forward_is_a_chain_of_torch_layers(rng, tied, last, masked):
    params = make_params(rng, tied, last)
    masks = make_masks(rng, last) if masked else {}
    tokens = rng.integers(0, V, size=(B, T))
    out = reference.awd_lstm_forward(tokens, params, masks)

    ones = {"embedding": 1.0, "input": 1.0, "hidden": [1.0, 1.0], "output": 1.0, "weight": [1.0, 1.0, 1.0]}
    m = masks or ones
    embedding = params["embedding"]
    x = (embedding * m["embedding"])[tokens] * m["input"]
    for k, (w_ih, w_hh, b_ih, b_hh) in enumerate(params["layers"]):
        y, (h, c) = torch_lstm((w_ih, w_hh * m["weight"][k], b_ih, b_hh))(torch.from_numpy(x))
        close(out.state[k][0], h[0])
        close(out.state[k][1], c[0])
        x = reference.f64(y) * (m["hidden"][k] if k < 2 else 1.0)
    close(out.raw, x)
    close(out.dropped, x * m["output"])
    decoder = embedding if tied else params["decoder_weight"]
    close(out.logits, (x * m["output"]) @ decoder.T + params["decoder_bias"])
    assert out.logits.shape == (B, T, V)


def test_one_pass_is_two_passes_is_single_steps(rng):
    params, masks = make_params(rng), make_masks(rng)
    tokens = rng.integers(0, V, size=(B, T))
    whole = reference.awd_lstm_forward(tokens, params, masks)
    for cuts in ([3], list(range(1, T))):
        state, logits = None, []
        for part in np.split(tokens, cuts, axis=1):
            out = reference.awd_lstm_forward(part, params, masks, state)
            state = out.state
            logits.append(out.logits)
        close(np.concatenate(logits, axis=1), whole.logits)


def test_a_dropped_word_vanishes_as_input_but_not_as_output(rng):
    params = make_params(rng)
    mask = np.ones((V, 1))
    mask[2] = 0.0
    other = {**params, "embedding": params["embedding"].copy()}
    other["embedding"][2] += 1.0
    one = reference.awd_lstm_forward([[2, 5, 2]], params, {"embedding": mask})
    two = reference.awd_lstm_forward([[2, 5, 2]], other, {"embedding": mask})
    close(one.raw, two.raw)
    assert not np.allclose(one.logits[..., 2], two.logits[..., 2])


def test_losses(rng):
    logits, targets = rng.normal(size=(B, T, V)) * 30, rng.integers(0, V, size=(B, T))
    expected = F.cross_entropy(torch.from_numpy(logits).flatten(0, 1), torch.from_numpy(targets).flatten())
    close(reference.cross_entropy_nats(logits, targets), expected)
    close(reference.cross_entropy_nats(np.zeros((B, T, V)), targets), math.log(V))
    assert reference.ar([[[1.0, 2.0], [3.0, 4.0]]], 2.0) == 2.0 * 30 / 4
    assert reference.tar([[[1.0, 2.0], [3.0, 5.0]]], 1.0) == (4 + 9) / 2
    # The step from one stream's end to the next stream's start is no step.
    assert reference.tar([[[0.0], [0.0]], [[9.0], [9.0]]], 1.0) == 0.0


def test_sgd_and_clipping_are_torch(rng):
    params = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=3)}
    leaves = {name: torch.tensor(theta, requires_grad=True) for name, theta in params.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=0.3, weight_decay=0.1)
    for scale in (10.0, 0.001, 1.0):
        grads = {name: rng.normal(size=theta.shape) * scale for name, theta in params.items()}
        params = reference.sgd_step(params, grads, 0.3, 0.1, max_grad_norm=0.25)
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(leaves.values(), 0.25)
        optimizer.step()
        for name, leaf in leaves.items():
            close(params[name], leaf)
    clipped, norm = reference.clip_by_global_norm({"a": [3.0], "b": [4.0]}, 1.0, eps=0.0)
    assert norm == 5.0
    close([clipped["a"][0], clipped["b"][0]], [0.6, 0.8])


def test_adamw_is_torch(rng):
    params, state = {"w": rng.normal(size=(3, 2))}, None
    leaf = torch.tensor(params["w"], requires_grad=True)
    optimizer = torch.optim.AdamW([leaf], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for _ in range(5):
        grads = {"w": rng.normal(size=(3, 2))}
        params, state = reference.adamw_step(params, grads, state, 0.02, (0.8, 0.95), 1e-6, 0.1)
        leaf.grad = torch.tensor(grads["w"])
        optimizer.step()
        close(params["w"], leaf)


def test_averaging_trigger_by_hand():
    assert not reference.averaging_trigger([], 9.0, 0)
    assert reference.averaging_trigger([1.0], 9.0, 0)
    assert not reference.averaging_trigger([1.0] * 5, 9.0, 5)  # the sixth evaluation is too early
    assert reference.averaging_trigger([1.0] * 6, 9.0, 5)  # the seventh is not
    assert not reference.averaging_trigger([1.0] * 6, 1.0, 5)  # equal is not worse
    assert not reference.averaging_trigger([3.0, 1.0, 1.0, 1.0], 2.0, 3)  # the best is masked
    losses = [5, 4, 3, 2, 2.01, 1, 1.01, 0.99, 1.03, 1.01, 1, 0.99]
    fired = [k + 1 for k in range(len(losses)) if reference.averaging_trigger(losses[:k], losses[k], 3)]
    assert fired[0] == 10


def test_nt_asgd_is_torch_sgd_then_asgd(rng):
    noise = rng.normal(size=(40, 2))
    run = reference.nt_asgd(
        [4.0, -3.0],
        lambda w, k: w + noise[k],
        lambda w: float(w @ w),
        lr=0.25,
        interval=4,
        n=2,
        num_steps=40,
        weight_decay=0.01,
    )
    trigger = run.trigger_step
    assert trigger is not None
    assert trigger % 4 == 0
    assert 8 < trigger < 38
    assert len(run.history) == trigger // 4
    assert run.history == [float(w @ w) for w in run.iterates[4 : trigger + 1 : 4]]

    # The rate is exact in the single precision that torch's ASGD keeps it in.
    leaf = torch.tensor([4.0, -3.0], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.SGD([leaf], lr=0.25, weight_decay=0.01)
    for k in range(40):
        if k == trigger:
            optimizer = torch.optim.ASGD([leaf], lr=0.25, t0=0, lambd=0.0, weight_decay=0.01)
        leaf.grad = leaf.detach() + torch.tensor(noise[k])
        optimizer.step()
        close(run.iterates[k + 1], leaf)
    # torch's average leaves out the first iterate after the switch, ours has it; torch divides in single precision.
    close(reference.running_mean_of_iterates(run.iterates[trigger + 2 :]), optimizer.state[leaf]["ax"], 1e-6)
    close(run.average, np.mean(run.iterates[trigger + 1 :], axis=0))


def test_nt_asgd_may_average_from_the_trigger_or_never_start():
    def run(valid, **options):
        settings = {"lr": 1.0, "interval": 1, "n": 1, "num_steps": 5, **options}
        return reference.nt_asgd([0.0], lambda w, k: [-1.0], valid, **settings)

    assert [float(w[0]) for w in run(lambda w: 0.0).iterates] == [0, 1, 2, 3, 4, 5]
    never = run(lambda w: -w[0])
    assert never.trigger_step is None
    assert never.average[0] == 5.0
    assert run(lambda w: w[0]).trigger_step == 3
    assert run(lambda w: w[0]).average[0] == (4 + 5) / 2
    assert run(lambda w: w[0], average_includes_trigger=True).average[0] == (3 + 4 + 5) / 3
    assert run(lambda w: w[0], num_steps=3).average[0] == 3.0


def test_window_lengths_by_hand():
    # bptt 70: as drawn, halved, truncated, at least 5, at most base + 20 in both halves.
    uniforms = [0.0, 0.95, 0.9499, 0.0, 0.99, 0.0, 0.99]
    normals = [0.0, 0.0, 0.39, -20.0, -20.0, 9.0, 9.0]
    assert reference.window_lengths(uniforms, normals, 70) == [70, 35, 71, 5, 5, 90, 55]
    assert reference.window_length(0.99, 0.0, 35) == 17
    assert reference.window_length(0.99, 0.1, 35) == 18


def test_neural_cache_by_hand():
    # Uniform vocabulary of 4; θ h·h_i is 0 for orthogonal states and ln 3 for equal ones.
    logits = np.zeros((4, 4))
    hiddens = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    targets = [2, 3, 2, 2]
    theta = math.log(3.0)
    # t=0 empty; t=1 holds word 2 alone; t=2 holds 2 (weight 3) and 3 (weight 1); t=3 holds 2 (3), 3 (1), 2 (3).
    mixed = [0.25, 0.75 * 0.25, 0.75 * 0.25 + 0.25 * 3 / 4, 0.75 * 0.25 + 0.25 * 6 / 7]
    close(reference.neural_cache(logits, hiddens, targets, theta, 0.25, 10), np.log(mixed))
    mixed[3] = 0.75 * 0.25 + 0.25 * 3 / 4  # a window of two has forgotten the first pair
    close(reference.neural_cache(logits, hiddens, targets, theta, 0.25, 2), np.log(mixed))
    assert reference.neural_cache(logits, hiddens, targets, theta, 1.0, 2)[1] == -math.inf


def test_neural_cache_without_a_cache_is_the_model(rng):
    logits, hiddens, targets = rng.normal(size=(T, V)), rng.normal(size=(T, H)), rng.integers(0, V, size=T)
    plain = F.log_softmax(torch.from_numpy(logits), dim=-1)[range(T), targets]
    close(reference.neural_cache(logits, hiddens, targets, 0.7, 0.0, 5), plain)
    close(reference.neural_cache(logits, hiddens, targets, 0.7, 0.3, 0), plain)


def test_neural_cache_is_a_distribution_and_does_not_look_ahead(rng):
    logits, hiddens, targets = rng.normal(size=(T, V)), rng.normal(size=(T, H)), rng.integers(0, V, size=T)
    total = 0.0
    for word in range(V):
        changed = targets.copy()
        changed[-1] = word
        scores = reference.neural_cache(logits, hiddens, changed, 0.7, 0.3, 5)
        close(scores[:-1], reference.neural_cache(logits, hiddens, targets, 0.7, 0.3, 5)[:-1])
        total += math.exp(scores[-1])
    assert total == pytest.approx(1.0, abs=1e-12)


def test_dynamic_evaluation_by_hand():
    # Loss (a - x)² / 2, b unused: the gradient is a - x, at a = 1 on the data 0, 2, 1 that is 1, -1, 0.
    def loss(params, x):
        return (params["a"] - x).square().sum() / 2

    params = {"a": np.array([1.0]), "b": np.array([[5.0]])}
    ms = reference.mean_squared_gradients(loss, params, [0.0, 2.0, 1.0])
    close(ms["a"], [2 / 3])
    close(ms["b"], [[0.0]])
    close(reference.rms_norm(ms)["a"], [2.0])

    rms = math.sqrt(2 / 3)
    losses, after = reference.dynamic_evaluation(loss, params, ms, [3.0, 3.0], lr=0.1, decay=0.2, eps=0.01)
    one = 1.0 + 0.1 * 2.0 / (rms + 0.01)
    two = one - 0.1 * (one - 3.0) / (rms + 0.01) + 0.4 * (1.0 - one)
    close(losses, [2.0, (one - 3.0) ** 2 / 2])  # the first is scored by the trained weights
    close(after["a"], [two])
    close(after["b"], [[5.0]])
    # A decay that would overshoot pulls just back to the start.
    _, after = reference.dynamic_evaluation(loss, params, ms, [3.0, 3.0], lr=0.1, decay=9.0, eps=0.01)
    close(after["a"], [1.0 - 0.1 * (one - 3.0) / (rms + 0.01)])
    assert params["a"][0] == 1.0


def test_rms_norm_averages_over_elements_or_over_tensors():
    ms = {"matrix": np.full((3, 3), 4.0), "bias": np.array([16.0])}
    close(reference.rms_norm(ms)["bias"], [4 / 2.2])
    close(reference.rms_norm(ms, "tensors")["bias"], [4 / 3])
    with pytest.raises(ValueError, match="allowed"):
        reference.rms_norm(ms, "median")


def test_without_learning_dynamic_evaluation_is_evaluation(rng):
    def loss(params, batch):
        inputs, targets = batch
        return F.cross_entropy(torch.from_numpy(inputs) @ params["w"], torch.from_numpy(targets))

    params = {"w": rng.normal(size=(H, V))}
    batches = [(rng.normal(size=(T, H)), rng.integers(0, V, size=T)) for _ in range(3)]
    ms = reference.mean_squared_gradients(loss, params, batches)
    losses, after = reference.dynamic_evaluation(loss, params, ms, batches, lr=0.0, decay=0.5, eps=1e-5)
    close(losses, [reference.cross_entropy_nats(x @ params["w"], y) for x, y in batches])
    close(after["w"], params["w"])
    again, _ = reference.dynamic_evaluation(loss, params, ms, [batches[0]] * 3, lr=1e-3, decay=0.0, eps=1e-5)
    assert again[0] > again[1] > again[2]
    _, grads = reference.value_and_gradient(loss, params, batches[0])
    inputs, targets = batches[0]
    close(
        grads["w"],
        reference.numerical_gradient(lambda w: reference.cross_entropy_nats(inputs @ w, targets), params["w"]),
        1e-8,
    )


def test_scores_by_hand():
    counts = reference.text_counts(["ngiyabonga kakhulu", "é", ""])
    assert counts == (3, 3, 19 + 2 + 1, 19 + 3 + 1)
    nats = 22 * math.log(2.0)
    close(reference.bits_per_char(nats, counts.num_chars), 1.0)
    close(reference.bits_per_byte(nats, counts.num_bytes), 22 / 23)
    close(reference.token_perplexity(22 * math.log(7.0), 22), 7.0)
    close(reference.word_perplexity(6 * math.log(9.0), counts.num_words, counts.num_lines), 9.0)
