"""The papers' tables, reproduced: planned as one graph of stages, trained if missing, compared with the papers."""
