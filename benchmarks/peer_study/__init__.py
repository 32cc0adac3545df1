"""What benchmarks/mpq_peers.py runs: other libraries on the model, tokens and core of our own rows."""
