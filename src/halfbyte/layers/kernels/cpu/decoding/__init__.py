"""A token at a time: products with few vectors, and all operations of a token as one call."""
