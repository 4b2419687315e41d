"""What runs inside a forward pass: packed attention and its proof, rows, the loss.

attention.py  examples laid end to end, none of which sees another (transformers' attention interface)
rows.py       the same from outside, for models whose attention has no such seam
packing.py    which of the two a model takes, its forward's arguments, and the proof on the user's own model
loss.py       cross-entropy of the labelled tokens only

Each has its slow reference in the tests.
"""
