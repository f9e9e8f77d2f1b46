"""What tests share: tiny real models and tokenizers, made on the spot."""
