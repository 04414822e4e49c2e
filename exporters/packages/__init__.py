"""Packages: folders that put a bundle where it is to run. Needs neither torch nor the graph tools."""
