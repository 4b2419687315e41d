"""A reward that a model of random weights earns now and then: the share of tokens that are plain letters."""


def score(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    pairs = zip(completions, completion_ids, strict=True)
    return [sum(letter.isascii() for letter in text) / len(ids) for text, ids in pairs]
