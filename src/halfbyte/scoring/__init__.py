"""What an answer is worth, and how sure that is: text against text, no model and no torch."""
