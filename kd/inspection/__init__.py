"""Inspection: what finished networks answer beyond their accuracy, and how their loss lies around them."""
