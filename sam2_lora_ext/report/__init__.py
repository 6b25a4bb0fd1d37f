"""One HTML page about runs: facts, curves, tables, pictures, updates by layer, commands to repeat them."""
