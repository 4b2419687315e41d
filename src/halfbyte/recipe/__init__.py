"""What was asked: a recipe as YAML, its fields, its problems in words, and where each value came from. No torch."""
