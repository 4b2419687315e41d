"""What names a model (a hub id, a folder, a GGUF file, a packaged name) -> one local checkpoint."""
