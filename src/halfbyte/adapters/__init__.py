"""LoRA on a base: which modules, adding, counting, saving, loading. The only door to peft."""
