"""What piece_ds knows of a transformers model: how to load it, which parameters may train, and its layout."""
