"""How fast a decoder is, held against the memory bandwidth of where it runs."""
