"""What stored tensors mean. Imports torch only.

`packing` has the bit order, `onebit` the tensors of a onebit layer. docs/formats.md says the same to people
who write another reader.
"""
