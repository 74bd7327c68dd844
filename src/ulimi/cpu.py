"""An LSTM layer's training pass on a CPU: few large products, and the gates in one pass each way.

PyTorch's own LSTM makes its products with MKL, which takes a slow way on AMD processors, and many small passes over
each step's gates, backward above all. Here oneDNN makes the products, the recurrent matrix is packed once a window,
and a small C file does the gates. It is compiled when first needed, into the user's cache; where there is no compiler,
or ULIMI_NATIVE is 0, PyTorch's operators do the same.

Shape letters: T time steps, B streams, I inputs, H hidden, G = 4H gates (input, forget, candidate, output). Time first.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ulimi.data import default_cache_dir
from ulimi.files import atomic_path

SOURCE = Path(__file__).with_suffix(".c")
COMPILE = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
FURTHER = (("-march=native", "-fopenmp"), ("-march=native", "-fopenmp-simd"), ("-fopenmp-simd",), ())
"""what not every compiler knows, best first"""
MALLOC_OPTIONS = ((-4, 0), (-1, -1), (-2, 64 * 2**20))
"""M_MMAP_MAX: no block has its own mapping; M_TRIM_THRESHOLD: nothing is given back; M_TOP_PAD: much is asked for"""
ROWS_WORTH_A_THREAD = 8

# Products


def product(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Give a b (+ bias), by the faster library; both may be transposed views.

    Where b is bfloat16, of which a processor that knows it multiplies twice as many at once, a and bias are rounded to
    it, too; sums are float32, are rounded once, and come back as float32.
    """
    half = b_KN.dtype == torch.bfloat16
    plain = _has_onednn(half) and _is_plain(a_MK) and (half or _is_plain(b_KN))
    if plain and not a_MK.is_contiguous():
        a_MK = transpose(a_MK.t())
    if half:
        a_MK, bias_N = a_MK.bfloat16(), None if bias_N is None else bias_N.bfloat16()
    if plain:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), bias_N, "none", [], "")
    else:
        out = torch.mm(a_MK, b_KN) if bias_N is None else torch.addmm(bias_N, a_MK, b_KN)
    return out.float() if half else out


def rounded(x: Tensor, half: bool) -> Tensor:
    """Give a factor as `product` wants it on its right: bfloat16 if `half`."""
    return x.bfloat16() if half else x


def right_factor(b_KN: Tensor, rows: int, half: bool = False) -> Callable[[Tensor], Tensor]:
    """Give the map a -> a b, for many products of `rows` rows with one matrix, which oneDNN packs; see `product`."""
    if not (_has_onednn(half) and _is_plain(b_KN)):
        return functools.partial(product, b_KN=rounded(b_KN, half))
    b_NK = transpose(b_KN) if b_KN.is_contiguous() else b_KN.t()
    del b_KN  # on the way back it is the caller's only copy, and this is where a step needs most memory
    packed = torch.ops.mkldnn._reorder_linear_weight(rounded(b_NK, half), rows)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    if half:
        return lambda a_MK: multiply(a_MK.bfloat16(), packed, None, "none", [], "").float()
    return lambda a_MK: multiply(a_MK, packed, None, "none", [], "")


def transpose(x_MN: Tensor) -> Tensor:
    """Give the contiguous transpose of a matrix: PyTorch's copy takes up to ten times as long."""
    if _is_plain(x_MN) and x_MN.stride(1) == 1:
        return kernels().transpose(x_MN)
    return x_MN.t().contiguous()


def _is_plain(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


@functools.cache
def _has_onednn(half: bool = False) -> bool:
    """Tell whether oneDNN's products are there and right: these operators are PyTorch's own, and may change."""
    a, b = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(-1, 2, 15).view(5, 3)
    a, b = rounded(a, half), rounded(b, half)  # those of bfloat16 only where the processor can
    with torch.autocast("cpu", enabled=False):  # whoever asks first may do so in half precision
        try:
            multiply = torch.ops.mkldnn._linear_pointwise.default
            packed = torch.ops.mkldnn._reorder_linear_weight(b, 2)
            both = multiply(a, b, a.new_ones(5), "none", [], ""), multiply(a, packed, None, "none", [], "") + 1
        except (AttributeError, RuntimeError, TypeError):
            return False
        exact = torch.mm(a.float(), b.float().t()) + 1
        return all(torch.allclose(x.float(), exact, atol=0.03 if half else 1e-6) for x in both)


def has_bfloat16() -> bool:
    """Tell whether this processor multiplies bfloat16 itself (AVX-512 BF16, AMX), and PyTorch has it do so.

    Where not, products of bfloat16 are right, but slower than those of float32.
    """
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in known) and _has_onednn(half=True)


