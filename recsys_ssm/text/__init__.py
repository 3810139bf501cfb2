"""Text of items for language models: tokenizers, weights, prompts and a search engine over titles."""
