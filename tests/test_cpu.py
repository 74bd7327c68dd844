"""The CPU's LSTM layer and loss beside `nn.LSTM` and `F.cross_entropy`; with a compiler, without, with a broken one."""

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from ulimi import cpu, loss
from ulimi.loss import training_loss
from ulimi.model import AWDLSTM, WeightDropLSTM

SHAPES = [(3, 7, 4, 6), (1, 2, 3, 5), (2, 5, 17, 33), (20, 3, 40, 64), (5, 1, 2, 1), (9, 6, 31, 100)]
"""B, T, I, H: more and fewer rows than tiles and vectors have"""


@pytest.fixture(params=["native", "operators"])
def way(request, monkeypatch):
    """Both implementations of what stands between the products."""
    monkeypatch.setenv("ULIMI_NATIVE", "1" if request.param == "native" else "0")
    cpu.kernels.cache_clear()
    expected = cpu.NativeKernels if request.param == "native" else cpu.TorchKernels
    if not isinstance(cpu.kernels(), expected):
        pytest.skip("no compiler here")
    yield request.param
    cpu.kernels.cache_clear()


@pytest.fixture(params=["oneDNN", "mm"])
def library(request, monkeypatch):
    """Both ways of making products."""
    if request.param == "mm":
        monkeypatch.setattr(cpu, "_has_onednn", lambda half=False: False)
    elif not cpu._has_onednn():
        pytest.skip("no oneDNN here")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed, scale=1.0):
    return torch.randn(shape, generator=rng(seed)) * scale


def make(shape, *, carried=True, dropped=True):
    """A layer with its mask, an input, a state and gradients of all that comes out."""
    B, T, I, H = shape  # noqa: E741 - its name in the papers
    layer = nn.LSTM(I, H, batch_first=True)
    for k, p in enumerate(layer.parameters()):
        p.data = draw(*p.shape, seed=k, scale=p.shape[-1] ** -0.5)
    mask = (draw(4 * H, H, seed=20) > 0).float() * 2 if dropped else None
    inputs = [draw(B, T, I, seed=21)] + ([draw(1, B, H, seed=22), draw(1, B, H, seed=23)] if carried else [])
    grads = [draw(B, T, H, seed=24), draw(1, B, H, seed=25), draw(1, B, H, seed=26)]
    return layer, mask, [x.requires_grad_() for x in inputs], grads


def plain(layer, mask, x, *state):
    dropped = layer.weight_hh_l0 if mask is None else layer.weight_hh_l0 * mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, (h, c) = functional_call(layer, {"weight_hh_l0": dropped}, (x, state or None))
    return out, h, c


def ours(layer, mask, x, *state):
    out, (h, c) = cpu.lstm(x, state or None, *layer.all_weights[0], mask)
    return out, h, c


def reference(layer, mask, inputs, grads, used):
    """Outputs and gradients by `nn.LSTM` in float64."""
    layer64 = nn.LSTM(layer.input_size, layer.hidden_size, batch_first=True).double()
    layer64.load_state_dict(layer.state_dict())
    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    mask64 = None if mask is None else mask.double()
    return run(plain, layer64, mask64, inputs64, [g.double() for g in grads], used)


def run(forward, layer, mask, inputs, grads, used):
    outputs = forward(layer, mask, *inputs)
    wanted = [*inputs, *layer.parameters()]
    given = torch.autograd.grad([outputs[k] for k in used], wanted, [grads[k] for k in used])
    return [x.detach() for x in (*outputs, *given)]


def assert_equal_to_rounding(got, expected, tolerance=2e-6):
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=tolerance * max(1.0, y.abs().max().item()))


