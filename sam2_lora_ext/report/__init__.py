"""One HTML page about runs: facts, curves, tables, pictures, where the adaptation happened, how to repeat it."""
