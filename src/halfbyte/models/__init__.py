"""A model without its weights: its tensors, its parts, and what is special in its architecture."""
