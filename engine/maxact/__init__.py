"""maxact."""
