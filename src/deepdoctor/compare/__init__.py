"""Base and tuned answer the same unseen questions; the difference gets an interval and a verdict."""
