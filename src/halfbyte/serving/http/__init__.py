"""HTTP around the engine: OpenAI's requests and answers, who may ask, figures, and a page."""
