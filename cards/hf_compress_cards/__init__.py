"""Facts to model card: the only input is a folder with its compression.json."""
