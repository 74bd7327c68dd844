"""One step of a model, whatever runs it: ids and a state in, numbers and a state out.

`Engine` is what the light floor knows of a network: generating and scoring need nothing else. `OnnxEngine` runs
model.onnx on ONNX Runtime; `TorchEngine` runs the weights on PyTorch. Each is imported where an engine is made, not
before.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ulimi.errors import UlimiError
from ulimi.run import ONNX, WEIGHTS, Run, atomic_path

if TYPE_CHECKING:
    import torch

    from ulimi.model import AWDLSTM

EVALUATION_WINDOW = 256
"""tokens read at once when scoring; scores do not depend on it"""

ENGINES = ("auto", "onnx", "torch")

EngineState = Any
"""opaque: belongs to the engine that made it"""


class Engine(Protocol):
    """A network in evaluation mode. State is a value: no call changes the state that it was given."""

    @property
    def vocab_size(self) -> int:
        """V: ids are 0 to V - 1."""
        ...

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's numbers are its own, whatever rows stand beside it (but for the last bits)."""
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
        """Read a window; give the nats of each target, (B, T)."""

    def repeat_state(self, state: EngineState, n: int) -> EngineState:
        """Turn the state of one stream into that of `n` equal ones."""

    def select_state(self, state: EngineState, rows: Sequence[int]) -> EngineState:
        """Keep these rows of a batch, in this order."""


class TorchEngine:
    """`Engine` on PyTorch."""

    batch_invariant = True

    def __init__(self, model: "AWDLSTM") -> None:
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

        with torch.inference_mode():
            out = self._model(torch.tensor(inputs_BT, device=self._device), state)
            targets = torch.tensor(targets_BT, device=self._device).flatten()
            nll = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets, reduction="none")
        return nll.view(targets_BT.shape).float().cpu().numpy(), out.state

    def repeat_state(self, state: EngineState, n: int) -> EngineState:
        """Turn the state of one stream into that of `n` equal ones."""
        return [(h.repeat(1, n, 1), c.repeat(1, n, 1)) for h, c in state]

    def select_state(self, state: EngineState, rows: Sequence[int]) -> EngineState:
        """Keep these rows of a batch, in this order."""
        return [(h[:, list(rows)].contiguous(), c[:, list(rows)].contiguous()) for h, c in state]


class OnnxEngine:
    """`Engine` on ONNX Runtime, on the CPU; the graph is that of `ulimi.export`.

    Args:
        path: a model.onnx.

    Raises:
        UlimiError: the file cannot be read as one.
    """

    # int8 finds one scale for the activations of all rows together.
    batch_invariant = False

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Threads that spin between two steps take the core from the next one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no base of their own
            raise UlimiError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        self.weights_sha256 = self._session.get_modelmeta().custom_metadata_map.get("weights_sha256", "")
        logits, *_ = self._session.get_outputs()
        self.vocab_size = int(logits.shape[-1])
        _, *states = self._session.get_inputs()
        self._state_names = [state.name for state in states]
        self._sizes = [int(state.shape[-1]) for state in states]

    def initial_state(self, batch_size: int) -> EngineState:
        """Zeros for `batch_size` streams."""
        return [np.zeros((1, batch_size, size), dtype=np.float32) for size in self._sizes]

    def step(self, ids_B: NDArray[np.int64], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read one id a stream, (B,); give the logits of the next, (B, V)."""
        logits_TBV, new_state = self._run(ids_B[None], state)
        return logits_TBV[-1], new_state

    def prime(self, ids: Sequence[int], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        """Read several ids of one stream at once; give the logits after the last, (1, V)."""
        if not ids:
            raise ValueError("no ids to read")
        for start in range(0, len(ids), EVALUATION_WINDOW):
            window_T1 = np.array(ids[start : start + EVALUATION_WINDOW], dtype=np.int64)[:, None]
            logits_TBV, state = self._run(window_T1, state)
        return logits_TBV[-1], state

    def nll(
        self, inputs_BT: NDArray[np.int64], targets_BT: NDArray[np.int64], state: EngineState
    ) -> tuple[NDArray[np.float32], EngineState]:
        """Read a window; give the nats of each target, (B, T)."""
        logits_TBV, state = self._run(np.ascontiguousarray(inputs_BT.T), state)
        chosen_TB = np.take_along_axis(logits_TBV, targets_BT.T[..., None], axis=-1)[..., 0]
        top_TB = logits_TBV.max(axis=-1)
        total_TB = np.exp(logits_TBV - top_TB[..., None]).sum(axis=-1)
        nll_TB: NDArray[np.float32] = np.log(total_TB) + top_TB - chosen_TB
        return nll_TB.T, state

    def repeat_state(self, state: EngineState, n: int) -> EngineState:
        """Turn the state of one stream into that of `n` equal ones."""
        return [array.repeat(n, axis=1) for array in state]

    def select_state(self, state: EngineState, rows: Sequence[int]) -> EngineState:
        """Keep these rows of a batch, in this order."""
        return [np.ascontiguousarray(array[:, list(rows)]) for array in state]

    def _run(self, ids_TB: NDArray[np.int64], state: EngineState) -> tuple[NDArray[np.float32], EngineState]:
        logits_TBV, *new_state = self._session.run(
            None, {"ids": ids_TB, **dict(zip(self._state_names, state, strict=True))}
        )
        return logits_TBV, new_state


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


def load_model(run: Run, device: "torch.device | str" = "cpu") -> "AWDLSTM":
    """Build a run's network with its best weights, in evaluation mode.

    Raises:
        UlimiError: no weights yet, or weights and configuration that do not fit each other.
    """
    from ulimi.model import AWDLSTM

    weights = read_tensors(run.weights_path)
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
    return model.to(device).eval()


def load_engine(run: Run, device: str = "auto", *, kind: str = "auto") -> Engine:
    """Make an engine for a run.

    Args:
        run: with weights.
        device: for PyTorch: auto, cpu, cuda or cuda:N; ONNX Runtime computes on the CPU.
        kind: "onnx": model.onnx, int8; "torch": the weights themselves; "auto": the first, where it is there, of these
            very weights, and no other device is asked for, else the second.

    Raises:
        UlimiError: PyTorch is needed and not installed, there is no such device, or the run cannot be loaded.
    """
    if kind not in ENGINES:
        raise UlimiError(f"--engine {kind}: allowed: {', '.join(ENGINES)}")
    path = run.dir / ONNX
    if kind == "onnx" and not path.is_file():
        raise UlimiError(f"--engine onnx: {run.dir} holds no {ONNX}; `ulimi export {run.dir}` writes it")
    if kind == "onnx" or (kind == "auto" and device in ("auto", "cpu") and path.is_file()):
        engine = OnnxEngine(path)
        # A folder may hold the graph alone, without the weights that it was made of.
        alone = not (run.dir / WEIGHTS).is_file()
        if kind == "onnx" or alone or engine.weights_sha256 == run.weights_sha256:
            return engine
    if find_spec("torch") is None:
        raise UlimiError(
            f"{run.dir} holds no {ONNX} of its weights; `ulimi export {run.dir}` writes it, or "
            "pip install 'ulimi[train]' brings PyTorch"
        )
    return TorchEngine(load_model(run, choose_device(device)))
