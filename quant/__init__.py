"""Fewer bits: weight formats, quantisers, and what their loss is."""
