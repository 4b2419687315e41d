"""Whether the fast ways compute what the slow ones do: the proofs, and what they share."""
