"""llama.cpp, through the package llama-cpp-python, as an engine of the benchmarks."""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
from typing import Any

import llama_cpp
import numpy as np
from engine import Engine, rss_bytes

_LOGGED = (3, 4)  # GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    if level in _LOGGED:
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)


class LlamaEngine(Engine):
    """A GGUF file in llama.cpp, mapped into memory, with llama.cpp's own defaults.

    context: tokens of each of so many sequences.
    """

    def __init__(self, path: str, *, context: int, threads: int, sequences: int = 1) -> None:
        llama_cpp.llama_log_set(_log, None)
        llama_cpp.llama_backend_init()
        of_model = llama_cpp.llama_model_default_params()
        of_model.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), of_model)
        of_context = llama_cpp.llama_context_default_params()
        of_context.n_ctx = context * sequences
        of_context.n_seq_max = sequences
        of_context.n_threads = of_context.n_threads_batch = threads
        self.context = self.model and llama_cpp.llama_init_from_model(self.model, of_context)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.settings = {name: getattr(of_context, name) for name in ("n_batch", "n_ubatch")}
        self.settings["flash_attn_type"] = of_context.flash_attn_type

    def feed(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        llama_cpp.llama_synchronize(self.context)

    def feed_each(self, tokens: list[list[int]], begin: int) -> list[int]:
        """Run the tokens of all sequences in one pass; the likeliest next token of each.

        As llama.cpp's server does with the sequences of its slots. begin: tokens of each so far.
        """
        batch = llama_cpp.llama_batch_init(sum(map(len, tokens)), 0, 1)
        last = []
        for sequence, ids in enumerate(tokens):
            for position, token in enumerate(ids, begin):
                at = batch.n_tokens
                batch.token[at], batch.pos[at] = token, position
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = position == begin + len(ids) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = (llama_cpp.llama_get_logits_ith(self.context, at) for at in last)
        return [int(np.ctypeslib.as_array(row, (self.vocabulary,)).argmax()) for row in rows]

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, False)

    def logits(self) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.vocabulary,)).copy()

    def facts(self) -> dict[str, Any]:
        system = ctypes.cast(llama_cpp.llama_print_system_info(), ctypes.c_char_p).value or b""
        return {
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {importlib.metadata.version('llama_cpp_python')}",
            "threads": llama_cpp.llama_n_threads(self.context),
            "load_mode": "mmap",
            **self.settings,
            "system": system.decode().strip(),
            "rss_bytes": rss_bytes(),
        }
