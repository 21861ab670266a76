"""A real small model and real data that packages ship."""
