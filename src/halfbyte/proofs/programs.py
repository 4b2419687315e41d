"""`python -m halfbyte.proofs.programs PROGRAM ASKED.json`: the child process in which a program opens an export.

`transformers` opens a merged folder as anyone would, without a line of ours; `llama.cpp` a GGUF file, with an adapter
where one is given, through the wheel llama-cpp-py-sync. Each is asked what the run was asked (`export/witness.py`).
Why a process of its own: llama.cpp ends its process where it meets what it does not know.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.system import device, openmp
from halfbyte.system.children import child
from halfbyte.types import Document

SAID = "said.json"
LOGITS, LOSSES = "logits.npy", "losses.npy"
INSTALL = "pip install 'halfbyte[gguf]'"


def has_llama() -> bool:
    return find_spec("llama_cpp_py_sync") is not None


class Transformers:
    """A folder by `from_pretrained` alone."""

    def __init__(self, path: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

        self.torch = torch
        whole = type(AutoConfig.from_pretrained(path)) in AutoModelForMultimodalLM._model_mapping
        auto = AutoModelForMultimodalLM if whole else AutoModelForCausalLM
        self.model = auto.from_pretrained(path, dtype="auto").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def logits(self, ids: Sequence[int], at: Sequence[int]) -> np.ndarray:
        with self.torch.no_grad():
            return self.model(input_ids=self.torch.tensor([list(ids)])).logits[0, list(at)].float().numpy()

    def answer(self, prompt: Sequence[int], stop: Sequence[int], most: int) -> list[int]:
        ids = self.torch.tensor([list(prompt)])
        out = self.model.generate(
            input_ids=ids, attention_mask=self.torch.ones_like(ids), do_sample=False, max_new_tokens=most,
            eos_token_id=list(stop), pad_token_id=stop[0] if stop else 0,
        )  # fmt: skip
        return [int(i) for i in out[0, len(prompt) :]]

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


class LlamaCpp:
    """A GGUF file by llama.cpp's own library. `others`: fields of its parameters, of a model or a context."""

    def __init__(
        self, path: str, adapter: str | None = None, tokens: int = 2048, threads: int = 2, **others: object
    ) -> None:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.ffi, self.lib = get_ffi(), get_lib()
        self.lib.llama_backend_init()
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        context = self.lib.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = tokens
        context.n_threads = context.n_threads_batch = threads
        context.type_k = context.type_v = 0  # fp32, so that only the file's own rounding is seen
        context.flash_attn_type = 0
        for name, value in others.items():
            setattr(context if hasattr(context, name) else settings, name, value)
        self.model = self.lib.llama_model_load_from_file(path.encode(), settings)
        if self.model == self.ffi.NULL:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = int(self.lib.llama_vocab_n_tokens(self.vocab))
        self.context = self.lib.llama_init_from_model(self.model, context)
        if adapter is not None:
            lora = self.lib.llama_adapter_lora_init(self.model, adapter.encode())
            if lora == self.ffi.NULL:
                raise SystemExit(f"llama.cpp cannot load the adapter {adapter}")
            one = self.ffi.new("struct llama_adapter_lora *[1]", [lora])
            if self.lib.llama_set_adapters_lora(self.context, one, 1, self.ffi.new("float[1]", [1.0])):
                raise SystemExit(f"llama.cpp cannot use the adapter {adapter}")

    def tokens(self, text: str) -> list[int]:
        raw = text.encode()
        most = len(raw) + 16
        out = self.ffi.new(f"llama_token[{most}]")
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), out, most, False, True)
        return [int(out[i]) for i in range(count)]

    def logits(self, ids: Sequence[int], at: Sequence[int]) -> np.ndarray:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return self._read(ids, 0, set(at))

    def _read(self, ids: Sequence[int], first: int, at: set[int]) -> np.ndarray:
        """Go on with these tokens; the logits after those in `at`, counted from the first of `ids`."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, first + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = i in at
            if (code := self.lib.llama_decode(self.context, batch)) != 0:
                raise SystemExit(f"llama.cpp could not read {len(ids)} tokens (code {code})")
            rows = [self.lib.llama_get_logits_ith(self.context, i) for i in sorted(at)]
            return np.stack([np.frombuffer(self.ffi.buffer(r, 4 * self.size), np.float32).copy() for r in rows])
        finally:
            self.lib.llama_batch_free(batch)

    def answer(self, prompt: Sequence[int], stop: Sequence[int], most: int) -> list[int]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        logits, answer = self._read(prompt, 0, {len(prompt) - 1}), list[int]()
        while True:
            answer.append(int(logits[0].argmax()))
            if answer[-1] in stop or len(answer) == most:
                return answer
            logits = self._read(answer[-1:], len(prompt) + len(answer) - 1, {0})

    def text(self, ids: Sequence[int]) -> str:
        buffer = self.ffi.new("char[512]")

        def pieces() -> Iterator[bytes]:
            for token in ids:
                count = self.lib.llama_token_to_piece(self.vocab, token, buffer, 512, 0, False)
                yield bytes(self.ffi.buffer(buffer, max(0, count)))

        return b"".join(pieces()).decode(errors="replace")


def observe(
    rows: Sequence[Document], logits: Callable[[Sequence[int], Sequence[int]], np.ndarray], out: Path, *,
    vocabulary: int | None = None, name: str = "",
) -> None:  # fmt: skip
    """Write what a model says of rows: `logits.npy`, fp32 (positions, vocabulary), of each row's `positions`;
    `losses.npy`, fp64 (rows, 2), of each row the summed loss of the tokens after `at`, and how many they are."""
    at_positions, losses = list[np.ndarray](), list[tuple[float, int]]()
    for row in rows:
        values = logits(row["ids"], row["at"])[:, :vocabulary]
        at_positions.append(values[[row["at"].index(i) for i in row["positions"]]])
        wide = values.astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        following = [row["ids"][i + 1] for i in row["at"]]
        loss = np.log(np.exp(wide).sum(axis=1)) - wide[range(len(wide)), following]
        losses.append((float(loss.sum()), len(loss)))
    np.save(out / (name + LOGITS), np.concatenate(at_positions))
    np.save(out / (name + LOSSES), np.array(losses))


def ask(program: Transformers | LlamaCpp, asked: Document, out: Path) -> None:
    """Put a witness' questions to a program."""
    observe(asked["rows"], program.logits, out, vocabulary=asked["vocabulary"])
    prompts = [*zip(asked["prompts"], asked["new_tokens"], strict=True)]
    answers = [program.answer(ids, asked["stop"], most) for ids, most in prompts]
    answer = {
        "tokenized": [program.tokens(each["text"]) for each in asked["tokenized"]],
        "answers": answers,
        "texts": [program.text(ids) for ids in answers],
    }
    (out / SAID).write_text(json.dumps(answer), encoding="utf-8")


def main(program: str, task: Path) -> None:
    values: dict[str, Any] = json.loads(task.read_text(encoding="utf-8"))
    asked = json.loads(Path(values["witness"]).read_text(encoding="utf-8"))
    lengths = [len(ids) + most for ids, most in zip(asked["prompts"], asked["new_tokens"], strict=True)]
    longest = max([len(r["ids"]) for r in asked["rows"]] + lengths)
    path, adapter = values["path"], values.get("adapter")
    openmp.watch(device.cores(), device.core_share())  # beside busy programs a merge was 6.5 times as long without
    opened = LlamaCpp(path, adapter, longest + 8) if program == "llama.cpp" else Transformers(path)
    ask(opened, asked, Path(values["out"]))


if __name__ == "__main__":
    with child():
        main(sys.argv[1], Path(sys.argv[2]))
