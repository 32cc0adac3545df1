"""What stored tensors mean. Imports torch only.

``packing`` has the bit order, ``onebit`` the tensors of a onebit layer, ``mpq`` those of a group-quantized one.
docs/formats.md says the same to people
who write another reader.
"""
