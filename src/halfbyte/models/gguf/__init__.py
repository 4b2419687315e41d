"""GGUF files: their headers, their tensors in pieces, and what architecture and layout they stand for."""
