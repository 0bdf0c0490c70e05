"""One decoder for training and answering: config, weights, tokenizer, adapter, generation."""
