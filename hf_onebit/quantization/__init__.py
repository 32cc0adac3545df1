"""What the quantizers share: the plan, one matrix at a time, resuming, records."""