def own_precision() -> bool | None:
    """Tell how our own passes are to multiply here: in bfloat16 (True), in float32 (False), or not at all (None).

    None: autocast to another type, which is for PyTorch's operators to heed.
    """
    if not torch.is_autocast_enabled("cpu"):
        return False
    return True if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next who asks; give whether it can (glibc).

    A training step frees and takes the same hundred large blocks again and again, whose pages the system would clear
    each time. It holds for the whole process: for a command to call, not for a function of a library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(mallopt(option, value) for option, value in MALLOC_OPTIONS)


# Kernels


class Kernels(Protocol):
    """What stands between the products. Matrices are contiguous, but for what is transposed."""

    def forward(
        self, gates_BG: Tensor, recurrent_BG: Tensor, before_BH: Tensor, cell_BH: Tensor, out_BH: Tensor
    ) -> None:
        """Take the input's part in `gates_BG` and the rest; put the gates there, and the step's cell and output."""

    def backward(
        self,
        gates_BG: Tensor,
        before_BH: Tensor,
        cell_BH: Tensor,
        grad_a_BH: Tensor,
        grad_b_BH: Tensor,
        grad_cell_BH: Tensor,
    ) -> None:
        """Take the gradient of the output, in two parts, and of the cell; put those of the gates and the last cell."""

    def transpose(self, x_MN: Tensor) -> Tensor:
        """Give the contiguous transpose of a matrix whose rows are contiguous."""


class TorchKernels:
    """By PyTorch's operators."""

    def forward(
        self, gates_BG: Tensor, recurrent_BG: Tensor, before_BH: Tensor, cell_BH: Tensor, out_BH: Tensor
    ) -> None:
        """See `Kernels`."""
        i, f, g, o = gates_BG.add_(recurrent_BG).chunk(4, dim=1)
        for gate in (i, f, o):
            gate.sigmoid_()
        g.tanh_()
        torch.addcmul(i * g, f, before_BH, out=cell_BH)
        torch.mul(o, cell_BH.tanh(), out=out_BH)

    def backward(
        self,
        gates_BG: Tensor,
        before_BH: Tensor,
        cell_BH: Tensor,
        grad_a_BH: Tensor,
        grad_b_BH: Tensor,
        grad_cell_BH: Tensor,
    ) -> None:
        """See `Kernels`."""
        i, f, g, o = gates_BG.chunk(4, dim=1)
        squashed, grad_out = cell_BH.tanh(), grad_a_BH + grad_b_BH
        grad = torch.addcmul(grad_cell_BH, grad_out * o, 1 - squashed * squashed)
        torch.mul(grad, f, out=grad_cell_BH)
        parts = (
            grad * g * i * (1 - i),
            grad * before_BH * f * (1 - f),
            grad * i * (1 - g * g),
            grad_out * squashed * o * (1 - o),
        )
        torch.cat(parts, dim=1, out=gates_BG)

    def transpose(self, x_MN: Tensor) -> Tensor:
        """See `Kernels`."""
        return x_MN.t().contiguous()