# The layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("carried", [False, True], ids=["zero_state", "carried_state"])
@pytest.mark.parametrize("dropped", [False, True], ids=["whole", "dropped"])
def test_a_layer_and_its_gradients_are_those_of_nn_lstm(way, library, shape, carried, dropped):
    layer, mask, inputs, grads = make(shape, carried=carried, dropped=dropped)
    expected = reference(layer, mask, inputs, grads, (0, 1, 2))
    assert_equal_to_rounding(run(ours, layer, mask, inputs, grads, (0, 1, 2)), expected)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_may_come_from_some_outputs_alone(way, used):
    layer, mask, inputs, grads = make(SHAPES[0])
    expected = reference(layer, mask, inputs, grads, used)
    assert_equal_to_rounding(run(ours, layer, mask, inputs, grads, used), expected)


def test_inputs_states_and_gradients_need_not_be_contiguous(way, library):
    layer, mask, inputs, grads = make(SHAPES[3])
    expected = reference(layer, mask, inputs, grads, (0, 1, 2))

    def scattered(x):
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x.detach()
        return wide[..., ::2].requires_grad_(x.requires_grad)

    inputs, grads = [scattered(x) for x in inputs], [scattered(g) for g in grads]
    assert not inputs[0].is_contiguous()
    assert_equal_to_rounding(run(ours, layer, mask, inputs, grads, (0, 1, 2)), expected)


def test_a_second_pass_backward_gives_the_same_gradients(way):
    layer, mask, inputs, grads = make(SHAPES[2])
    outputs = ours(layer, mask, *inputs)
    wanted = [*inputs, *layer.parameters()]
    first = torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
    second = torch.autograd.grad(outputs, wanted, grads)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


def test_only_what_asks_for_a_gradient_gets_one(way):
    layer, mask, (x, *state), _ = make(SHAPES[0])
    layer.weight_ih_l0.requires_grad_(False)
    layer.bias_hh_l0.requires_grad_(False)
    out, _, _ = ours(layer, mask, x.detach(), *[s.detach() for s in state])
    out.sum().backward()
    assert layer.weight_ih_l0.grad is None
    assert layer.bias_hh_l0.grad is None
    assert layer.weight_hh_l0.grad.abs().sum() > 0
    with torch.no_grad():
        assert not ours(layer, mask, x, *state)[0].requires_grad


def test_gates_far_from_zero_saturate(way):
    layer, mask, inputs, grads = make(SHAPES[2])
    with torch.no_grad():
        layer.weight_ih_l0.mul_(60)  # pre-activations of several hundreds
    got = run(ours, layer, mask, inputs, grads, (0, 1, 2))
    assert all(x.isfinite().all() for x in got)
    assert_equal_to_rounding(got[:3], reference(layer, mask, inputs, grads, (0, 1, 2))[:3], 1e-4)


def test_small_numbers_keep_their_digits(way):
    """A tanh made of two exponentials loses them: relative error, not absolute."""
    kernels = cpu.kernels()
    gates = draw(4, 4 * 32, seed=1, scale=1e-3)
    cell, out = torch.empty(4, 32), torch.empty(4, 32)
    candidate = gates[:, 64:96].double().tanh()
    kernels.forward(gates, torch.zeros(4, 128), torch.zeros(4, 32), cell, out)
    torch.testing.assert_close(gates[:, 64:96].double(), candidate, rtol=5e-7, atol=0)


def test_the_model_takes_this_way_in_float32_and_bfloat16_and_pytorchs_otherwise(monkeypatch):
    calls = []
    lstm = cpu.lstm
    monkeypatch.setattr("ulimi.cpu.lstm", lambda *args: calls.append(args) or lstm(*args))
    layer = WeightDropLSTM(4, 6, 0.5)
    x = draw(2, 3, 4, seed=0)
    layer.train()(x)
    assert len(calls) == 1
    WeightDropLSTM(4, 6, 0.0).train()(x)
    assert len(calls) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = layer(x)
    assert out.dtype == torch.float32
    assert [args[-1] for args in calls] == [False, False, True]
    del calls[-1]
    with torch.no_grad():
        layer.eval()(x)
    layer.double().train()(x.double())
    assert len(calls) == 2
    # Whoever takes gradients in evaluation mode, as dynamic evaluation does, goes it too, and without a mask.
    layer.float().eval()(x)
    assert len(calls) == 3
    assert calls[-1][-2] is None


