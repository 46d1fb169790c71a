"""The nouns: who owns which element, the gradient statistics, the mask."""