class NativeKernels:
    """By the C file."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._may_split = _has_one_openmp()
        self._forward, self._backward = library.ulimi_lstm_forward, library.ulimi_lstm_backward
        self._transpose = library.ulimi_transpose
        for function, numbers, matrices in ((self._forward, 3, 5), (self._backward, 3, 6), (self._transpose, 4, 2)):
            function.restype = None
            function.argtypes = [ctypes.c_int64] * numbers + [ctypes.c_void_p] * matrices

    def forward(
        self, gates_BG: Tensor, recurrent_BG: Tensor, before_BH: Tensor, cell_BH: Tensor, out_BH: Tensor
    ) -> None:
        """See `Kernels`."""
        self._call(self._forward, before_BH, (gates_BG, recurrent_BG, before_BH, cell_BH, out_BH))

    def backward(
        self,
        gates_BG: Tensor,
        before_BH: Tensor,
        cell_BH: Tensor,
        grad_a_BH: Tensor,
        grad_b_BH: Tensor,
        grad_cell_BH: Tensor,
    ) -> None:
        """See `Kernels`."""
        self._call(self._backward, before_BH, (gates_BG, before_BH, cell_BH, grad_a_BH, grad_b_BH, grad_cell_BH))

    def transpose(self, x_MN: Tensor) -> Tensor:
        """See `Kernels`."""
        out_NM = x_MN.new_empty(x_MN.size(1), x_MN.size(0))
        threads = self._threads(x_MN.size(1))
        self._transpose(*x_MN.shape, x_MN.stride(0), threads, x_MN.data_ptr(), out_NM.data_ptr())
        return out_NM

    def _call(self, function: Any, like_BH: Tensor, matrices: tuple[Tensor, ...]) -> None:
        rows, hidden = like_BH.shape
        function(rows, hidden, self._threads(rows), *[matrix.data_ptr() for matrix in matrices])

    def _threads(self, rows: int) -> int:
        return min(torch.get_num_threads(), max(1, rows // ROWS_WORTH_A_THREAD)) if self._may_split else 1


def _has_one_openmp() -> bool:
    """Tell whether the C file shares PyTorch's threads; of two OpenMP libraries, each one's spin in the other's way."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    return len({found[0] for line in lines if (found := re.search(r"/[^ ]*/lib[gi]?omp[^/]*$", line))}) == 1


@functools.cache
def kernels() -> Kernels:
    """Give the C file's passes where they can be had, else PyTorch's."""
    library = None if os.environ.get("ULIMI_NATIVE") == "0" else _load_library()
    if library is not None:
        native = NativeKernels(library)
        if _agree(native, TorchKernels()):
            return native
    return TorchKernels()


def _load_library() -> ctypes.CDLL | None:
    """Load the compiled C file from the user's cache, where it is put first if need be."""
    if os.name != "posix":
        return None
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
        if shutil.which(compiler[0]) is None:
            return None
        what = repr((SOURCE.read_text(), compiler, COMPILE, FURTHER, _processor()))
        path = default_cache_dir() / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.so"
        if not path.exists():
            with atomic_path(path) as unfinished:
                _compile(compiler, unfinished)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):  # also no home, and quotes in CC left open
        return None


