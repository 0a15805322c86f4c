"""The papers' tables, reproduced: planned as one graph of stages, trained where missing, set beside the published."""
