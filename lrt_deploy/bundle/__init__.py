"""The parts of a bundle: contract of the graphs, manifest, precisions, engine sidecars, names of the weights."""
