"""How many tokens a second are written: ulimi, a loop of `nn.LSTM`s, Hugging Face's GPT-2, and fastai's `predict`.

    python benchmarks/generation.py --out benchmarks/results/generation.json

Random weights of two sizes; who runs a network does not mind what it says. Each contender writes 100 tokens (fastai,
which reads all of the text again for each word, 20) for 1, 8 and 64 texts at once, every token drawn from the softmax
of all logits. GPT-2 has as many parameters in few layers, which suits it, and a KV cache: by its own `generate`, and by
the plain loop that is faster. What is not installed is left out.

The floor is what one core could do if all else took no time: int8 weights that a token needs, over the speed at which
the core reads an array of that size.
"""

from common import Turn, arguments, bandwidth, finish, take_turns  # isort: skip

import inspect
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ulimi.engine import Engine, OnnxEngine, TorchEngine
from ulimi.export import build_graph, write_int8
from ulimi.generate import generate
from ulimi.model import AWDLSTM
from ulimi.sampling import Sampling

LAYERS = 3
BATCHES = (1, 8, 64)
NUM_TOKENS = 100
FASTAI_SHARE = 5
"""fastai writes this part of them"""


class Size(NamedTuple):
    """V, E, H; and GPT-2's width, layers and heads."""

    vocab: int
    embedding: int
    hidden: int
    gpt2: tuple[int, int, int]


SIZES = {
    "cpu": Size(5_000, 256, 640, (320, 5, 5)),
    "ptb": Size(10_000, 400, 1150, (512, 6, 8)),
}
TINY = {"tiny": Size(60, 8, 12, (8, 1, 1))}


class Loop(nn.Module):
    """The network as anyone would write it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        widths = [size.embedding, *[size.hidden] * (LAYERS - 1), size.embedding]
        self.embedding = nn.Embedding(size.vocab, size.embedding)
        self.layers = nn.ModuleList(nn.LSTM(i, o, batch_first=True) for i, o in pairwise(widths))
        self.decoder = nn.Linear(size.embedding, size.vocab)
        self.decoder.weight = self.embedding.weight

    def write(self, num: int, num_tokens: int) -> None:
        """Write `num` texts."""
        ids_B1 = torch.zeros(num, 1, dtype=torch.long)
        states = [None] * LAYERS
        for _ in range(num_tokens):
            x = self.embedding(ids_B1)
            for i, layer in enumerate(self.layers):
                x, states[i] = layer(x, states[i])
            ids_B1 = drawn(self.decoder(x))


def drawn(logits_B1V: Tensor) -> Tensor:
    """Draw from the softmax of the logits, (B, 1)."""
    return torch.multinomial(logits_B1V[:, -1].softmax(-1), 1)


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """Switch oneDNN, and gradients off."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled
    with torch.inference_mode():
        yield
    torch.backends.mkldnn.enabled = before


def of_ulimi(engine: Engine, num: int, num_tokens: int) -> Turn:
    """Write with an engine of ours."""

    def turn() -> int:
        steps = generate(engine, [engine.vocab_size - 1], sampling=Sampling(), max_tokens=num_tokens, num=num)
        return sum(1 for _ in steps)

    return turn


def of_the_network(engine: Engine, num: int, num_tokens: int) -> Turn:
    """Step, and draw nothing."""

    def turn() -> int:
        state = engine.initial_state(num)
        for token in range(num_tokens):
            _, state = engine.step(np.full(num, token % engine.vocab_size), state)
        return num_tokens * num

    return turn


def of_the_loop(loop: Loop, num: int, num_tokens: int, enabled: bool) -> Turn:
    """Write with `nn.LSTM`s."""

    def turn() -> int:
        with onednn(enabled):
            loop.write(num, num_tokens)
        return num_tokens * num

    return turn


