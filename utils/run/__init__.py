"""One run: its identity, its steps, which network to cut, its results, its notebooks."""
