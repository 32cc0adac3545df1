"""The ladder: the walk through a model, what each rung does on it, and who conducts them."""
