"""The Measurements page: run the measuring scripts, keep their figures as JSON, draw tables and pictures from it.

`runs` says what is measured by which commands, `record` writes the JSON with date, machine and versions, `tables` and
`plots` render docs/measurements.md and its pictures from the JSON alone. The tests render; they measure nothing.
"""
