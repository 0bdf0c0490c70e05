"""Adapter and merged model, each in a folder of its own, checked against what they were made from."""
