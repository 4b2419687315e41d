"""What runs in a forward: linears with LoRA, attention over examples laid end to end, norms, the loss.

`proofs/` shows on the user's own model that they learn what PEFT's and transformers' own code learns.
"""
