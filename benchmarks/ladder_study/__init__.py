"""The study behind docs/results.md: which rows there are, how each is made, one protocol for all, tables from JSON."""
