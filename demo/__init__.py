"""How the demo checkpoints are made: tokenizer, data, training, evaluation."""
