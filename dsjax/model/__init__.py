"""The mathematics: arrays in, arrays and aux out. Knows nothing of optimizers, files or meshes."""
