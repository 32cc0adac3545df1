"""What a quantization will take, said before it starts."""