def rounded_steps(layer, mask, x, *state):
    """A layer step by step in float64, with whatever is multiplied and its product rounded to bfloat16."""

    def half(z):
        return z.to(torch.bfloat16).double()

    weight_ih, weight_hh, bias_ih, bias_hh = [weight.double() for weight in layer.all_weights[0]]
    hidden, cell = state[0][0].double(), state[1][0].double()
    outs = []
    for x_BI in x.unbind(1):
        gates = half(half(x_BI) @ half(weight_ih).t() + half(bias_ih + bias_hh))
        i, f, g, o = (gates + half(half(hidden) @ half(weight_hh * mask).t())).chunk(4, dim=1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outs.append(hidden)
    return torch.stack(outs, dim=1), hidden[None], cell[None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_bfloat16_what_is_multiplied_is_rounded_and_nothing_else(way, library, shape):
    def ours_rounded(layer, mask, x, *state):
        out, (h, c) = cpu.lstm(x, state, *layer.all_weights[0], mask, half=True)
        return out, h, c

    layer, mask, inputs, grads = make(shape)
    got, exact = (
        run(ours_rounded, layer, mask, inputs, grads, (0, 1, 2)),
        reference(layer, mask, inputs, grads, (0, 1, 2)),
    )
    for x, y in zip(got, exact, strict=True):
        assert x.dtype == torch.float32
        assert 0 < (x - y).norm() < 0.02 * y.norm()
    with torch.no_grad():
        for x, y, z in zip(got, exact, rounded_steps(layer, mask, *inputs), strict=False):
            # Not to the last bit: sums in another order tip a product over to the next bfloat16 here and there.
            assert (x - z).norm() < 0.5 * (x - y).norm()


def test_a_processor_is_asked_whether_it_knows_bfloat16(monkeypatch):
    monkeypatch.setattr(cpu, "_has_onednn", lambda half=False: half)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not cpu.has_bfloat16()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cpu.has_bfloat16()
    monkeypatch.setattr(cpu, "_has_onednn", lambda half=False: not half)
    assert not cpu.has_bfloat16()
    monkeypatch.setattr(cpu, "_has_onednn", lambda half=False: half)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not cpu.has_bfloat16()


def test_the_next_window_does_not_keep_this_one(way):
    layer, mask, inputs, _ = make((2, 50, 3, 8))
    _, h, c = ours(layer, mask, *inputs)
    assert h.untyped_storage().nbytes() == c.untyped_storage().nbytes() == 4 * h.numel()


def test_two_threads_give_the_same(way):
    layer, mask, inputs, grads = make((40, 3, 40, 64))
    alone = run(ours, layer, mask, inputs, grads, (0, 1, 2))
    torch.set_num_threads(2)
    try:
        both = run(ours, layer, mask, inputs, grads, (0, 1, 2))
    finally:
        torch.set_num_threads(1)
    for one, other in zip(alone, both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# Products


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (70, 33, 50), (2, 100, 7), (0, 3, 2)], ids=str)
def test_products_of_whatever_layout(way, library, shape):
    m, k, n = shape
    a, b, bias = draw(m, k, seed=0), draw(k, n, seed=1), draw(n, seed=2)
    for left in (a, a.t().contiguous().t(), draw(m, 2 * k, seed=3)[:, :k], draw(m, 2 * k, seed=3)[:, ::2]):
        for right in (b, b.t().contiguous().t(), draw(k, 2 * n, seed=4)[:, :n]):
            exact = left.double() @ right.double()
            torch.testing.assert_close(cpu.product(left, right).double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(cpu.right_factor(right, m)(left).double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(cpu.product(left, right, bias).double(), exact + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (15, 33), (70, 40)], ids=str)
def test_transposes(way, shape):
    x = draw(shape[0], shape[1] + 5, seed=0)
    assert torch.equal(cpu.transpose(x[:, 2:-3]), x[:, 2:-3].t())
    assert torch.equal(cpu.transpose(x.t()), x)
    assert cpu.transpose(x[:, 2:-3]).is_contiguous()


def test_operators_that_have_changed_are_not_used(monkeypatch):
    class Changed:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Changed())
    cpu._has_onednn.cache_clear()
    try:
        assert not cpu._has_onednn()
        a, b = draw(3, 4, seed=0), draw(4, 5, seed=1)
        assert torch.equal(cpu.product(a, b), torch.mm(a, b))
    finally:
        cpu._has_onednn.cache_clear()


def test_whoever_asks_first_in_half_precision_gets_the_same_answer():
    cpu._has_onednn.cache_clear()
    found = cpu._has_onednn()
    cpu._has_onednn.cache_clear()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert cpu._has_onednn() == found
    finally:
        cpu._has_onednn.cache_clear()


def test_where_onednn_has_no_bfloat16_pytorchs_product_does(monkeypatch):
    def too_old(x, *args):
        if x.dtype == torch.bfloat16:
            raise RuntimeError("bf16 path needs the cpu support avx512bw")
        return multiply(x, *args)

    too_old.default = too_old
    multiply, reorder = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight

    class Old:
        _linear_pointwise = too_old
        _reorder_linear_weight = staticmethod(
            lambda b, rows: too_old(b) if b.dtype == torch.bfloat16 else reorder(b, rows)
        )

    monkeypatch.setattr(torch.ops, "mkldnn", Old)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    cpu._has_onednn.cache_clear()
    try:
        assert not cpu.has_bfloat16()
        a, b, bias = draw(3, 40, seed=0), draw(40, 5, seed=1), draw(5, seed=2)
        exact = a @ b
        for left, right in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
            half = cpu.product(left, right.bfloat16(), bias)
            assert half.dtype == torch.float32
            assert 0 < (half - exact - bias).abs().max() < 0.3
            assert (cpu.right_factor(right, 3, half=True)(left) - exact).abs().max() < 0.3
    finally:
        cpu._has_onednn.cache_clear()


# The loss


@pytest.mark.parametrize("is_taught", [False, True])
def test_the_loss_in_bfloat16_and_its_gradients(library, is_taught, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 200)  # several pieces
    given = [draw(23, 16, seed=1), draw(50, 16, seed=2, scale=0.3), draw(50, seed=3)]
    targets = torch.randint(50, (23,), generator=rng(4))
    taught = (
        (torch.randint(50, (23, 3), generator=rng(5)), torch.rand(23, 3, generator=rng(6)) / 4) if is_taught else None
    )
    results = []
    for enabled in (False, True):
        inputs = [x.clone().requires_grad_() for x in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            nats = training_loss(*inputs, targets, "cross_entropy", 1.5, taught)
        results.append([nats.detach(), *torch.autograd.grad(nats * 3, inputs)])
    for exact, half in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert 0 < (half - exact).norm() < 0.02 * exact.norm()


def test_other_types_of_autocast_are_pytorchs_affair():
    hidden, weight, bias = draw(5, 8, seed=1), draw(9, 8, seed=2), draw(9, seed=3)
    targets = torch.arange(5)
    assert cpu.own_precision() is False
    with torch.autocast("cpu", torch.float16):
        assert cpu.own_precision() is None
        nats = training_loss(hidden, weight, bias, targets, "cross_entropy", 1.5)
        expected = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    assert torch.equal(nats, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu.own_precision() is True
        nats = training_loss(hidden.bfloat16(), weight, bias, targets, "cross_entropy", 1.5)
    assert nats.item() == pytest.approx(expected.item(), rel=0.02)


def decoder(num_rows, embedding, vocab, dtype=torch.float32):
    hidden, weight, bias = draw(num_rows, embedding, seed=0), draw(vocab, embedding, seed=1), draw(vocab, seed=2)
    targets = torch.randint(vocab, (num_rows,), generator=rng(3))
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], targets


@pytest.mark.parametrize(("num_rows", "at_once"), [(1, 2**21), (50, 2**21), (50, 11 * 7), (50, 1)])
def test_the_loss_is_the_cross_entropy_however_many_rows_at_once(way, library, monkeypatch, num_rows, at_once):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    inputs, targets = decoder(num_rows, 6, 11)
    nats = training_loss(*inputs, targets, "cross_entropy", 1.5)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = F.cross_entropy(F.linear(*exact_inputs), targets)
    assert_equal_to_rounding([nats.detach()], [exact.detach()])
    got, expected = torch.autograd.grad(3 * nats, inputs), torch.autograd.grad(3 * exact, exact_inputs)
    assert_equal_to_rounding(got, expected)


def test_gradients_of_the_loss_are_its_finite_differences(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 8)
    inputs, targets = decoder(5, 3, 4, torch.double)
    assert torch.autograd.gradcheck(lambda *x: training_loss(*x, targets, "cross_entropy", 1.5), inputs)


def test_the_loss_of_what_needs_no_gradient():
    inputs, targets = decoder(5, 3, 4)
    hidden, weight, bias = inputs
    training_loss(hidden.detach(), weight, bias, targets, "cross_entropy", 1.5).backward()
    assert hidden.grad is None
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not training_loss(*inputs, targets, "cross_entropy", 1.5).requires_grad


def test_the_loss_of_very_sure_wrong_answers():
    hidden, targets = torch.eye(2) * 500, torch.tensor([1, 0])
    nats = training_loss(hidden, torch.eye(2), torch.zeros(2), targets, "cross_entropy", 1.5)
    assert nats.item() == 500


def test_whole_models_learn_the_same_either_way(way, monkeypatch):
    """Some steps with all dropouts, by this way and by PyTorch's LSTM: the same weights but for rounding."""
    weights = []
    for own in (True, False):
        if not own:
            monkeypatch.setattr(
                "ulimi.cpu.lstm", lambda x, s, ih, hh, bi, bh, mask, half: by_nn_lstm(x, s, ih, hh, bi, bh, mask)
            )
        model = AWDLSTM(
            vocab_size=13, embedding_size=8, hidden_size=12, num_layers=3, embedding_dropout=0.1, input_dropout=0.2,
            hidden_dropout=0.2, output_dropout=0.2, weight_dropout=0.5, rng=rng(1),
        ).train()  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        draws, state = rng(2), None
        for step in range(4):
            ids = torch.randint(13, (5, 9), generator=rng(10 + step))
            out = model.features(ids[:, :-1], state, draws)
            head = model.lm_head
            nats = training_loss(
                out.dropped.flatten(0, 1), head.weight, head.bias, ids[:, 1:].flatten(), "cross_entropy", 1.5
            )
            optimizer.zero_grad()
            nats.backward()
            optimizer.step()
            state = [(h.detach(), c.detach()) for h, c in out.state]
        weights.append([p.detach() for p in model.parameters()])
    for mine, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def by_nn_lstm(x, state, weight_ih, weight_hh, bias_ih, bias_hh, mask):
    weights = (weight_ih, weight_hh * mask, bias_ih, bias_hh)
    layer = nn.LSTM(weight_ih.size(1), weight_hh.size(1), batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return functional_call(layer, dict(zip(layer._all_weights[0], weights, strict=True)), (x, state))


# The compiler

REPORT = """
import torch
from ulimi import cpu
x = torch.ones(2, 3, 4, requires_grad=True)
weights = [torch.full(s, 0.1) for s in ((20, 4), (20, 5), (20,), (20,))]
out, _ = cpu.lstm(x, None, *weights)
out.sum().backward()
print(type(cpu.kernels()).__name__, round(out.sum().item(), 4), round(x.grad.sum().item(), 4))
"""


def start(cache, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ULIMI_CACHE": str(cache), **environment}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.Popen(
        [sys.executable, "-c", REPORT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def report(process):
    out, err = process.communicate(timeout=120)
    assert err == ""
    assert process.returncode == 0
    return out.split()


@pytest.fixture(scope="module")
def has_compiler():
    cpu.kernels.cache_clear()
    if not isinstance(cpu.kernels(), cpu.NativeKernels):
        pytest.skip("no compiler here")


def fake_compiler(folder, script):
    path = folder / "bin" / "cc"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path.parent) + os.pathsep + os.environ["PATH"]


@pytest.fixture(scope="module")
def right_numbers(tmp_path_factory):
    kind, *numbers = report(start(tmp_path_factory.mktemp("none"), ULIMI_NATIVE="0"))
    assert kind == "TorchKernels"
    return numbers


def test_it_compiles_once_into_the_cache(tmp_path, has_compiler, right_numbers):
    assert report(start(tmp_path)) == ["NativeKernels", *right_numbers]
    (made,) = tmp_path.iterdir()
    before = made.stat().st_mtime_ns
    assert report(start(tmp_path)) == ["NativeKernels", *right_numbers]
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [before]


def test_two_processes_may_compile_at_once(tmp_path, has_compiler, right_numbers):
    both = [start(tmp_path), start(tmp_path)]
    assert [report(process) for process in both] == [["NativeKernels", *right_numbers]] * 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "script",
    [
        "exit 1",
        "echo 'internal compiler error' >&2; kill -SEGV $$",
        'while [ "$1" != -o ]; do shift; done; echo no library > "$2"',
        "exit 0",  # and no file
    ],
)
def test_a_broken_compiler_is_silently_done_without(tmp_path, right_numbers, script):
    path = fake_compiler(tmp_path, script)
    assert report(start(tmp_path / "cache", PATH=path, CC=None)) == ["TorchKernels", *right_numbers]


def test_a_compiler_that_miscompiles_is_found_out(tmp_path, has_compiler, right_numbers):
    wrong = tmp_path / "wrong.c"
    wrong.write_text(cpu.SOURCE.read_text().replace("forget * before[j] +", "forget * before[j] -"))
    path = fake_compiler(tmp_path, f'PATH="{os.environ["PATH"]}"; exec cc $(echo "$@" | sed "s|[^ ]*cpu.c|{wrong}|")')
    assert report(start(tmp_path / "cache", PATH=path, CC=None)) == ["TorchKernels", *right_numbers]
    assert list((tmp_path / "cache").iterdir())  # it did compile


def test_no_compiler_and_no_cache_are_silently_done_without(tmp_path, right_numbers):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert report(start(tmp_path / "cache", PATH=str(empty), CC=None)) == ["TorchKernels", *right_numbers]
    (tmp_path / "file").write_text("where the cache's folder should be")
    assert report(start(tmp_path / "file")) == ["TorchKernels", *right_numbers]
    assert report(start(tmp_path / "cache", CC="'cc")) == ["TorchKernels", *right_numbers]


def test_the_source_is_in_the_package():
    assert Path(cpu.SOURCE).name == "cpu.c"
    assert cpu.SOURCE.is_file()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_for_the_next_who_asks():
    script = """
import resource, sys, torch
from ulimi.cpu import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(40):
    torch.ones(2**24)  # 64 MB: more than glibc would ever keep by itself
    counts.append(pages())
print(counts[-1] - counts[-11])
"""
    faults = {}
    for way in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", script, way], capture_output=True, text=True, check=True)
        faults[way] = int(done.stdout)
    assert faults["given back"] > 1000
    assert faults["kept"] < 100
