"""One HTML page about runs: facts, curves, tables, pictures, updates by layer, commands that repeat the runs."""
