"""The small models that ship with edge, and the recipe that trained them (nothing here is imported at run time)."""