def of_gpt2(size: Size, batches: tuple[int, ...], num_tokens: int) -> dict[tuple[str, int], Turn]:
    """Write with GPT-2, in two ways."""
    # A torchvision of another build than torch's cannot be imported, and text needs none.
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    from transformers import GPT2Config, GPT2LMHeadModel

    width, num_layers, num_heads = size.gpt2
    config = GPT2Config(
        vocab_size=size.vocab, n_positions=256, n_embd=width, n_layer=num_layers, n_head=num_heads,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def by_loop(num: int) -> int:
        ids_B1, cache = torch.zeros(num, 1, dtype=torch.long), None
        with torch.inference_mode():
            for _ in range(num_tokens):
                out = model(ids_B1, use_cache=True, **{cache_name: cache})
                ids_B1, cache = drawn(out.logits), getattr(out, cache_name)
        return num_tokens * num

    def by_generate(num: int) -> int:
        ids_B1 = torch.zeros(num, 1, dtype=torch.long)
        with torch.inference_mode():
            ids_BT = model.generate(
                ids_B1, attention_mask=torch.ones_like(ids_B1), do_sample=True, top_k=0, max_new_tokens=num_tokens,
                min_new_tokens=num_tokens, pad_token_id=0,
            )  # fmt: skip
        return num * (ids_BT.shape[1] - 1)

    ways = {"GPT-2, plain loop": by_loop, "GPT-2, generate()": by_generate}
    print(f"GPT-2: {model.num_parameters():,} parameters")
    return {(name, num): lambda way=way, num=num: way(num) for name, way in ways.items() for num in batches}


def of_fastai(size: Size, num_words: int) -> Turn:
    """Write with fastai's language-model learner."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pandas as pd
        from fastai.text.all import AWD_LSTM, BaseTokenizer, TextDataLoaders, Tokenizer, language_model_learner
        from fastai.text.models.awdlstm import awd_lstm_lm_config

    words = [f"w{number}" for number in range(size.vocab)]
    specials = ["xxunk", "xxpad", "xxbos", "xxeos", "xxfld", "xxrep", "xxwrep", "xxup", "xxmaj"]
    vocab = (specials + words)[: size.vocab]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = pd.DataFrame({"text": [" ".join(words[:50])] * 20})
        loaders = TextDataLoaders.from_df(
            frame, path=folder, text_col="text", is_lm=True, text_vocab=vocab, seq_len=10, bs=2,
            tok_tfm=Tokenizer.from_df("text", tok=BaseTokenizer(), n_workers=1), num_workers=0,
        )  # fmt: skip
        config = {**awd_lstm_lm_config, "emb_sz": size.embedding, "n_hid": size.hidden, "n_layers": LAYERS}
        learner = language_model_learner(loaders, AWD_LSTM, config=config, pretrained=False)

    def turn() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner.predict("w1", n_words=num_words, no_bar=True)
        return num_words

    return turn


def contenders(
    size: Size, engines: dict[str, Engine], batches: tuple[int, ...], num_tokens: int
) -> dict[tuple[str, int], Turn]:
    """Make all, each for each batch."""
    turns: dict[tuple[str, int], Turn] = {}
    loop = Loop(size).eval()
    for num in batches:
        for name, engine in engines.items():
            turns[name, num] = of_ulimi(engine, num, num_tokens)
        turns["ulimi, the network alone", num] = of_the_network(engines["ulimi, int8"], num, num_tokens)
        for enabled in (False, True):
            turns[f"nn.LSTM loop, oneDNN {'on' if enabled else 'off'}", num] = of_the_loop(
                loop, num, num_tokens, enabled
            )
    if find_spec("transformers"):
        turns |= of_gpt2(size, batches, num_tokens)
    if find_spec("fastai"):
        turns["fastai, predict()", 1] = of_fastai(size, max(1, num_tokens // FASTAI_SHARE))
    return turns


def main() -> None:
    """See the module."""
    args = arguments(__doc__)
    sizes, batches, num_tokens = (TINY, (1, 64), 3) if args.tiny else (SIZES, BATCHES, NUM_TOKENS)
    torch.set_num_threads(1)
    rows = []
    for name, size in sizes.items():
        model = AWDLSTM(
            vocab_size=size.vocab, embedding_size=size.embedding, hidden_size=size.hidden, num_layers=LAYERS,
            rng=torch.Generator().manual_seed(0),
        )  # fmt: skip
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
        with tempfile.TemporaryDirectory() as folder:
            fp32, path = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
            onnx.save(build_graph(model, ""), fp32)
            write_int8(fp32, path)
            engines: dict[str, Engine] = {"ulimi, int8": OnnxEngine(path), "ulimi, PyTorch": TorchEngine(model)}
            weights = onnx.load(path).graph.initializer
        rates = take_turns(contenders(size, engines, batches, num_tokens), args.rounds)
        # One row of the embedding is looked up, all others are read.
        num_bytes = sum(len(w.raw_data) for w in weights if w.name != "embedding_quantized")
        speed = bandwidth(num_bytes)
        for (contender, num), rate in rates.items():
            rows.append({"size": name, "batch": num, "contender": contender, "tokens_per_s": round(rate, 1)})
        floor = {"size": name, "batch": 1, "contender": "the floor", "tokens_per_s": round(speed / num_bytes, 1)}
        rows.append({**floor, "num_bytes": num_bytes, "gb_per_s": round(speed / 1e9, 1)})
    finish(args, rows, ("numpy", "onnxruntime", "torch", "transformers", "fastai"))


if __name__ == "__main__":
    main()
