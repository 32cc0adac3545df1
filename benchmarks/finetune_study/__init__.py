"""What benchmarks/finetune.py runs: ways of fine-tuning one model on the same tokens, and the memory of their steps."""
