"""Bits by themselves: what each way to pack a layer costs, and which one each layer gets within a budget."""