def _compile(compiler: list[str], path: Path) -> None:
    for further in FURTHER:
        command = [*compiler, *COMPILE, *further, "-o", str(path), str(SOURCE), "-lm"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        if done.returncode == 0:
            return
    done.check_returncode()


def _processor() -> str:
    """Name what `-march=native` compiles for: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(kinds)}))


def _agree(one: Kernels, other: Kernels) -> bool:
    """Compare two implementations on numbers small and large."""
    rng = torch.Generator().manual_seed(0)
    results = []
    draws = [torch.randn(18, 4 * 35 if k < 2 else 35, generator=rng) * 4 for k in range(5)]
    for which in (one, other):
        gates_BG, recurrent_BG, before_BH, grad_BH, grad_cell_BH = [x.clone() for x in draws]
        cell_BH, out_BH = torch.empty_like(before_BH), torch.empty_like(before_BH)
        which.forward(gates_BG, recurrent_BG, before_BH, cell_BH, out_BH)
        after_BG = gates_BG.clone()
        which.backward(gates_BG, before_BH, cell_BH, grad_BH, before_BH, grad_cell_BH)
        transposed = which.transpose(gates_BG[:, 35:70]).t()
        results.append(torch.cat([after_BG, cell_BH, out_BH, gates_BG, grad_cell_BH, transposed], dim=1))
    return torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


# The layer


def lstm(
    x_BTI: Tensor,
    state: tuple[Tensor, Tensor] | None,
    weight_ih_GI: Tensor,
    weight_hh_GH: Tensor,
    bias_ih_G: Tensor,
    bias_hh_G: Tensor,
    mask_GH: Tensor | None = None,
    half: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Do what a batch-first `nn.LSTM` of one layer does, in float32 on a CPU; gradients reach all that it reads.

    Args:
        x_BTI: inputs, (B, T, I).
        state: (h, c), each (1, B, H), or None for zeros.
        weight_ih_GI: as the other weights, in the form that `nn.LSTM` gives them.
        weight_hh_GH: the recurrent matrix, undropped.
        bias_ih_G: (4H,).
        bias_hh_G: (4H,).
        mask_GH: DropConnect on `weight_hh_GH`: zeros, and one other number. It gets no gradient.
        half: round what is multiplied to bfloat16, see `product`.

    Returns:
        (B, T, H), the memory of which has time first; and the last state.
    """
    if state is None:
        h_BH = c_BH = x_BTI.new_zeros(x_BTI.size(0), weight_hh_GH.size(1))
    else:
        h_BH, c_BH = state[0][0], state[1][0]
    out_TBH, h_BH, c_BH = _LSTM.apply(  # type: ignore[no-untyped-call]
        x_BTI.transpose(0, 1), h_BH, c_BH, weight_ih_GI, weight_hh_GH, bias_ih_G + bias_hh_G, mask_GH, half
    )
    return out_TBH.transpose(0, 1), (h_BH[None], c_BH[None])


def _recur(
    x_TBI: Tensor,
    hidden_SBH: Tensor,
    cell_SBH: Tensor,
    weight_ih_GI: Tensor,
    times_weight_hh: Callable[[Tensor], Tensor],
    bias_G: Tensor,
    half: bool,
) -> Tensor:
    """Fill the outputs and cells of all steps behind those before the first; give the gates (T, B, G)."""
    gates_TBG = product(x_TBI.flatten(0, 1), rounded(weight_ih_GI, half).t(), bias_G).view(*x_TBI.shape[:2], -1)
    forward = kernels().forward
    hidden, cell = hidden_SBH.unbind(), cell_SBH.unbind()
    for t, gates_BG in enumerate(gates_TBG.unbind()):
        forward(gates_BG, times_weight_hh(hidden[t]), cell[t], cell[t + 1], hidden[t + 1])
    return gates_TBG


def drop(weight_GH: Tensor, kept_GH: Tensor | None, scale: Tensor | None) -> Tensor:
    """Give the recurrent matrix with its mask, kept and scaled, or as it is."""
    return weight_GH if kept_GH is None or scale is None else (weight_GH * as_bytes(kept_GH)).mul_(scale)


def as_bytes(kept: Tensor) -> Tensor:
    """Give a bool mask as ones and zeros: PyTorch multiplies by these twice as fast."""
    return kept.view(torch.uint8)


def make_room(x_TBI: Tensor, h_BH: Tensor, c_BH: Tensor) -> tuple[Tensor, Tensor]:
    """Make the outputs and cells of all steps, (S, B, H) where S = T + 1, with those before the first filled in."""
    hidden_SBH, cell_SBH = (x_TBI.new_empty(len(x_TBI) + 1, *s.shape) for s in (h_BH, c_BH))
    hidden_SBH[0], cell_SBH[0] = h_BH, c_BH
    return hidden_SBH, cell_SBH


def incoming_gradients(
    cell_SBH: Tensor, grad_TBH: Tensor | None, grad_h_BH: Tensor | None, grad_c_BH: Tensor | None
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """Give a layer's gradients as the kernels take them: of each step's output, of the last state's h and c.

    What did not come is zeros; that of c is nobody else's, since it is changed in place.
    """
    zeros_BH = torch.zeros_like(cell_SBH[0])
    grads = [zeros_BH] * (len(cell_SBH) - 1) if grad_TBH is None else grad_TBH.contiguous().unbind()
    grad_h_BH = zeros_BH if grad_h_BH is None else grad_h_BH.contiguous()
    grad_c_BH = (zeros_BH if grad_c_BH is None else grad_c_BH).clone(memory_format=torch.contiguous_format)
    return grads, grad_h_BH, grad_c_BH


def weight_gradients(
    grad_TBG: Tensor,
    x_NI: Tensor | None,
    h_NH: Tensor | None,
    kept_GH: Tensor | None,
    scale: Tensor | None,
    half: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Give the gradients of `weight_ih` and `weight_hh`, from the gates' and what each was multiplied by, if it is."""
    grad_NG = grad_TBG.flatten(0, 1)
    size = grad_NG.size(1) // 4
    factors = [None if y is None else rounded(y, half) for y in (x_NI, h_NH)]
    grads = [None if y is None else grad_NG.new_empty(4 * size, y.size(1)) for y in (x_NI, h_NH)]
    # A gate at a time: its gradient has to be transposed, and all of them are large.
    for gate in range(4):
        rows = slice(gate * size, (gate + 1) * size)
        grad_HN = transpose(grad_NG[:, rows])
        for grad, factor in zip(grads, factors, strict=True):
            if grad is not None and factor is not None:
                grad[rows] = product(grad_HN, factor)
        if grads[1] is not None and kept_GH is not None and scale is not None:
            grads[1][rows].mul_(as_bytes(kept_GH[rows])).mul_(scale)
    return grads[0], grads[1]


class _LSTM(torch.autograd.Function):
    """Memory: the gates of all steps, which become their own gradients, outputs, cells, and a byte for each mask's."""

    @staticmethod
    def forward(
        ctx: Any, x_TBI: Tensor, h_BH: Tensor, c_BH: Tensor, weight_ih_GI: Tensor, weight_hh_GH: Tensor, bias_G: Tensor,
        mask_GH: Tensor | None, half: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x_TBI = x_TBI.contiguous()
        hidden_SBH, cell_SBH = make_room(x_TBI, h_BH, c_BH)
        kept_GH, ctx.scale = (None, None) if mask_GH is None else (mask_GH != 0, mask_GH.amax())
        times_weight_hh = right_factor(drop(weight_hh_GH, kept_GH, ctx.scale).t(), len(h_BH), half)
        ctx.gates_TBG = _recur(x_TBI, hidden_SBH, cell_SBH, weight_ih_GI, times_weight_hh, bias_G, half)
        ctx.half = half
        ctx.save_for_backward(x_TBI, hidden_SBH, cell_SBH, weight_ih_GI, weight_hh_GH, bias_G, kept_GH)
        ctx.set_materialize_grads(False)
        # The last state is a copy: it stays for the next window, and would keep all of this one.
        return hidden_SBH[1:], hidden_SBH[-1].clone(), cell_SBH[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TBH: Tensor | None, grad_h_BH: Tensor | None, grad_c_BH: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_TBI, hidden_SBH, cell_SBH, weight_ih_GI, weight_hh_GH, bias_G, kept_GH = ctx.saved_tensors
        gates_TBG, ctx.gates_TBG, half = ctx.gates_TBG, None, ctx.half
        if gates_TBG is None:  # a second pass backward; the first has written over them
            times_weight_hh = right_factor(drop(weight_hh_GH, kept_GH, ctx.scale).t(), x_TBI.size(1), half)
            gates_TBG = _recur(x_TBI, hidden_SBH.clone(), cell_SBH.clone(), weight_ih_GI, times_weight_hh, bias_G, half)
        grads, grad_h_BH, grad_c_BH = incoming_gradients(cell_SBH, grad_TBH, grad_h_BH, grad_c_BH)
        times_weight_hh = right_factor(drop(weight_hh_GH, kept_GH, ctx.scale), x_TBI.size(1), half)
        backward = kernels().backward
        gates, cell = gates_TBG.unbind(), cell_SBH.unbind()
        for t in reversed(range(len(x_TBI))):
            backward(gates[t], cell[t], cell[t + 1], grads[t], grad_h_BH, grad_c_BH)
            grad_h_BH = times_weight_hh(gates[t])
        del times_weight_hh

        grad_NG = gates_TBG.flatten(0, 1)
        needs_x, _, _, needs_ih, needs_hh, needs_bias, *_ = ctx.needs_input_grad
        x_NI = x_TBI.flatten(0, 1) if needs_ih else None
        before_NH = hidden_SBH[:-1].flatten(0, 1) if needs_hh else None
        grad_ih_GI, grad_hh_GH = weight_gradients(gates_TBG, x_NI, before_NH, kept_GH, ctx.scale, half)
        return (
            product(grad_NG, rounded(weight_ih_GI, half)).view_as(x_TBI) if needs_x else None,
            grad_h_BH,
            grad_c_BH,
            grad_ih_GI,
            grad_hh_GH,
            grad_NG.sum(dim=0) if needs_bias else None,
            None,
            None,
        )
