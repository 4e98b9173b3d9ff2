"""Data sets: their description, files, labels and cache, augmentation, loading."""
