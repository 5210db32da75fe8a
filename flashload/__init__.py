"""How weights live on disk and come into memory: checkpoints, packs, plans."""
