"""One step of a model, whatever runs it: ids and a state in, numbers and a state out.

`Engine` is what the light floor knows of a network: generating and scoring need nothing else. `OnnxEngine` runs
model.onnx on ONNX Runtime; `TorchEngine` runs the weights on PyTorch. Each is imported where an engine is made, not
before. `ulimi.ngram.NgramEngine` is a model without a network, `MixtureEngine` several models that share a tokenizer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ulimi.distribution import log_probs, smoothed_nats
from ulimi.errors import UlimiError, install
from ulimi.files import atomic_path
from ulimi.ngram import NgramEngine, read_ngrams
from ulimi.run import MEMBERS, MIXTURE, NGRAM, NGRAMS, ONNX, WEIGHTS, Run

if TYPE_CHECKING:
    import torch

    from ulimi.model import AWDLSTM

EVALUATION_WINDOW = 256
"""tokens read at once when scoring; scores do not depend on it"""

ENGINES = ("auto", "onnx", "torch")

FIXED_SCALES = "fixed_scales"
"""in a graph's metadata: the last two units of each layer always say 1 and -1, see `ulimi.export.fix_scales`"""
CONSTANT_SCALES = "constant_scales"
"""in a graph's metadata: its scales are constants without such units, see `ulimi.mogrifier_graph`"""
ENDS_H = (1.0, -1.0)
"""what those units say"""
ENDS_C = (20.0, -20.0)
"""their cells, which they keep: their tanh is what they say, to the last bit of float32"""

EngineState = Any
"""opaque: belongs to the engine that made it"""


