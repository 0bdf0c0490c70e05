"""Rows in, token ids and a check report out."""
