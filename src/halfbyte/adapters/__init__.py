"""LoRA on a base: which modules, adding, counting, saving, loading. With `layers`, the only door to peft."""
