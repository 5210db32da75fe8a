"""The small models that ship with edge, and the recipe that trained them (which alone needs torch)."""
