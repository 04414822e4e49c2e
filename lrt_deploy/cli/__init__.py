"""The command line, one verb a file. Heavy imports stay inside command bodies."""