class Engine(Protocol):
    """A network in evaluation mode. State is a value: no call changes the state that it was given."""

    @property
    def vocab_size(self) -> int:
        """V: ids are 0 to V - 1."""
        ...

    @property
    def alpha(self) -> float:
        """What turns its logits into probabilities, see `ulimi.distribution.log_probs`: 1 is softmax."""
        ...

    @property
    def batch_invariant(self) -> bool:
        """Whether `nll` may pad a row (but for the last bits); if not, score one row at a time.

        The logits of `step` are a row's own in every engine, whatever rows stand beside it.
        """
        ...

    def initial_state(self, batch_size: int) -> EngineState:
        """Zeros for `batch_size` streams."""

    def step(self, ids_B: NDArray[np.int64], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read one id a stream, (B,); give the logits of the next, (B, V)."""

    def prime(self, ids: Sequence[int], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read several ids of one stream at once; give the logits after the last, (1, V)."""

    def nll(
        self, inputs_BT: NDArray[np.int64], targets_BT: NDArray[np.int64], state: EngineState
    ) -> tuple[NDArray[np.float32], EngineState]:
        """Read a window; give the nats of each target, (B, T); those of a sparse model are smoothed by `EPSILON`."""

    def logits(self, inputs_BT: NDArray[np.int64], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read a window; give the logits after each id, (B, T, V)."""

    def repeat_state(self, state: EngineState, n: int) -> EngineState:
        """Turn the state of one stream into that of `n` equal ones."""

    def select_state(self, state: EngineState, rows: Sequence[int]) -> EngineState:
        """Keep these rows of a batch, in this order."""

    def join_states(self, states: Sequence[EngineState]) -> EngineState:
        """Put the states of several streams or batches together as one batch, in this order."""

    def output(self, state: EngineState) -> NDArray[np.float32]:
        """Give the last layer's output that led to this state, (B, E).

        Raises:
            UlimiError: the model has no such thing.
        """


class TorchEngine:
    """`Engine` on PyTorch.

    Args:
        model: the network.
        alpha: of its output, see `Run.alpha`.
    """

    batch_invariant = True

    def __init__(self, model: "AWDLSTM", alpha: float = 1.0) -> None:
        self.alpha = alpha
        self._model = model.eval()
        self._device = model.lm_head.bias.device
        self.vocab_size = model.vocab_size

    def initial_state(self, batch_size: int) -> EngineState:
        """Zeros for `batch_size` streams."""
        return self._model.initial_state(batch_size)

    def step(self, ids_B: NDArray[np.int64], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read one id a stream, (B,); give the logits of the next, (B, V)."""
        import torch

        with torch.inference_mode(), _without_onednn():
            out = self._model(torch.from_numpy(ids_B).to(self._device)[:, None], state)
        return out.logits[:, -1].float().cpu().numpy(), out.state

    def prime(self, ids: Sequence[int], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read several ids of one stream at once; give the logits after the last, (1, V)."""
        import torch

        if not ids:
            raise ValueError("no ids to read")
        with torch.inference_mode():
            for start in range(0, len(ids), EVALUATION_WINDOW):
                window = torch.tensor([ids[start : start + EVALUATION_WINDOW]], device=self._device)
                out = self._model(window, state)
                state = out.state
        return out.logits[:, -1].float().cpu().numpy(), state

    def nll(
        self, inputs_BT: NDArray[np.int64], targets_BT: NDArray[np.int64], state: EngineState
    ) -> tuple[NDArray[np.float32], EngineState]:
        """Read a window; give the nats of each target, (B, T)."""
        import torch

        if self.alpha != 1:
            logits_BTV, state = self.logits(inputs_BT, state)
            return _sparse_nats(logits_BTV, targets_BT, self.alpha), state
        with torch.inference_mode():
            out = self._model(torch.tensor(inputs_BT, device=self._device), state)
            targets = torch.tensor(targets_BT, device=self._device).flatten()
            nll = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets, reduction="none")
        return nll.view(targets_BT.shape).float().cpu().numpy(), out.state

    def logits(self, inputs_BT: NDArray[np.int64], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read a window; give the logits after each id, (B, T, V)."""
        import torch

        with torch.inference_mode():
            out = self._model(torch.tensor(inputs_BT, device=self._device), state)
        return out.logits.float().cpu().numpy(), out.state

    def repeat_state(self, state: EngineState, n: int) -> EngineState:
        """Turn the state of one stream into that of `n` equal ones."""
        return [(h.repeat(1, n, 1), c.repeat(1, n, 1)) for h, c in state]

    def select_state(self, state: EngineState, rows: Sequence[int]) -> EngineState:
        """Keep these rows of a batch, in this order."""
        return [(h[:, list(rows)].contiguous(), c[:, list(rows)].contiguous()) for h, c in state]

    def join_states(self, states: Sequence[EngineState]) -> EngineState:
        """Put the states of several streams or batches together as one batch, in this order."""
        import torch

        return [
            tuple(torch.cat(parts, dim=1) for parts in zip(*layer, strict=True)) for layer in zip(*states, strict=True)
        ]

    def output(self, state: EngineState) -> NDArray[np.float32]:
        """Give the last layer's output that led to this state, (B, E)."""
        h, _ = state[-1]
        output_BE: NDArray[np.float32] = h[0].float().cpu().numpy()
        return output_BE


class OnnxEngine:
    """`Engine` on ONNX Runtime, on the CPU; the graph is that of `ulimi.export`.

    int8 finds one scale for all activations that a call gives it. A graph whose activations have constant ends (see
    `ulimi.export.fix_scales`), or whose scales are written in it (`ulimi.mogrifier_graph`), has the same scale in every
    call: a row's numbers are its own to the last bit, in whatever batch and window. In other graphs, of float weights
    or older, rows run one by one, so that none depends on those beside it.

    Args:
        path: a model.onnx.
        alpha: of its output, see `Run.alpha`.

    Raises:
        UlimiError: the file cannot be read as one.
    """

    def __init__(self, path: Path, alpha: float = 1.0) -> None:
        import onnxruntime

        self.alpha = alpha
        options = onnxruntime.SessionOptions()
        # A step is too short to share: with a second thread it takes a fifth longer (docs/performance.md).
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no base of their own
            raise UlimiError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.weights_sha256 = metadata.get("weights_sha256", "")
        # Without constant scales, the pads behind a row's own tokens have their part in the scale of its window, too.
        self._has_ends = FIXED_SCALES in metadata
        self.batch_invariant = self._has_ends or CONSTANT_SCALES in metadata
        logits, *_ = self._session.get_outputs()
        self.vocab_size = int(logits.shape[-1])
        _, *states = self._session.get_inputs()
        self.state_names = [state.name for state in states]
        self._sizes = [int(state.shape[-1]) for state in states]

    def initial_state(self, batch_size: int) -> EngineState:
        """Zeros for `batch_size` streams, apart from the units that keep the scales."""
        state = [np.zeros((1, batch_size, size), dtype=np.float32) for size in self._sizes]
        if self._has_ends:
            for h, c in zip(state[::2], state[1::2], strict=True):
                h[..., -2:], c[..., -2:] = ENDS_H, ENDS_C
        return state

    def step(self, ids_B: NDArray[np.int64], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read one id a stream, (B,); give the logits of the next, (B, V): each row's own, whatever the batch."""
        logits_B1V, state = self.logits(ids_B[:, None], state)
        return logits_B1V[:, 0], state

    def prime(self, ids: Sequence[int], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read several ids of one stream at once; give the logits after the last, (1, V)."""
        if not ids:
            raise ValueError("no ids to read")
        for start in range(0, len(ids), EVALUATION_WINDOW):
            window_1T = np.array([ids[start : start + EVALUATION_WINDOW]], dtype=np.int64)
            logits_1TV, state = self.logits(window_1T, state)
        return logits_1TV[:, -1], state

    def nll(
        self, inputs_BT: NDArray[np.int64], targets_BT: NDArray[np.int64], state: EngineState
    ) -> tuple[NDArray[np.float32], EngineState]:
        """Read a window; give the nats of each target, (B, T): a row's own."""
        if not self.batch_invariant and len(inputs_BT) > 1:
            return self._row_by_row(self.nll, (inputs_BT, targets_BT), state)
        # All logits of a large window together would be far larger than a cache; the pieces change nothing.
        nll_BT = np.empty(targets_BT.shape, dtype=np.float32)
        num_steps = max(1, EVALUATION_WINDOW // len(inputs_BT)) if self.batch_invariant else targets_BT.shape[1]
        for start in range(0, targets_BT.shape[1], num_steps):
            piece = slice(start, start + num_steps)
            logits_BTV, state = self.logits(inputs_BT[:, piece], state)
            nll_BT[:, piece] = _nats(logits_BTV, targets_BT[:, piece], self.alpha)
        return nll_BT, state

    def logits(self, inputs_BT: NDArray[np.int64], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read a window; give the logits after each id, (B, T, V): a row's own."""
        if not self.batch_invariant and len(inputs_BT) > 1:
            return self._row_by_row(self.logits, (inputs_BT,), state)
        logits_TBV, *new_state = self._session.run(
            None, {"ids": inputs_BT.T, **dict(zip(self.state_names, state, strict=True))}
        )
        return logits_TBV.swapaxes(0, 1), new_state

    def repeat_state(self, state: EngineState, n: int) -> EngineState:
        """Turn the state of one stream into that of `n` equal ones."""
        return [array.repeat(n, axis=1) for array in state]

    def select_state(self, state: EngineState, rows: Sequence[int]) -> EngineState:
        """Keep these rows of a batch, in this order."""
        return [np.ascontiguousarray(array[:, list(rows)]) for array in state]

    def join_states(self, states: Sequence[EngineState]) -> EngineState:
        """Put the states of several streams or batches together as one batch, in this order."""
        return [np.concatenate(arrays, axis=1) for arrays in zip(*states, strict=True)]

    def output(self, state: EngineState) -> NDArray[np.float32]:
        """Give the last layer's output that led to this state, (B, E)."""
        output_BE: NDArray[np.float32] = state[-2][0]
        return output_BE[:, :-2] if self._has_ends else output_BE

    def _row_by_row(
        self, call: Callable[..., tuple[NDArray[np.float32], EngineState]], windows: Sequence[NDArray[np.int64]],
        state: EngineState,
    ) -> tuple[NDArray[np.float32], EngineState]:  # fmt: skip
        rows = [
            call(*(window_BT[row : row + 1] for window_BT in windows), self.select_state(state, [row]))
            for row in range(len(windows[0]))
        ]
        return np.concatenate([result for result, _ in rows]), self.join_states([new_state for _, new_state in rows])


class MixtureEngine:
    """`Engine` of several models whose probabilities are averaged (linear interpolation, Jelinek & Mercer 1980).

        p(w | context) = sum over members m of weight_m p_m(w | context)

    Its logits are log-probabilities, its state is its members' states.

    Args:
        members: of one tokenizer, none of them sparse.
        weights: of each, above 0; their sum is 1.

    Raises:
        UlimiError: a member is sparse, or the members have vocabularies of different sizes.
    """

    alpha = 1.0

    def __init__(self, members: Sequence[Engine], weights: Sequence[float]) -> None:
        sizes = [member.vocab_size for member in members]
        if len(set(sizes)) > 1:
            raise UlimiError(
                f"models of one mixture need one vocabulary; these have {', '.join(map(str, sizes))} tokens"
            )
        if any(member.alpha != 1 for member in members):
            raise UlimiError(
                "a sparse model (entmax) cannot be mixed: its nats are smoothed, those of the others are not"
            )
        self.members = members
        self.vocab_size = sizes[0]
        self.batch_invariant = all(member.batch_invariant for member in members)
        self._weights_M = np.array(weights)

    def initial_state(self, batch_size: int) -> EngineState:
        """Each member's, for `batch_size` streams."""
        return [member.initial_state(batch_size) for member in self.members]

    def step(self, ids_B: NDArray[np.int64], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read one id a stream, (B,); give the log-probabilities of the next, (B, V)."""
        return self._mix([member.step(ids_B, own) for member, own in self._with(state)])

    def prime(self, ids: Sequence[int], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read several ids of one stream at once; give the log-probabilities after the last, (1, V)."""
        return self._mix([member.prime(ids, own) for member, own in self._with(state)])

    def nll(
        self, inputs_BT: NDArray[np.int64], targets_BT: NDArray[np.int64], state: EngineState
    ) -> tuple[NDArray[np.float32], EngineState]:
        """Read a window; give the nats of each target, (B, T)."""
        results = [member.nll(inputs_BT, targets_BT, own) for member, own in self._with(state)]
        nats = mixed_nats(np.stack([nats_BT for nats_BT, _ in results]), self._weights_M)
        return nats.astype(np.float32), [new for _, new in results]

    def logits(self, inputs_BT: NDArray[np.int64], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read a window; give the log-probabilities after each id, (B, T, V)."""
        return self._mix([member.logits(inputs_BT, own) for member, own in self._with(state)])

    def repeat_state(self, state: EngineState, n: int) -> EngineState:
        """Turn the state of one stream into that of `n` equal ones."""
        return [member.repeat_state(own, n) for member, own in self._with(state)]

    def select_state(self, state: EngineState, rows: Sequence[int]) -> EngineState:
        """Keep these rows of a batch, in this order."""
        return [member.select_state(own, rows) for member, own in self._with(state)]

    def join_states(self, states: Sequence[EngineState]) -> EngineState:
        """Put the states of several streams or batches together as one batch, in this order."""
        return [member.join_states(own) for member, own in zip(self.members, zip(*states, strict=True), strict=True)]

    def output(self, state: EngineState) -> NDArray[np.float32]:
        """Refuse: each member has layers of its own, or none."""
        raise UlimiError("a mixture of models has no hidden layer to compare contexts by; this needs a network")

    def _with(self, state: EngineState) -> Iterator[tuple[Engine, EngineState]]:
        return zip(self.members, state, strict=True)

    def _mix(
        self, results: Sequence[tuple[NDArray[np.float32], EngineState]]
    ) -> tuple[NDArray[np.float32], EngineState]:
        # In float64, whose exponential is 0 only 745 nats below the best.
        p = sum(
            weight * np.exp(log_probs(logits)) for weight, (logits, _) in zip(self._weights_M, results, strict=True)
        )
        with np.errstate(divide="ignore"):
            return np.log(p).astype(np.float32), [new for _, new in results]


def mixed_nats(nats: NDArray[Any], weights_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the nats of tokens under a mixture, from those under each member, (M, …)."""
    # What is no number under a member stays none, and the caller sees it.
    with np.errstate(divide="ignore", invalid="ignore"):
        log_weights = np.log(weights_M).reshape(-1, *[1] * (nats.ndim - 1))
        mixed: NDArray[np.float64] = -np.logaddexp.reduce(log_weights - nats, axis=0)
    return mixed


def _nats(logits_BTV: NDArray[np.float32], targets_BT: NDArray[np.int64], alpha: float) -> NDArray[np.float32]:
    """Nats of each target, (B, T), of logits that are overwritten; smoothed under a sparse model."""
    if alpha != 1:
        return _sparse_nats(logits_BTV, targets_BT, alpha)
    own_BT1 = np.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
    top_BT1 = logits_BTV.max(axis=-1, keepdims=True)
    logits_BTV -= top_BT1  # in place: a copy of so many takes longer than all the rest
    total_BT1 = np.exp(logits_BTV, out=logits_BTV).sum(axis=-1, keepdims=True)
    nats_BT: NDArray[np.float32] = (np.log(total_BT1) + top_BT1 - own_BT1)[..., 0]
    return nats_BT


def _sparse_nats(logits_BTV: NDArray[np.float32], targets_BT: NDArray[np.int64], alpha: float) -> NDArray[np.float32]:
    """Smoothed nats of each target under a sparse model, (B, T)."""
    vocab_size = logits_BTV.shape[-1]
    log_probs_NV = log_probs(logits_BTV.reshape(-1, vocab_size), alpha)
    log_probs_N = log_probs_NV[np.arange(len(log_probs_NV)), targets_BT.ravel()]
    return smoothed_nats(np.exp(log_probs_N), vocab_size).astype(np.float32).reshape(targets_BT.shape)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Take PyTorch's own path on a CPU: for a single step oneDNN repacks all weights at each call.

    `torch.backends.mkldnn.flags` would do, but it also sets TF32, and warns that there is no Intel GPU.
    """
    import torch

    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def choose_device(name: str) -> "torch.device":
    """Turn "auto", "cpu", "cuda" or "cuda:1" into a device that is there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UlimiError(f"--device {name}: not a device; allowed: auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UlimiError(f"--device {name}: no CUDA device is there; allowed here: auto, cpu")
    if device.type not in ("cpu", "cuda"):
        raise UlimiError(f"--device {name}: not supported; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UlimiError(
            f"--device {name}: no such CUDA device, {torch.cuda.device_count()} in all; "
            f"allowed here: auto, cpu, cuda, cuda:N with N below {torch.cuda.device_count()}"
        )
    return device


def read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """Read a safetensors file.

    Raises:
        UlimiError: it cannot be read as one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UlimiError(f"{path}: cannot be read: {error}") from None
    return tensors


def write_tensors(tensors: "Mapping[str, torch.Tensor]", path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: it cannot be written, because the disk is full, say.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as unfinished:
        try:
            save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, unfinished, metadata)
        except SafetensorError as error:
            # safetensors wraps a full disk in an exception of its own.
            raise OSError(f"cannot write {path}: {error}") from None
        # safetensors leaves the file readable by its owner alone, whatever the umask says.
        unfinished.chmod(0o644)


def read_weights(run: Run, rng: np.random.Generator | None = None) -> "dict[str, torch.Tensor]":
    """Read a run's best weights; where only their graph is left, as of a release, what its numbers tell of them.

    Args:
        run: a network's.
        rng: see `ulimi.graph_weights.read_graph_weights`; float weights need none.

    Raises:
        UlimiError: there are none, or they cannot be read.
    """
    path = run.weights_path
    if path.name != ONNX:
        return read_tensors(path)
    from ulimi.graph_weights import read_graph_weights

    return read_graph_weights(path, rng)


def load_model(run: Run, device: "torch.device | str" = "cpu") -> "AWDLSTM":
    """Build a run's network with its best weights, in evaluation mode.

    Raises:
        UlimiError: no weights yet, or weights, configuration and tokenizer that do not fit each other.
    """
    from ulimi.model import AWDLSTM

    weights = read_weights(run)
    try:
        model = AWDLSTM(**run.config)
        if model.tie_weights:
            if "lm_head.weight" in weights:
                raise KeyError("lm_head.weight is there, and tie_weights is true")
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UlimiError(f"{run.weights_path} does not fit {run.dir}/config.json: {reason}") from None
    _check_tokenizer(run, model.vocab_size, WEIGHTS)
    return model.to(device).eval()


def load_engine(run: Run, device: str = "auto", *, kind: str = "auto", exact: bool = False) -> Engine:
    """Make an engine for a run: of a network, an n-gram model, or a mixture of such.

    Args:
        run: with weights.
        device: for PyTorch: auto, cpu, cuda or cuda:N; ONNX Runtime computes on the CPU.
        kind: "onnx": model.onnx, int8; "torch": the weights themselves; "auto": the first, where it is there, of these
            very weights, and no other device is asked for, else the second.
        exact: "auto" takes the weights wherever they can be run: for figures, since int8 rounds.

    Raises:
        UlimiError: PyTorch is needed and not installed, there is no such device, the graph that was asked for is of
            other weights, or the run cannot be loaded.
    """
    if kind not in ENGINES:
        raise UlimiError(f"--engine {kind}: allowed: {', '.join(ENGINES)}")
    if run.kind == MIXTURE:
        mixture = load_mixture(run.members(), run.config["weights"], device, kind=kind, exact=exact)
        _check_tokenizer(run, mixture.vocab_size, MEMBERS)
        return mixture
    if run.kind == NGRAM:
        if kind != "auto":
            run.need_network(f"--engine {kind}")
        if device not in ("auto", "cpu"):
            raise UlimiError(f"--device {device}: an n-gram model is computed on the CPU; allowed: auto, cpu")
        ngram_engine = NgramEngine(read_ngrams(run.dir / NGRAMS))
        _check_tokenizer(run, ngram_engine.vocab_size, NGRAMS)
        return ngram_engine
    if kind == "onnx" and device not in ("auto", "cpu"):
        raise UlimiError(f"--device {device}: --engine onnx computes on the CPU; allowed with it: auto, cpu")
    path = run.dir / ONNX
    if kind == "onnx" and not path.is_file():
        raise UlimiError(f"--engine onnx: {run.dir} holds no {ONNX}; {run.export_advice}")
    # A folder may hold the graph alone, without the weights that it was made of.
    alone = not run.has_weights
    # PyTorch is often there for other reasons, without what reads weights for it.
    has_torch = all(find_spec(name) is not None for name in ("torch", "onnx" if alone else "safetensors"))
    if exact and kind == "auto" and has_torch and not alone:
        kind = "torch"
    if kind == "onnx" or (kind == "auto" and device in ("auto", "cpu") and path.is_file()):
        try:
            engine = OnnxEngine(path, run.alpha)
        except UlimiError:
            if kind == "onnx" or alone or not has_torch:
                raise
        else:
            if alone or engine.weights_sha256 == run.weights_sha256:
                _check_tokenizer(run, engine.vocab_size, ONNX)
                return engine
            if kind == "onnx":
                raise UlimiError(
                    f"--engine onnx: {path} was made of other weights than {WEIGHTS} beside it; "
                    f"{run.export_advice} anew"
                )
    if not has_torch:
        if kind == "torch" or device not in ("auto", "cpu"):
            asked = "--engine torch" if kind == "torch" else f"--device {device}"
            raise UlimiError(f"{asked} needs PyTorch and what comes with it: {install('train')}")
        raise UlimiError(
            f"{run.dir} holds no {ONNX} of its weights; {run.export_advice}, or "
            f"{install('train')}, which brings PyTorch"
        )
    return TorchEngine(load_model(run, choose_device(device)), run.alpha)


def load_mixture(
    runs: Sequence[Run], weights: Sequence[float], device: str = "auto", *, kind: str = "auto", exact: bool = False
) -> MixtureEngine:
    """Make the engine of a mixture; where and how networks run says nothing of the n-gram models among them.

    Raises:
        UlimiError: as of `load_engine`, and of `MixtureEngine`.
    """
    has_network = any(run.kind != NGRAM for run in runs)
    members = [
        load_engine(run) if run.kind == NGRAM and has_network else load_engine(run, device, kind=kind, exact=exact)
        for run in runs
    ]
    return MixtureEngine(members, weights)


def _check_tokenizer(run: Run, vocab_size: int, name: Path | str) -> None:
    """Refuse a tokenizer of another model: its ids would be read without a word, and mean other text."""
    if (run.dir / "tokenizer.json").is_file() and run.tokenizer.vocab_size != vocab_size:
        model = {NGRAM: "n-gram model", MIXTURE: "mixture"}.get(run.kind, "network")
        raise UlimiError(
            f"{run.dir}: tokenizer.json has {run.tokenizer.vocab_size} tokens, the {model} of {name} {vocab_size}; "
            "they do not belong together"
        )
