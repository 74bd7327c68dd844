"""One step of a model, whatever runs it: ids and a state in, numbers and a state out.

`Engine` is what the light floor knows of a network: generating and scoring need nothing else. `TorchEngine` runs it on
PyTorch, which is imported where an engine is made and not before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ulimi.errors import UlimiError
from ulimi.run import Run

if TYPE_CHECKING:
    import torch

    from ulimi.model import AWDLSTM

EVALUATION_WINDOW = 256
"""tokens read at once when scoring; scores do not depend on it"""

EngineState = Any
"""opaque: belongs to the engine that made it"""


class Engine(Protocol):
    """A network in evaluation mode. State is a value: no call changes the state that it was given."""

    @property
    def vocab_size(self) -> int:
        """V: ids are 0 to V - 1."""
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


def load_model(run: Run, device: "torch.device | str" = "cpu") -> "AWDLSTM":
    """Build a run's network with its best weights, in evaluation mode.

    Raises:
        UlimiError: no weights yet, or weights and configuration that do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ulimi.model import AWDLSTM

    path = run.weights_path
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UlimiError(f"{path}: cannot be read: {error}") from None
    try:
        model = AWDLSTM(**run.config)
        if model.tie_weights:
            if "lm_head.weight" in weights:
                raise KeyError("lm_head.weight is there, and tie_weights is true")
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError) as error:
        raise UlimiError(f"{path} does not fit {run.dir}/config.json: {str(error).splitlines()[-1].strip()}") from None
    return model.to(device).eval()


def load_engine(run: Run, device: str = "auto") -> Engine:
    """Make an engine for a run.

    Raises:
        UlimiError: PyTorch is not installed, or the run cannot be loaded.
    """
    try:
        import torch
    except ImportError:
        raise UlimiError("this command needs PyTorch: pip install 'ulimi[train]'") from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchEngine(load_model(run, device))
