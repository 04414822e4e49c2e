"""Hostile files and arguments: made in great number, given to the package, and each outcome classified.

`originals` makes small valid files; `kinds` damages them in structured ways and says what may come of it; `trial`
classifies; `campaign` runs many trials in worker processes with bounded memory and time. `make fuzz` runs a long
campaign, `test_quick.py` a short one, and `test_once_failed.py` what once failed.
"""
