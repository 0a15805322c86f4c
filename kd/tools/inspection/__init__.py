"""Inspection of finished networks: fidelity, calibration, confusion, and the loss surface around them."""
