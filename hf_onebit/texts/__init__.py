"""Calibration texts that the model writes itself."""
