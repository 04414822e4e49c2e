"""Measure how fast a decoder is, and compare it with the memory bandwidth of the machine."""
