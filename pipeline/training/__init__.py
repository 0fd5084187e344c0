"""The policy alone, against cached columns. Nothing here can load a reference."""
