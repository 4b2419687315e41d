"""A frozen base: opened, checked against the policy, and placed in RAM, memory-mapped, or streamed layer by layer."""
