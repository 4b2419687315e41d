"""A token at a time: all operations of a token as one call, and the products they are made of.

- `slots`: what each number of an operation means. `interpreter`: the kernel that all threads run; `code_items`,
  `head_items`: parts of it.
- `codes_amx`, `codes_bf16`, `codes_int16`: 4-bit rows times the vectors of texts, with AMX, AVX-512 and AVX2;
  `code_tables`: levels and scales looked up.
- `dense`: rows of plain numbers. `int8_head`, `int8_head_amx`: the head in 8 bits. `attend`: attention over a cache.
- `emit`: LLVM's language in short, which they are written in.
"""
